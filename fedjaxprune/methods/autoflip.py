"""AutoFLIP: let all clients explore once, and prune the weights that no client had to move.

Two stages of one run:

1. ``explore``, one exchange: every explorer trains its own copy of the initial model on its own
   data until its loss stops improving, and sends the squared deviation of every weight. The server
   averages these (the *guidance*), scales the leaves to be comparable, and prunes the given share
   of weights that scores lowest in the whole model. With `channel_threshold`, channels that have
   lost most of their inputs are pruned too.
2. ``train``: FedAvg under this mask, from the initial weights.

We follow the papers where the authors' public code differs from them: explorers are independent
(there one model goes from client to client, so that all deviations are the same), deviations are
from the initial weights (there from those after the last client's first epoch), training starts
from the initial weights (there from the explored ones, a warm start that FedAvg does not get: see
`start_from`), and the mask holds in every local step (there the clients never find it). Biases and
normalization are not pruned by themselves, and every leaf keeps a weight, unless its only ones
belong to a pruned channel. The papers of 2026 score agreement by a rule that is not public; ours is
in `movement.by_movement`.

The variant ``explored_start`` is the control of what exploration gives beside a mask: FedAvg
without a mask, from the mean of the explored models.

References:
  Internò et al., `Pruning Federated Models through Loss Landscape Analysis and Client Agreement
  Scoring <https://arxiv.org/abs/2405.10271>`_, 2024 to 2026.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pydantic

from fedjaxprune import masks as masks_lib
from fedjaxprune.federated import batch_norm, early_stopping, server_optimizers
from fedjaxprune.method import Method, Paper
from fedjaxprune.models import gates, heads
from fedjaxprune.pruning import movement, pruners, schedules
from fedjaxprune.pruning.structured import channel_pruning
from fedjaxprune.rounds import facts as facts_lib
from fedjaxprune.rounds import reporting, stages
from fedjaxprune.rounds.protocol import FieldSpec, broadcast_of, joining
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import Count, Epochs, Rounds, Settings, Share, Sparsity, setting
from fedjaxprune.types import (
    Aggregator,
    Algorithm,
    Broadcast,
    Client,
    ClientData,
    CohortAggregator,
    Masks,
    Params,
    PrunableFn,
    Pruner,
    PrunerInputs,
    RoundState,
    Stage,
)

ReadFn = Callable[[Params, Masks], Params]  # (delta, masks) -> what the server needs of it

SCALES: Mapping[str, movement.ScaleFn] = {
    "min_max": movement.min_max,
    "ranks": movement.ranks,
    "robust": movement.robust,
    "plain": movement.plain,
}


class AutoFLIP(Settings):
    """Settings; the defaults are those of the papers or of the published code."""

    sparsity: Sparsity = setting(
        0.3, "Pruned fraction of the kernel weights; 0 prunes nothing.", unit="fraction"
    )
    explore_epochs: Epochs = setting(
        150, "Most passes of an explorer over its examples.", unit="epochs"
    )
    patience: Epochs = setting(
        40, "Passes without an improvement after which an explorer stops.", unit="epochs"
    )
    stop_on: Literal["epoch", "last_step", "validation"] = setting(
        "epoch",
        "Loss that must improve: the mean of a pass, that of its last batch, or that on the "
        "validation_fraction of the client's examples, on which the explorer does not train.",
    )
    validation_fraction: Share = setting(
        0.1, "Share of a client's examples held out for stop_on validation.", unit="fraction"
    )
    num_explorers: Count | None = setting(
        None, "Clients that explore.", unit="clients", unset="all clients"
    )
    explorer_weights: Literal["clients", "examples"] = setting(
        "clients", "Whether deviations are averaged equally or by examples."
    )
    layer_scaling: Literal["min_max", "ranks", "robust", "plain"] = setting(
        "min_max",
        "Makes the guidance of layers comparable: to [0, 1], ranks, by median and interquartile "
        "range, or unchanged.",
    )
    agreement: movement.Agreement = setting(
        "none",
        "Use of the clients' votes for weights: none, scaled multiplies a weight's guidance by its "
        "share of votes, majority prunes weights with less than half of the votes.",
    )
    prune_every: Rounds | None = setting(
        None,
        "Rounds of training from one revision of the mask to the next, by the deviations of the "
        "uploaded deltas. A pruned weight keeps its guidance.",
        unit="rounds",
        unset="the mask is not revised",
    )
    channel_threshold: float | None = setting(
        None,
        "Share of its incoming weights below which a whole channel is pruned, at most half of a "
        "layer's channels.",
        unit="fraction",
        unset="no channels are pruned",
        ge=0,
        le=1,
    )
    start_from: Literal["initial", "explored"] = setting(
        "initial",
        "Weights that training starts from: the initial ones, or the mean of the explored models, "
        "by examples (in effect the published code).",
    )

    @pydantic.model_validator(mode="after")
    def _check(self) -> "AutoFLIP":
        if self.agreement == "scaled" and self.layer_scaling == "robust":
            raise ValueError(
                "agreement must be 'none' or 'majority' with layer_scaling 'robust', whose "
                "guidance may be negative, got 'scaled'."
            )
        if self.stop_on == "validation" and self.validation_fraction == 1.0:
            raise ValueError(
                "validation_fraction must be less than 1 with stop_on 'validation', as explorers "
                "would have no examples to train on, got 1.0."
            )
        return self


def build(settings: AutoFLIP, task: Task) -> Algorithm:
    """Prune by how far the clients move each weight, once, before FedAvg.

    Raises:
      ValueError: there are fewer clients than explorers, or fewer rounds than `prune_every`; the
        network leaves nothing to prune, too few weights, or no channels; or no client has examples
        to explore on.
    """
    _check_run(settings, task)
    mean = joining(task.protocol, by=settings.explorer_weights)
    prunable, pruner, readings = masks_lib.is_kernel, None, {}
    if settings.sparsity > 0.0:
        prunable, pruner = _pruner(settings, task.facts)
        readings = _readings(settings)
    revise, fields = None, {}
    if pruner is not None and (period := settings.prune_every) is not None:
        due = schedules.every(period, start=period - 1)
        revise = pruners.when(due, pruner)
        fields = {
            name: FieldSpec(aggregate=mean, send="nothing", read=_when(due, reading))
            for name, reading in readings.items()
        }
    train = training(
        task.protocol, client=task.local_client(), pruner=revise, prunable=prunable, fields=fields
    )

    def server_update(key, state, fields):
        guide = state.pruner
        masks = state.masks
        if pruner is not None:
            whole = pruners.exempt(pruner, prunable)
            inputs = PrunerInputs(
                params=state.params,
                grads=None,
                round=state.round,
                statistics={name: fields[name] for name in readings},
            )
            masks, guide = whole.update(key, masks, whole.init(state.params), inputs)
        if settings.start_from == "explored":
            state = _move(state, fields)
        return state._replace(
            params=masks_lib.apply(masks, state.params),
            masks=masks,
            pruner=state.pruner if revise is None else guide,
        )

    explore = _explore(settings, task, readings, mean, server_update)
    train = train._replace(counted=masks_lib.is_kernel, has_fixed_masks=revise is None)
    return stages.in_order(train, before=(explore,))


def _check_run(settings: AutoFLIP, task: Task) -> None:
    """Refuse settings that do not fit the run."""
    num_explorers, period = settings.num_explorers, settings.prune_every
    if num_explorers is not None and num_explorers > task.num_clients:
        raise ValueError(
            f"method.num_explorers must be at most data.num_clients ({task.num_clients}), got "
            f"{num_explorers}."
        )
    if period is not None and period > task.protocol.num_rounds:
        raise ValueError(
            "method.prune_every must be at most federation.num_rounds "
            f"({task.protocol.num_rounds}), as the mask would never be revised, got {period}."
        )
    if settings.stop_on == "validation":
        largest = ClientData(
            examples=(),
            order=jnp.arange(task.largest_client, dtype=jnp.int32),
            start=jnp.int32(0),
            size=jnp.int32(task.largest_client),
            client_id=jnp.int32(0),
        )
        epoch = task.batches(examples="training", share=settings.validation_fraction)
        if int(epoch.num_steps(largest)) == 0:
            raise ValueError(
                "method.validation_fraction must leave explorers examples to train on with "
                f"method.stop_on 'validation', but the largest client has {task.largest_client} "
                f"examples, and {settings.validation_fraction} holds out all of them."
            )


def _pruner(settings: AutoFLIP, facts: facts_lib.Facts) -> tuple[PrunableFn, Pruner]:
    """Give the leaves that may be pruned, and what prunes them; every leaf keeps a weight."""
    stages.check_prunable(facts.params, masks_lib.is_kernel)
    sizes = facts_lib.sizes(facts, masks_lib.is_kernel).values()
    if sum(sizes) - round(settings.sparsity * sum(sizes)) < len(sizes):
        raise ValueError(
            f"method.sparsity must leave a weight for each of the {len(sizes)} prunable leaves, of "
            f"{sum(sizes)} weights in all, got {settings.sparsity}."
        )
    by_movement = movement.by_movement(
        settings.sparsity, scale=SCALES[settings.layer_scaling], agreement=settings.agreement
    )
    if settings.channel_threshold is None:
        return masks_lib.is_kernel, by_movement
    groups = facts.channels().groups
    if not groups:
        raise ValueError(
            "method.channel_threshold must be unset, as the network has no channels that can be "
            f"removed, got {settings.channel_threshold}."
        )
    pruner = channel_pruning.prune_channels(
        by_movement, groups, threshold=settings.channel_threshold, prunable=masks_lib.is_kernel
    )
    return channel_pruning.reaches(groups, masks_lib.is_kernel), pruner


def _readings(settings: AutoFLIP) -> dict[str, ReadFn]:
    """Give what the server needs to know of each client's delta, by name."""

    def vote(delta: Params, masks: Masks) -> Params:
        return movement.votes(
            early_stopping.deviations(delta),
            masks,
            sparsity=settings.sparsity,
            scale=SCALES[settings.layer_scaling],
            prunable=masks_lib.is_kernel,
        )

    readings: dict[str, ReadFn] = {
        "deviations": lambda delta, masks: early_stopping.deviations(delta)
    }
    return readings if settings.agreement == "none" else {**readings, "agreement": vote}


