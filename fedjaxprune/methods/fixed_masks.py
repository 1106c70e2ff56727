"""Controls: masks fixed before training, chosen without the method whose claim they test.

Each is one exchange or one round at the server, and then FedAvg under the masks: random ones, the
largest weights after a short training somewhere, or the weights of highest connection sensitivity
(SNIP). Where the training happens says what the mask may know: at the server on held-out examples,
at one client, or on the pooled data of all, which nobody has.

SNIP scores a weight by ``|w * g|`` with `g` the mean gradient over the batches of one pass, in
training mode (a network at its start has no statistics to be evaluated with; FedTiny's code scores
in evaluation mode after a short training). Scores are compared within each layer by default, as in
that code; ``allocation.whole_model()`` is the paper's pool.

References:
  Lee et al., `SNIP <https://arxiv.org/abs/1810.02340>`_, 2019; the set of controls follows Huang et
  al., `FedTiny <https://arxiv.org/abs/2212.01977>`_, 2023.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.federated import aggregators, local_training
from fedjaxprune.pruning import allocation as allocations
from fedjaxprune.pruning import pruners, scores
from fedjaxprune.rounds import server_work
from fedjaxprune.rounds.protocol import FieldSpec, Protocol, broadcast_of
from fedjaxprune.rounds.reporting import Exchange, reporting_round
from fedjaxprune.rounds.stages import in_order
from fedjaxprune.rounds.training import training
from fedjaxprune.traffic import BACKPROPAGATED
from fedjaxprune.types import (
    Algorithm,
    Batcher,
    Client,
    Model,
    PrunableFn,
    PrunerInputs,
    RoundState,
    Stage,
)


def random_masks(
    model: Model,
    setup: Protocol,
    *,
    sparsity: float,
    allocation: allocations.AllocationFn = allocations.uniform(),  # noqa: B008
    prunable: PrunableFn = masks_lib.is_kernel,
) -> Algorithm:
    """Train under masks drawn at random; they follow from the run's seed and do not travel.

    Args:
      model: the network.
      setup: what every method shares.
      sparsity: pruned fraction of the prunable weights, in [0, 1).
      allocation: how many each layer keeps.
      prunable: which leaves may be pruned.
    """
    choose = _chooser(sparsity, scores.random, allocation, prunable)

    def work(key, state, population):
        del population  # no data decides
        return choose(key, state, state.params, None), server_work.no_loss()

    return _train(
        model,
        setup,
        server_work.server_round("draw", work, masks_known_to="everybody"),
        sparsity,
        prunable,
    )


def magnitude_masks(
    model: Model,
    setup: Protocol,
    *,
    sparsity: float,
    source: server_work.SourceFn,
    pretraining: Batcher,
    weights: Literal["trained", "initial"],
    working_clients: Sequence[int] = (),
    allocation: allocations.AllocationFn = allocations.uniform(),  # noqa: B008
    prunable: PrunableFn = masks_lib.is_kernel,
) -> Algorithm:
    """Train under the mask of the largest weights after a short training on `source`, in one shot.

    Args:
      model: the network.
      setup: what every method shares.
      sparsity: pruned fraction of the prunable weights, in [0, 1).
      source: whose examples: `server_work.server_examples`, `server_work.examples_of` or
        `server_work.all_examples`.
      pretraining: the local steps there.
      weights: whether the federation goes on from the weights trained there, or from the initial
        ones, so that nothing but the mask is learnt from them.
      working_clients: clients that are sent the dense model for it and send a mask back, with the
        weights under it if these are wanted: the one of `server_work.examples_of`.
      allocation: how many each layer keeps.
      prunable: which leaves may be pruned.
    """
    if weights not in ("trained", "initial"):
        raise ValueError(f"weights must be 'trained' or 'initial', got {weights!r}.")
    choose = _chooser(sparsity, scores.magnitude, allocation, prunable)
    client = local_training.local_sgd(model.loss, batcher=pretraining, optimizer=setup.optimizer)
    pretrain = server_work.train_at(client, source)

    def work(key, state, population):
        train_key, choose_key = jax.random.split(key)
        trained, train = pretrain(train_key, state, population)
        start = trained if weights == "trained" else state
        return choose(choose_key, start, trained.params, None), train

    prepare = server_work.server_round(
        "prepare",
        work,
        working_clients=working_clients,
        clients_send="model" if weights == "trained" else "masks",
    )
    return _train(model, setup, prepare, sparsity, prunable)


def snip_masks(
    model: Model,
    setup: Protocol,
    *,
    sparsity: float,
    source: server_work.SourceFn,
    batcher: Batcher,
    num_steps: int = 1,
    allocation: allocations.AllocationFn = allocations.uniform(),  # noqa: B008
    prunable: PrunableFn = masks_lib.is_kernel,
) -> Algorithm:
    """Train under the mask of highest connection sensitivity on examples at the server.

    Args:
      model: the network.
      setup: what every method shares.
      sparsity: pruned fraction of the prunable weights, in [0, 1).
      source: whose examples.
      batcher: one pass over them.
      num_steps: the paper prunes in one step; FedTiny's code takes 5, of equal numbers of weights,
        with new gradients at each.
      allocation: how many each layer keeps.
      prunable: which leaves may be pruned.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    choosers = [
        _chooser(sparsity * step / num_steps, scores.saliency, allocation, prunable)
        for step in range(1, num_steps + 1)
    ]
    client = _gradients(model, batcher)

    def work(key, state, population):
        train = server_work.no_loss()
        for step, choose in enumerate(choosers):
            look_key, choose_key = jax.random.split(jax.random.fold_in(key, step))
            message, _ = client.update(look_key, broadcast_of(state), (), source(population))
            state = choose(choose_key, state, state.params, message.fields["grads"])
            train = message.fields["metrics"]
        return state, train

    return _train(model, setup, server_work.server_round("prepare", work), sparsity, prunable)


