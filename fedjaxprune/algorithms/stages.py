"""Stages beside training: exchanges in which clients only report, and work at the server alone.

Each is one pure function with the signature of a training round, so that stages share one
`RoundState`, one way to be run, and one way to be resumed.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import metrics as metrics_lib
from fedjaxprune import trees
from fedjaxprune.algorithms.compose import Setup
from fedjaxprune.base import (
    Aggregator,
    Broadcast,
    Client,
    ClientData,
    CohortAggregator,
    Key,
    Message,
    Metrics,
    Population,
    RoundMetrics,
    RoundState,
    Stage,
    client_data,
)
from fedjaxprune.federated import aggregators as aggregators_lib
from fedjaxprune.federated import cohort as cohort_lib

SourceFn = Callable[[Population], ClientData]  # whose examples work at the server is done with


class Sent(NamedTuple):
    """What travels in an exchange that trains nothing; counts are of elements.

    Attributes:
      downlink_kept: ``[C, L]`` int32, entries of the model per leaf that each client receives.
      num_masks: ``[C]`` int32, masks that each client receives.
      num_statistics: ``[]`` int32, normalisation statistics, both ways together, per client.
      num_extra_down: ``[]`` int32, further values that each client receives.
      num_extra_up: ``[]`` int32, values that each client sends.
    """

    downlink_kept: jax.Array
    num_masks: jax.Array
    num_statistics: jax.Array
    num_extra_down: jax.Array
    num_extra_up: jax.Array


def survey(
    setup: Setup,
    *,
    name: str,
    client: Client,
    aggregators: Mapping[str, Aggregator | CohortAggregator],
    broadcast: Callable[[RoundState], Broadcast],
    conclude: Callable[[Key, RoundState, Mapping[str, Any]], RoundState],
    sent: Callable[[RoundState, jax.Array], Sent],
) -> Stage:
    """Make an exchange in which clients report and the server draws its conclusions.

    Clients keep no state of it but which masks they hold. A round in which nobody was heard
    changes nothing.

    Args:
      setup: says how the cohort is mapped.
      name: the stage's name in the record.
      client: reports; its message needs no delta, and has `metrics`.
      aggregators: by field of the message, `metrics` beside.
      broadcast: ``state -> Broadcast``, what clients look at.
      conclude: ``(key, state, fields) -> state``, from the aggregated fields.
      sent: ``(state, stale [C]) -> Sent``; `stale` marks the clients that take part and do not hold
        the masks in force.
    """
    by_field = {
        "metrics": aggregators_lib.total(),
        **aggregators,
        "num_messages": aggregators_lib.total(),
    }

    def round_fn(key, state, cohort, population):
        client_key, own_key = jax.random.split(key)

        def update(key, broadcast, own, data):
            message, _ = client.update(key, broadcast, (), data)
            fields = {**message.fields, "num_messages": jnp.int32(1)}
            return Message(fields=fields, weight=message.weight), own

        rows = cohort.states
        outcome = cohort_lib.run(
            client_key,
            update,
            by_field,
            broadcast(state),
            cohort._replace(states=()),
            population,
            chunk_size=setup.chunk_size,
        )
        heard = outcome.fields["num_messages"] > 0
        concluded = trees.select(heard, conclude(own_key, state, outcome.fields), state)
        stale = cohort.present & (rows.mask_version != state.mask_version)
        travelled = sent(state, stale)
        nothing = jnp.zeros_like(travelled.downlink_kept)
        return _finish(
            state,
            concluded,
            rows._replace(
                mask_version=jnp.where(cohort.present, state.mask_version, rows.mask_version)
            ),
            version_step=1,
            train=jax.tree.map(_sum_candidates, outcome.fields["metrics"]),
            downlink_kept=travelled.downlink_kept,
            uplink_kept=nothing,
            present=cohort.present,
            num_present=jnp.sum(cohort.present, dtype=jnp.int32),
            num_rejected=jnp.sum(outcome.rejected, dtype=jnp.int32),
            num_masks_sent=jnp.sum(travelled.num_masks, dtype=jnp.int32),
            num_personal_masks=jnp.int32(0),
            uplink_pairs=nothing,
            num_statistics=travelled.num_statistics,
            num_extra_down=travelled.num_extra_down,
            num_extra_up=travelled.num_extra_up,
        )

    return Stage(name=name, num_rounds=1, round=round_fn)


def at_server(
    name: str,
    work: Callable[[Key, RoundState, Population], tuple[RoundState, Metrics]],
    *,
    masks_from: Literal["data", "seed"] = "data",
    num_guests: int = 0,
) -> Stage:
    """Make a round in which the server works alone: no client takes part, nothing travels.

    Args:
      name: the stage's name in the record.
      work: ``(key, state, population) -> (state, metrics)``.
      masks_from: masks that follow from the run's seed and the weights that everybody has
        need not be sent to anybody.
      num_guests: clients that do the work in truth, for the record: each is sent the dense model
        and sends a mask back.
    """

    def round_fn(key, state, cohort, population):
        after, train = work(key, state, population)
        slots = cohort.present.shape[0]
        sizes = jnp.asarray(trees.sizes(state.params), jnp.int32)
        guests = jnp.arange(slots, dtype=jnp.int32) < num_guests
        nothing = jnp.zeros((slots, sizes.shape[0]), jnp.int32)
        none = jnp.int32(0)
        return _finish(
            state,
            after,
            cohort.states,
            version_step=0 if masks_from == "seed" else 1,
            train=train,
            downlink_kept=jnp.where(guests[:, None], sizes[None], nothing),
            uplink_kept=nothing,
            present=guests,
            num_present=jnp.int32(num_guests),
            num_rejected=none,
            num_masks_sent=none,
            num_personal_masks=jnp.int32(num_guests),
            uplink_pairs=nothing,
            num_statistics=jnp.int32(sum(trees.sizes(state.model_state))),
            num_extra_down=none,
            num_extra_up=none,
        )

    return Stage(name=name, num_rounds=1, round=round_fn)


def _finish(before, after, rows, *, version_step, **counts):
    """Count the round and the masks' version, and report the masks."""
    num_changed = masks_lib.num_changed(before.masks, after.masks)
    state = after._replace(
        round=before.round + 1,
        mask_version=before.mask_version + version_step * (num_changed > 0).astype(jnp.int32),
    )
    round_metrics = RoundMetrics(
        kept=masks_lib.num_kept(after.masks),
        num_changed=num_changed,
        **counts,
    )
    return state, rows, round_metrics