def _explore(
    settings: AutoFLIP,
    task: Task,
    readings: Mapping[str, ReadFn],
    mean: Aggregator | CohortAggregator,
    server_update: Callable[..., RoundState],
) -> Stage:
    """Send the dense model to the explorers; they send deviations, or the trained model."""
    is_warm = settings.start_from == "explored"
    fields = {
        # The server counts votes by the deviations, and computes these from the models, if sent.
        name: FieldSpec(
            aggregate=mean, send="nothing" if is_warm or name == "agreement" else "whole"
        )
        for name in readings
    }
    if is_warm:
        # By examples.
        fields |= {"model_state": FieldSpec(travels=gates.is_of_client), "move": FieldSpec()}
        # Not called `delta`, which would go through the uplink.
        readings = {**readings, "move": lambda delta, masks: delta}
    client = early_stopping.report(
        _explorer(settings, task),
        readings=readings,
        keep=("metrics", "model_state") if is_warm else ("metrics",),
    )
    return reporting.reporting_round(
        task.protocol,
        name="explore",
        client=client,
        fields=fields,
        server_update=server_update,
        broadcast=lambda state: broadcast_of(state)._replace(masks=masks_lib.full(state.params)),
        download=reporting.dense_and_trained,
        exchange=reporting.Exchange(cohort=settings.num_explorers or "everyone"),
    )


