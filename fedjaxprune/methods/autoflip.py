"""AutoFLIP: let all clients explore once, and prune what none of them had to move.

Two stages of one run:

1. ``explore``, one exchange: every explorer trains its own copy of the initial model on its own
   data until its loss stops falling, and sends the squared deviation of every weight. The server
   averages these (the *guidance*), makes the leaves comparable, and prunes the share of the weights
   that scores lowest in the whole model; channels that have lost most of their inputs may follow.
2. ``train``: FedAvg under this mask, from the initial weights.

We follow the papers where the authors' public code differs from them: explorers are independent
(there one model goes from client to client, so that all deviations are the same), deviations are
from the initial weights (there from those after the last client's first epoch), training starts
from the initial weights (there from the explored ones, which is a warm start that FedAvg does not
get: see `explored_start`), and the mask holds in every local step (there it is never found by the
clients). Biases and normalization are not pruned by themselves, and every leaf keeps a weight,
unless its only ones go with a channel.

References:
  Internò et al., `Pruning Federated Models through Loss Landscape Analysis and Client Agreement
  Scoring <https://arxiv.org/abs/2405.10271>`_, 2024 to 2026.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.federated import aggregators, early_stopping, local_training, server_optimizers
from fedjaxprune.pruning import movement, pruners, schedules
from fedjaxprune.pruning.structured import channel_pruning
from fedjaxprune.rounds.protocol import FieldSpec, Protocol, broadcast_of
from fedjaxprune.rounds.reporting import Exchange, dense_and_trained, reporting_round
from fedjaxprune.rounds.stages import in_order
from fedjaxprune.rounds.training import training
from fedjaxprune.structure.channels.groups import Group
from fedjaxprune.types import (
    Algorithm,
    Broadcast,
    Client,
    Model,
    Params,
    PrunableFn,
    PrunerInputs,
    RoundState,
    Stage,
)


def autoflip(
    model: Model,
    setup: Protocol,
    *,
    sparsity: float,
    explorer: Client,
    prunable: PrunableFn = masks_lib.is_kernel,
    scale: movement.ScaleFn = movement.min_max,
    explorer_weights: Literal["clients", "examples"] = "clients",
    agreement: movement.Agreement = "none",
    refresh_every: int | None = None,
    groups: Sequence[Group] = (),
    channel_threshold: float = 0.3,
    start: Literal["initial", "explored"] = "initial",
) -> Algorithm:
    """Prune by how far all clients move each weight, once, before FedAvg.

    Args:
      model: the network.
      setup: what every method shares (published code: 5 local epochs of batches of 350, Adam at
        3e-4, a factor of 0.99 a round; its server with momentum 0.9 is ``server_optimizers.fedavgm(
        learning_rate=0.1, momentum=0.9)``); `num_rounds` counts the rounds of training alone.
      sparsity: pruned fraction of the prunable weights, in [0, 1) (published code: 0.3).
      explorer: how a client explores (`early_stopping.until_no_improvement`).
      prunable: which leaves may be pruned.
      scale: makes the guidance of different leaves comparable (see `guidance`).
      explorer_weights: whether explorers count equally (published) or by their examples.
      agreement: whether the clients' votes count (see `movement.by_movement`). The papers of 2026
        score agreement by a rule that is not public; this is ours.
      refresh_every: rounds of training from one revision of the mask to the next, by the deviations
        of what clients send anyway; None leaves the mask as it is. A pruned weight keeps the
        guidance it had.
      groups: the channels that may go as a whole (`channels.groups.analyze`); none by default, as
        in the published code.
      channel_threshold: a channel goes if it keeps less than this share of its incoming weights, at
        most half of a group's channels.
      start: ``"explored"`` trains on from the mean of the explorers' models, as the published code
        in effect does.

    Raises:
      ValueError: if an option is out of range; in `init`, if there is nothing to prune, or not a
        weight for every leaf.
    """
    if explorer_weights not in ("clients", "examples"):
        raise ValueError(
            f"explorer_weights must be 'clients' or 'examples', got {explorer_weights!r}."
        )
    if start not in ("initial", "explored"):
        raise ValueError(f"start must be 'initial' or 'explored', got {start!r}.")
    if refresh_every is not None and refresh_every < 1:
        raise ValueError(f"refresh_every must be at least 1, got {refresh_every}.")
    guided = movement.by_movement(sparsity, scale=scale, agreement=agreement)
    pruner, reached = guided, prunable
    if groups:
        pruner = channel_pruning.prune_channels(
            guided, groups, threshold=channel_threshold, prunable=prunable
        )
        reached = channel_pruning.reaches(groups, prunable)
    refreshes = refresh_every is not None

    def vote(deviations: Params, masks: Any) -> Params:
        return movement.votes(deviations, masks, sparsity=sparsity, scale=scale, prunable=prunable)

    readings = {"deviations": lambda delta, masks: early_stopping.deviations(delta)}
    if agreement != "none":  # the server could do the counting: nothing more travels
        readings["agreement"] = lambda delta, masks: vote(early_stopping.deviations(delta), masks)
    mean = {
        "clients": aggregators.unweighted_mean(),
        "examples": aggregators.weighted_mean(),
    }[explorer_weights]

    statistics: dict[str, FieldSpec] = {}
    due = schedules.every(refresh_every or 1, start=(refresh_every or 1) - 1)
    if refreshes:
        statistics = {
            name: FieldSpec(mean, send="nothing", read=_when(due, reading))
            for name, reading in readings.items()
        }
    trained = training(
        setup,
        client=_local(model, setup),
        pruner=pruners.when(due, pruner) if refreshes else None,
        prunable=reached,
        fields=statistics,
    )
    whole = pruners.exempt(pruner, reached)

    def init_fn(state):
        _check(state.params, sparsity, prunable)
        return state

    def conclude(key, state, fields):
        inputs = PrunerInputs(
            params=state.params,
            grads=None,
            round=state.round,
            statistics={name: fields[name] for name in readings},
        )
        masks, guide = whole.update(key, state.masks, whole.init(state.params), inputs)
        if start == "explored":
            state = _moved(state, fields)
        return state._replace(
            params=masks_lib.apply(masks, state.params),
            masks=masks,
            pruner=guide if refreshes else state.pruner,
        )

    explored = start == "explored"
    explore = _exploring(
        setup,
        early_stopping.report(
            explorer,
            readings={**readings, **_MOVE} if explored else readings,
            keep=("metrics", "model_state") if explored else ("metrics",),
        ),
        conclude,
        fields=dict.fromkeys(readings, FieldSpec(mean)),
        upload=("model_state", "move") if explored else ("deviations",),  # squares follow
    )
    return in_order(trained, (explore,), init=init_fn)


def explored_start(model: Model, setup: Protocol, *, explorer: Client) -> Algorithm:
    """Train by FedAvg, without a mask, from the mean of models that clients explored alone.

    It is the control of what exploration gives beside a mask: its stages and messages are those of
    `autoflip`, and the explorers' models are averaged by examples, as one long round of FedAvg.

    Args:
      model: the network.
      setup: what every method shares; `num_rounds` counts the rounds of training alone.
      explorer: how a client explores.
    """
    trained = training(setup, client=_local(model, setup))
    explore = _exploring(
        setup,
        early_stopping.report(explorer, readings=_MOVE, keep=("metrics", "model_state")),
        lambda key, state, fields: _moved(state, fields),
        fields={},
        upload=("model_state", "move"),
    )
    return in_order(trained, (explore,))


def _local(model: Model, setup: Protocol) -> Client:
    return local_training.local_sgd(
        model.loss,
        batcher=setup.batcher,
        optimizer=setup.optimizer,
        learning_rate_scale=setup.learning_rate_scale,
    )


def _exploring(setup, client, conclude, *, fields: dict[str, FieldSpec], upload) -> Stage:
    """Make the exchange: the dense model down, what `upload` names up."""
    fields = {**_BY_EXAMPLES, **fields}
    return reporting_round(
        setup,
        name="explore",
        client=client,
        fields={
            name: spec if name in upload else spec._replace(send="nothing")
            for name, spec in fields.items()
        },
        broadcast=lambda state: broadcast_of(state)._replace(masks=masks_lib.full(state.params)),
        server_update=conclude,
        download=dense_and_trained,
        exchange=Exchange(cohort="everyone"),
    )


# How an explorer moved: not called a delta, which would go through the uplink.
_MOVE = {"move": lambda delta, masks: delta}
_BY_EXAMPLES = dict.fromkeys(("move", "model_state"), FieldSpec(aggregators.weighted_mean()))


def _moved(state: RoundState, fields: Any) -> RoundState:
    """Move the model by the explorers' mean delta."""
    return state._replace(
        params=jax.tree.map(
            lambda leaf, change: leaf + change.astype(leaf.dtype), state.params, fields["move"]
        ),
        model_state=server_optimizers.shift(state.model_state, fields["model_state"]),
    )


def _when(due: schedules.Predicate, reading: Any) -> Any:
    """Read a delta in the rounds that are due, at the cost of zeros in the others."""

    def read(delta: Params, broadcast: Broadcast) -> Params:
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), delta)
        return jax.lax.cond(
            due(broadcast.round), reading, lambda delta, masks: blank, delta, broadcast.masks
        )

    return read


def _check(params: Params, sparsity: float, prunable: PrunableFn) -> None:
    """See that there is something to prune, and a weight for every leaf."""
    flags = masks_lib.prunable_leaves(params, prunable)
    sizes = [n for n, flag in zip(trees.sizes(params), flags, strict=True) if flag]
    if sparsity > 0.0 and not sizes:
        raise ValueError("there is nothing to prune: none of the leaves is prunable.")
    size = sum(sizes)
    if size - round(sparsity * size) < len(sizes):
        raise ValueError(
            f"sparsity must leave a weight for each of the {len(sizes)} prunable leaves, of "
            f"{size} weights in all, got {sparsity}."
        )
