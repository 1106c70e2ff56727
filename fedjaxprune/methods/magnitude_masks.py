"""One-shot magnitude masks: a control that keeps the largest weights after a short training.

Where that training takes place says what the mask can know: at the server on examples of its own,
at one client, or on the pooled data of all clients, which no server has. FedAvg follows under the
mask. The set of controls follows the FedTiny paper.

References:
  Huang et al., `FedTiny <https://arxiv.org/abs/2212.01977>`_, 2023.
"""

from typing import Literal

import jax

from fedjaxprune.federated import local_training
from fedjaxprune.method import Method, Needs
from fedjaxprune.methods import _fixed_masks
from fedjaxprune.pruning import scores
from fedjaxprune.rounds import server_work
from fedjaxprune.rounds.task import Task
from fedjaxprune.settings import INT_MAX, Epochs, setting
from fedjaxprune.types import Algorithm


class MagnitudeMasks(_fixed_masks.FixedMaskSettings):
    """Settings of one-shot magnitude masks."""

    examples: Literal["server", "one_client", "pooled"] = setting(
        "server",
        "Examples that the mask is trained on: the server's own, those of one client, which "
        "receives the dense model and sends a mask back, or those of all clients together.",
    )
    server_epochs: Epochs = setting(
        3, "Passes over these examples before the mask is chosen.", unit="epochs"
    )
    score: Literal["magnitude", "lamp"] = setting(
        "magnitude",
        "What a weight is worth: its magnitude, or LAMP's share of the squares of its layer, which "
        "makes layers comparable in one pool (allocation global).",
    )
    client_id: int = setting(
        0,
        "The client whose examples decide the mask, with examples 'one_client'.",
        unit="client",
        ge=0,
        le=INT_MAX,
    )
    start_from: Literal["initial", "trained"] | None = setting(
        None,
        "Weights that the federation starts from: the initial ones, or those that were trained for "
        "the mask (one client sends them up with it).",
        unset="trained with examples 'server', else initial",
    )


def build(settings: MagnitudeMasks, task: Task) -> Algorithm:
    """Train where the examples are, keep the largest weights, and train under that mask.

    Raises:
      ValueError: there is no client `client_id`.
    """
    is_of_one = settings.examples == "one_client"
    if is_of_one and settings.client_id >= task.num_clients:
        raise ValueError(
            f"method.client_id must be less than data.num_clients ({task.num_clients}), got "
            f"{settings.client_id}."
        )
    # Only the mask is taken of what no server could have trained.
    usual = "trained" if settings.examples == "server" else "initial"
    is_trained = (settings.start_from or usual) == "trained"
    score = scores.lamp if settings.score == "lamp" else scores.magnitude
    choose = _fixed_masks.chooser(settings, task, score)
    client = local_training.local_sgd(
        task.model.loss,
        batcher=task.batches(epochs=settings.server_epochs),
        optimizer=task.protocol.optimizer,
    )
    source = _source(settings, task)
    train_there = server_work.train_at(client, source)

    def work(key, state, population):
        train_key, choose_key = jax.random.split(key)
        trained, metrics = train_there(train_key, state, population)
        start = trained if is_trained else state
        return choose(choose_key, start, trained.params, None), metrics

    prepare = server_work.server_round(
        "prepare",
        work,
        working_clients=(settings.client_id,) if is_of_one else (),
        clients_send="model" if is_trained else "masks",
        reads=server_work.reads_of(source),
    )
    return _fixed_masks.train_under(task, settings.sparsity, prepare)


def _source(settings: MagnitudeMasks, task: Task) -> server_work.SourceFn:
    if settings.examples == "server":
        return task.server_source()
    if settings.examples == "one_client":
        return server_work.examples_of(settings.client_id)
    return server_work.all_examples()


METHOD = Method(
    build=build,
    settings=MagnitudeMasks,
    needs=lambda settings: Needs(server_examples=settings.examples == "server"),
    variants={"one_client": {"examples": "one_client"}, "pooled": {"examples": "pooled"}},
    law_settings={"sparsity": 0.5, "server_epochs": 1},
    nothing_pruned={"sparsity": 0.0},
)