def _sum_candidates(leaf: jax.Array) -> jax.Array:
    """Add up accumulators over an axis of candidates, if there is one."""
    return jnp.sum(leaf) if leaf.ndim else leaf


def train_at(
    client: Client, source: SourceFn
) -> Callable[[Key, RoundState, Population], tuple[RoundState, Metrics]]:
    """Make the server train its model on examples of its own, under the masks in force.

    Args:
      client: any local work; its state is forgotten.
      source: ``population -> ClientData``.

    Returns:
      Work for `at_server`. Training that ends in NaN or infinities changes nothing.
    """

    def work(key, state, population):
        broadcast = Broadcast(
            params=state.params,
            masks=state.masks,
            model_state=state.model_state,
            round=state.round,
        )
        message, _ = client.update(key, broadcast, client.init(state.params), source(population))
        trained = (
            jax.tree.map(jnp.add, state.params, message.fields["delta"]),
            jax.tree.map(
                lambda old, change: old + change.astype(old.dtype),
                state.model_state,
                message.fields["model_state"],
            ),
        )
        params, model_state = trees.select(
            trees.all_finite(trained), trained, (state.params, state.model_state)
        )
        return state._replace(params=params, model_state=model_state), message.fields["metrics"]

    return work


def unmeasured() -> Metrics:
    """Report work that has no loss."""
    return {"loss": metrics_lib.zero()}


def held_out(rows: Any) -> SourceFn:
    """Give the server examples of its own, which no client holds.

    Args:
      rows: ``[S]`` integers, rows of the population's examples; at least one.
    """
    order = jnp.asarray(rows, jnp.int32)
    if order.ndim != 1 or order.shape[0] == 0:
        raise ValueError(f"rows must list at least one example, got the shape {order.shape}.")

    def source(population):
        return ClientData(
            examples=population.examples,
            order=order,
            start=jnp.int32(0),
            size=jnp.int32(order.shape[0]),
        )

    return source


def one_client(client_id: int) -> SourceFn:
    """Take one client's examples, for a mask that knows no other client."""
    if client_id < 0:
        raise ValueError(f"client_id must not be negative, got {client_id}.")
    return lambda population: client_data(population, jnp.int32(client_id))


def pooled() -> SourceFn:
    """Take the examples of all clients, which no server has: the bound of what data can tell."""

    def source(population):
        return ClientData(
            examples=population.examples,
            order=population.order,
            start=jnp.int32(0),
            size=population.offsets[-1],
        )

    return source


def after(stage: Stage, num_before: int) -> Stage:
    """Let a stage count its rounds from 0, though `num_before` rounds of others came before it.

    Schedules of learning rates, sparsities and readjustments are the stage's own.
    """

    def round_fn(key, state, cohort, population):
        shifted = state._replace(round=state.round - num_before)
        result, rows, round_metrics = stage.round(key, shifted, cohort, population)
        return result._replace(round=result.round + num_before), rows, round_metrics

    return stage._replace(round=round_fn)
