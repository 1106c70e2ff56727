"""Stages of methods that choose filters before training: exchanges about bits, and then FedAvg.

Nothing but a bit a filter travels for the masks, in every stage, in a coding whose length follows
from how many are live.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.costs import ledger, storage_models
from fedjaxprune.federated import local_training
from fedjaxprune.methods._filter_masks import FilterState, Plan, is_over
from fedjaxprune.pruning.structured import filters
from fedjaxprune.rounds import reporting
from fedjaxprune.rounds.training import Protocol, compose
from fedjaxprune.traffic import AGREEMENT, TRAINED, FieldLength, ModeledBits
from fedjaxprune.types import (
    Aggregator,
    Algorithm,
    Broadcast,
    Client,
    ClientData,
    CohortAggregator,
    Key,
    Message,
    Model,
    RoundMetrics,
    RoundState,
    Stage,
    State,
)

COUNTS, REMOVED = "num_filters", "removed_kept"  # reports [C, layers] and [C, L]

# (key, (broadcast, keep), (), data) -> (message, ()): a client's work in an exchange
Local = Callable[[Key, tuple[Broadcast, filters.Keep], State, ClientData], tuple[Message, State]]


def mask_field(keep: filters.Keep, slots: jax.Array) -> FieldLength:
    """Describe the filters in force as a message to some of the cohort; all are known to live."""
    return FieldLength(
        like=trees.shape_only(keep), slots=slots & ~_is_whole(keep), pairs=filters.num_kept(keep)
    )


def exchange(
    setup: Protocol,
    the: Plan,
    *,
    name: str,
    client: Local,
    aggregators: Mapping[str, Aggregator | CohortAggregator],
    conclude: Callable[[Key, RoundState, Mapping[str, Any]], RoundState],
    upload: str,
    start_rounds: int,
) -> Stage:
    """Make the stage in which clients train from the start, again and again, and report.

    Down go the filters in force, to clients that hold others, and, where the start was trained, its
    live weights and statistics to clients that come for the first time. Once `is_over`, nobody is
    asked any more.

    Args:
      setup: says how the cohort is mapped.
      the: what is pruned; there are ``iterations + 1`` exchanges.
      name: the stage's name in the record.
      client: one client's work; it trains under the broadcast's masks.
      aggregators: by field of the message.
      conclude: ``(key, state, fields) -> state`` from the aggregated fields; `settle` is its end.
      upload: field of the message that travels.
      start_rounds: whether, and how long, the start was trained.
    """

    def broadcast(state: RoundState) -> tuple[Broadcast, filters.Keep]:
        known = Broadcast(
            params=state.params,
            masks=state.masks,
            model_state=state.model_state,
            round=state.round,
        )
        return known, state.method.keep

    def survey(newcomers: jax.Array) -> Stage:
        def download(state, stale):
            kept = masks_lib.num_kept(state.masks)
            in_force = mask_field(state.method.keep, stale)
            messages = {"masks": {"masks": in_force}}
            if start_rounds:
                messages["start"] = {
                    "params": FieldLength(slots=newcomers, known=kept),
                    "model_state": FieldLength(slots=newcomers),
                }
            return reporting.Download(
                messages=messages,
                kept=jnp.where(newcomers[:, None, None], kept[None, None], 0),
                num_masks=in_force.slots.astype(jnp.int32),
            )

        return reporting.reporting_round(
            setup,
            name=name,
            client=Client(init=lambda params: (), update=client),  # pyright: ignore[reportArgumentType]
            aggregators=aggregators,
            broadcast=broadcast,  # pyright: ignore[reportArgumentType]
            conclude=conclude,
            download=download,
            upload=(upload,),
        )

    def round_fn(key, state, cohort, population):
        # Version 0 is that of clients which have not been told anything; a trained start is told.
        version = jnp.maximum(state.mask_version, 1) if start_rounds else state.mask_version
        newcomers = (cohort.states.mask_version == 0) & (start_rounds > 0)
        over = is_over(the, state.method.keep)
        after, rows, metrics = survey(newcomers).round(
            key,
            state._replace(mask_version=version),
            cohort._replace(participated=cohort.participated & ~over),
            population,
        )
        reports = {TRAINED: masks_lib.num_kept(state.masks)}
        if upload == "masks":
            reports[AGREEMENT] = trees.take_rows(after.method.agreement, state.round)
        num_slots = cohort.participated.shape[0]
        sent = metrics.sent._replace(
            client_ids=jnp.where(over, -1, cohort.client_ids),  # then nobody is reached
            reports={n: jnp.repeat(one[None], num_slots, axis=0) for n, one in reports.items()},
        )
        heard_of = jnp.where(metrics.num_participating > 0, after.mask_version, state.mask_version)
        return after._replace(mask_version=heard_of), rows, metrics._replace(sent=sent)

    return Stage(name=name, num_rounds=the.iterations + 1, round=round_fn)


def federate(
    model: Model, setup: Protocol, the: Plan, before: Sequence[Stage], *, start_rounds: int
) -> Algorithm:
    """Put FedAvg under the filters in force behind the stages that choose them.

    Args:
      model: the network.
      setup: what every method shares; `num_rounds` counts the rounds of training alone.
      the: what is pruned.
      before: the stages that choose; they count their rounds from 0.
      start_rounds: rounds of dense FedAvg before these, which lead to the weights of the start.
    """
    if start_rounds < 0:
        raise ValueError(f"start_rounds must not be negative, got {start_rounds}.")
    training = compose(
        setup,
        client=local_training.local_sgd(
            model.loss,
            batcher=setup.batcher,
            optimizer=setup.optimizer,
            learning_rate_scale=setup.learning_rate_scale,
        ),
        prunable=lambda path, leaf: path in the.paths,
        modeled={
            "filter_masked": lambda metrics, state: _formula(the, metrics, state, _filter_masked),
            "channel_removed": lambda metrics, state: _formula(the, metrics, state, _removed),
        },
    )
    (train,) = training.stages
    train = train._replace(round=_reporting(train))
    all_of_them: list[Stage] = []
    if start_rounds:
        all_of_them.append(train._replace(name="start", num_rounds=start_rounds))
    for stage in (*before, train):
        all_of_them.append(
            reporting.shift_rounds(stage, sum(each.num_rounds for each in all_of_them))
        )

    def init_fn(params, model_state):
        method = FilterState(
            keep=filters.full(the.layers),
            agreement=jnp.zeros((the.iterations + 1, len(the.layers)), jnp.float32),
            removed_kept=jnp.asarray(trees.sizes(params), jnp.int32),
        )
        return training.init(params, model_state)._replace(method=method)

    return training._replace(init=init_fn, stages=tuple(all_of_them))


def _reporting(stage: Stage):
    """Let the masks of a training round travel as bits, and report what formulas need."""

    def round_fn(key, state, cohort, population):
        method: FilterState = state.method
        field = mask_field(method.keep, cohort.states.mask_version != state.mask_version)
        after, rows, metrics = stage.round(key, state, cohort, population)
        size = cohort.participated.shape[0]
        sent = metrics.sent
        reports = {COUNTS: filters.num_kept(method.keep), REMOVED: method.removed_kept}
        sent = sent._replace(
            num_masks=field.slots.astype(jnp.int32),
            packed_masks=(),
            down={**sent.down, "masks": {"masks": field}},
            reports={
                **sent.reports,
                **{n: jnp.broadcast_to(x[None], (size, *x.shape)) for n, x in reports.items()},
            },
        )
        num_sent = jnp.sum(field.slots & cohort.participated, dtype=jnp.int32)
        return after, rows, metrics._replace(num_masks_sent=num_sent, sent=sent)

    return round_fn


def _formula(
    the: Plan,
    metrics: RoundMetrics,
    state: RoundState,
    transfer: Callable[[Plan, Mapping[str, np.ndarray], RoundState], int],
) -> ModeledBits:
    """Charge a bit a filter in exchanges about masks, and `transfer` for a model in training.

    Statistics are not charged, and the last masks only once, in the exchange that finds them. What
    else travels in an exchange, as the weights of a trained start, is charged dense.
    """
    present = np.asarray(metrics.participated)
    reached = ledger.received(present, np.asarray(metrics.sent.client_ids))
    num_up, num_down = int(present.sum()), int(reached.sum())
    reply = metrics.sent.up.get("reply", {})
    if "delta" in reply:
        bits = transfer(the, metrics.sent.reports, state)
        return ModeledBits(num_up * bits, num_down * bits)
    stored = ledger.charge_storage(metrics, state, storage_models.values)
    num_filters = sum(group.size for group in the.layers)
    up = num_filters if "masks" in reply else 32 * sum(trees.sizes(state.params))
    return ModeledBits(num_up * up, num_down * num_filters + stored.downlink)


def _filter_masked(the: Plan, reports: Mapping[str, np.ndarray], state: RoundState) -> int:
    num_weights = sum(g.size * size for g, size in zip(the.layers, the.filter_sizes, strict=True))
    return storage_models.filter_masked(
        np.asarray(reports[COUNTS])[0].tolist(),
        the.filter_sizes,
        sum(trees.sizes(state.params)) - num_weights,
    )


def _removed(the: Plan, reports: Mapping[str, np.ndarray], state: RoundState) -> int:
    del the, state  # the masks were counted
    return 32 * int(np.asarray(reports[REMOVED])[0].sum(dtype=np.int64))


def _is_whole(keep: filters.Keep) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(bits) for bits in keep]))