def _explorer(settings: AutoFLIP, task: Task) -> Client:
    """Make a client that trains alone until its loss stops improving."""
    share, validation = settings.validation_fraction, None
    if settings.stop_on == "validation":
        epoch = task.batches(examples="training", share=share)
        held_out = task.batches(examples="validation", share=share, augment=False)
        validation = batch_norm.losses(
            task.model.predict, loss=heads.prediction_loss(task.model), batcher=held_out
        )
    else:
        epoch = task.batches()
    return early_stopping.until_no_improvement(
        task.model.loss,
        epoch=epoch,
        optimizer=task.protocol.optimizer,
        max_epochs=settings.explore_epochs,
        patience=settings.patience,
        watch="last_step" if settings.stop_on == "last_step" else "epoch",
        validation=validation,
    )


def _move(state: RoundState, fields: Mapping[str, Any]) -> RoundState:
    """Move the model by the explorers' mean delta."""
    return state._replace(
        params=jax.tree.map(
            lambda leaf, change: leaf + change.astype(leaf.dtype), state.params, fields["move"]
        ),
        model_state=server_optimizers.shift(state.model_state, fields["model_state"]),
    )


def _when(due: schedules.Predicate, reading: ReadFn) -> Callable[[Params, Broadcast], Params]:
    """Read a delta in the rounds that are due; give zeros in the others."""

    def read(delta: Params, broadcast: Broadcast) -> Params:
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), delta)
        return jax.lax.cond(
            due(broadcast.round), reading, lambda delta, masks: blank, delta, broadcast.masks
        )

    return read


METHOD = Method(
    build=build,
    settings=AutoFLIP,
    paper=Paper(
        "Internò et al.",
        2024,
        "Pruning Federated Models through Loss Landscape Analysis and Client Agreement Scoring",
        arxiv="2405.10271",
        code="https://github.com/ChristianInterno/AutoFLIP",
    ),
    variants={"explored_start": {"sparsity": 0.0, "start_from": "explored"}},
    law_settings={"sparsity": 0.5, "explore_epochs": 4, "patience": 2},
    nothing_pruned={"sparsity": 0.0},
)
