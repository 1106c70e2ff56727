"""SNIP: a control whose fixed masks keep the weights of highest connection sensitivity.

A weight's score is ``|w * g|`` with `g` the mean gradient over the batches of one pass, in training
mode: a network at its start has no statistics to be evaluated with (FedTiny's code scores in
evaluation mode after a short training). Scores are compared within each layer by default, as in
that code; ``allocation: global`` is the paper's pool. The paper prunes in one step, FedTiny's code
in five, of equal numbers of weights, with new gradients at each.

On the clients' data (``snip/of_clients``) it is one exchange: the dense model goes down, dense
gradients come up and are averaged by examples. If no client answers, the largest weights are kept.

References:
  Lee et al., `SNIP <https://arxiv.org/abs/1810.02340>`_, 2019; Huang et al., `FedTiny
  <https://arxiv.org/abs/2212.01977>`_, 2023.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
import pydantic

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.federated import aggregators, local_training
from fedjaxprune.method import Method, Needs, Paper
from fedjaxprune.methods import _fixed_masks
from fedjaxprune.pruning import scores
from fedjaxprune.rounds import server_work
from fedjaxprune.rounds.protocol import FieldSpec, broadcast_of
from fedjaxprune.rounds.reporting import Exchange, reporting_round
from fedjaxprune.rounds.task import Task
from fedjaxprune.settings import Count, setting
from fedjaxprune.traffic import BACKPROPAGATED
from fedjaxprune.types import Algorithm, Client, Stage


class Snip(_fixed_masks.FixedMaskSettings):
    """Settings of SNIP."""

    examples: Literal["server", "pooled", "clients"] = setting(
        "server",
        "Examples that gradients are taken on: the server's own, those of all clients together, or "
        "each client's at that client.",
    )
    num_prune_steps: Count = setting(
        1,
        "Steps of equal numbers of weights, with new gradients at each; the exchange with clients "
        "has one.",
        unit="steps",
    )

    @pydantic.model_validator(mode="after")
    def _check_steps(self):
        if self.examples == "clients" and self.num_prune_steps > 1:
            raise ValueError(
                "num_prune_steps must be 1 with examples 'clients', whose gradients are asked for "
                f"once, got {self.num_prune_steps}."
            )
        return self


def build(settings: Snip, task: Task) -> Algorithm:
    """Score the weights of the initial network, and train under the mask of the best."""
    if settings.examples == "clients":
        stages = _ask_clients(settings, task)
    else:
        stages = (_score_at_server(settings, task),)
    return _fixed_masks.train_under(task, settings.sparsity, *stages)


def _score_at_server(settings: Snip, task: Task) -> Stage:
    """Score on examples at the server, step by step."""
    share, num_steps = _fixed_masks.share_out(settings, task), settings.num_prune_steps
    choosers = [
        _fixed_masks.choose_at(settings.sparsity * step / num_steps, share, scores.saliency)
        for step in range(1, num_steps + 1)
    ]
    client = _gradients(task)
    is_pooled = settings.examples == "pooled"
    source = server_work.all_examples() if is_pooled else task.server_source()

    def work(key, state, population):
        metrics = server_work.no_loss()
        for step, choose in enumerate(choosers):
            look_key, choose_key = jax.random.split(jax.random.fold_in(key, step))
            message, _ = client.update(look_key, broadcast_of(state), (), source(population))
            state = choose(choose_key, state, state.params, message.fields["grads"])
            metrics = message.fields["metrics"]
        return state, metrics

    return server_work.server_round("prepare", work)


def _ask_clients(settings: Snip, task: Task) -> tuple[Stage, Stage]:
    """Keep the largest weights in case no client answers, then ask for gradients."""
    choose = _fixed_masks.chooser(settings, task, scores.saliency)
    fallback = _fixed_masks.chooser(settings, task, scores.magnitude)

    def prepare(key, state, population):
        del population  # no data decides
        chosen = fallback(key, state, state.params, None)
        return chosen._replace(params=state.params), server_work.no_loss()

    def server_update(key, state, fields):
        return choose(
            key, state._replace(masks=masks_lib.full(state.params)), state.params, fields["grads"]
        )

    mean = aggregators.weighted_mean()
    score = reporting_round(
        task.protocol,
        name="score",
        client=_gradients(task),
        fields={
            "grads": FieldSpec(),
            **dict.fromkeys(("delta", "model_state"), FieldSpec(mean, send="nothing")),
        },
        broadcast=lambda state: broadcast_of(state)._replace(masks=masks_lib.full(state.params)),
        server_update=server_update,
        exchange=Exchange(
            compute=lambda state: {
                BACKPROPAGATED: jnp.asarray(trees.sizes(state.params), jnp.int32)[None]
            }
        ),
    )
    return server_work.server_round("prepare", prepare, masks_known_to="everybody"), score


def _gradients(task: Task) -> Client:
    """Make a client that reports the mean gradient over one pass, and stays where it is."""
    return local_training.local_sgd(
        task.model.loss,
        batcher=task.batches(),
        optimizer=optax.set_to_zero(),
        report_grads=lambda round_index: round_index >= 0,
    )


METHOD = Method(
    build=build,
    settings=Snip,
    paper=Paper("Lee et al.", 2019, "SNIP", arxiv="1810.02340"),
    needs=lambda settings: Needs(server_examples=settings.examples == "server"),
    variants={"of_clients": {"examples": "clients", "num_prune_steps": 1}},
    law_settings={"sparsity": 0.5, "num_prune_steps": 2},
    nothing_pruned={"sparsity": 0.0},
)