def snip_masks_of_clients(
    model: Model,
    setup: Protocol,
    *,
    sparsity: float,
    batcher: Batcher,
    allocation: allocations.AllocationFn = allocations.uniform(),  # noqa: B008
    prunable: PrunableFn = masks_lib.is_kernel,
) -> Algorithm:
    """Train under the mask of highest connection sensitivity on the clients' data.

    One exchange: the dense model goes down, dense gradients come up and are averaged by examples.
    In a round in which nobody answers, the mask would be missing: the largest weights are taken.

    Args:
      model: the network.
      setup: what every method shares.
      sparsity: pruned fraction of the prunable weights, in [0, 1).
      batcher: one pass over a client's examples.
      allocation: how many each layer keeps.
      prunable: which leaves may be pruned.
    """
    choose = _chooser(sparsity, scores.saliency, allocation, prunable)
    fallback = _chooser(sparsity, scores.magnitude, allocation, prunable)

    def prepare(key, state, population):
        del population  # no data decides
        chosen = fallback(key, state, state.params, None)
        return chosen._replace(params=state.params), server_work.no_loss()

    def conclude(key, state, fields):
        return choose(
            key, state._replace(masks=masks_lib.full(state.params)), state.params, fields["grads"]
        )

    mean = aggregators.weighted_mean()
    survey = reporting_round(
        setup,
        name="score",
        client=_gradients(model, batcher),
        fields={
            "grads": FieldSpec(mean),
            **dict.fromkeys(("delta", "model_state"), FieldSpec(mean, send="nothing")),
        },
        broadcast=lambda state: broadcast_of(state)._replace(masks=masks_lib.full(state.params)),
        server_update=conclude,
        exchange=Exchange(
            compute=lambda state: {
                BACKPROPAGATED: jnp.asarray(trees.sizes(state.params), jnp.int32)[None]
            }
        ),
    )
    return _train(
        model,
        setup,
        server_work.server_round("prepare", prepare, masks_known_to="everybody"),
        sparsity,
        prunable,
        survey,
    )


def _train(
    model: Model,
    setup: Protocol,
    start: Stage,
    sparsity: float,
    prunable: PrunableFn,
    *further: Stage,
) -> Algorithm:
    """Put plain training under the masks in force behind the stages that choose them."""
    trained = training(
        setup,
        client=local_training.local_sgd(
            model.loss,
            batcher=setup.batcher,
            optimizer=setup.optimizer,
            learning_rate_scale=setup.learning_rate_scale,
        ),
        prunable=prunable,
    )
    return in_order(trained, (start, *further), sparsity=sparsity)


def _chooser(sparsity: float, score: scores.ScoreFn, allocation: Any, prunable: PrunableFn) -> Any:
    """Make ``(key, state, params, grads) -> state`` with tighter masks, and weights under them."""
    pruner = pruners.exempt(
        pruners.prune_to(sparsity, score=score, allocation=allocation), prunable
    )

    def choose(key, state: RoundState, params, grads) -> RoundState:
        inputs = PrunerInputs(params=params, grads=grads, round=state.round)
        masks, _ = pruner.update(key, state.masks, pruner.init(params), inputs)
        return state._replace(masks=masks, params=masks_lib.apply(masks, state.params))

    return choose


def _gradients(model: Model, batcher: Batcher) -> Client:
    """Make a client that reports the mean gradient over its steps, and stays where it is."""
    return local_training.local_sgd(
        model.loss,
        batcher=batcher,
        optimizer=optax.set_to_zero(),
        report_grads=lambda round_index: round_index >= 0,
    )
