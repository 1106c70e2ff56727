"""Stages beside training: exchanges in which clients only report, and work at the server alone.

Each is one pure function with the signature of a training round, so that stages share one
`RoundState`, one way to be run, and one way to be resumed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import metrics as metrics_lib
from fedjaxprune import trees
from fedjaxprune.federated import aggregators as aggregators_lib
from fedjaxprune.federated import cohort as cohort_lib
from fedjaxprune.rounds.training import Protocol
from fedjaxprune.traffic import TRAINED, FieldLength, Sent
from fedjaxprune.types import (
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

SourceFn = Callable[[Population], ClientData]  # whose examples work at the server is done with


class Download(NamedTuple):
    """What clients receive in an exchange that trains nothing.

    Attributes:
      messages: by name, the fields of each (see `accounts.Sent`).
      kept: ``[C, T, L]`` int32, live entries per leaf of the models that each client receives; or
        ``[L]`` where all receive the same one, train it, and send as many entries back.
      num_masks: ``[C]`` int32, masks among it.
    """

    messages: Mapping[str, Mapping[str, FieldLength]]
    kept: jax.Array
    num_masks: jax.Array


def reporting_round(
    setup: Protocol,
    *,
    name: str,
    client: Client,
    aggregators: Mapping[str, Aggregator | CohortAggregator],
    broadcast: Callable[[RoundState], Broadcast],
    conclude: Callable[[Key, RoundState, Mapping[str, Any]], RoundState],
    download: Callable[[RoundState, jax.Array], Download],
    upload: Sequence[str],
    work: Callable[[RoundState], Mapping[str, jax.Array]] | None = None,
) -> Stage:
    """Make an exchange in which clients report and the server draws its conclusions.

    Clients keep no state of it but which masks they hold, even if they train for it. A round in
    which nobody was heard changes nothing.

    Args:
      setup: says how the cohort is mapped.
      name: the stage's name in the record.
      client: reports; its message needs no delta, and has `metrics`.
      aggregators: by field of the message, `metrics` beside.
      broadcast: ``state -> Broadcast``, what clients look at.
      conclude: ``(key, state, fields) -> state``, from the aggregated fields.
      download: ``(state, stale [C]) -> Download``; `stale` marks the clients that do not hold the
        masks in force.
      upload: fields of the message that travel, trees of numbers whole, trees of booleans as masks
        (call the field `masks`, as which it is counted); the others follow from them, or are for
        the record alone.
      work: ``state -> {accounts.LOOKED or DIFFERENTIATED: [T, L]}``, the models that each client
        passes its examples through, for the record of arithmetic; None for none.
    """
    by_field = {
        "metrics": aggregators_lib.unweighted_sum(),
        **aggregators,
        "num_messages": aggregators_lib.unweighted_sum(),
        **dict.fromkeys(("like", "num_marked"), aggregators_lib.stack()),
    }

    def round_fn(key, state, cohort, population):
        client_key, own_key = jax.random.split(key)

        def update(key, broadcast, own, data):
            message, _ = client.update(key, broadcast, (), data)
            sent = {name: message.fields[name] for name in upload}
            fields = {
                **message.fields,
                "num_messages": jnp.int32(1),
                "like": trees.shape_only(sent),
                "num_marked": {n: masks_lib.num_kept(t) for n, t in sent.items() if _is_mask(t)},
            }
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
            mesh=setup.mesh,
        )
        heard = outcome.fields["num_messages"] > 0
        concluded = trees.tree_where(heard, conclude(own_key, state, outcome.fields), state)
        received = download(state, rows.mask_version != state.mask_version)
        like = jax.tree.map(lambda leaf: leaf[0], outcome.fields["like"])
        marked = outcome.fields["num_marked"]
        reply = {name: FieldLength(like=like[name], pairs=marked.get(name, ())) for name in upload}
        reply["weight"] = FieldLength(like=trees.shape_only(jnp.float32(0.0)))
        masks_received = jnp.where(cohort.participated, received.num_masks, 0)
        return _finish(
            state,
            concluded,
            rows._replace(
                mask_version=jnp.where(cohort.participated, state.mask_version, rows.mask_version)
            ),
            version_step=1,
            train=jax.tree.map(_sum_candidates, outcome.fields["metrics"]),
            num_downloaded=received.kept,
            participated=cohort.participated,
            num_participating=jnp.sum(cohort.participated, dtype=jnp.int32),
            num_rejected=jnp.sum(outcome.rejected, dtype=jnp.int32),
            num_masks_sent=jnp.sum(masks_received, dtype=jnp.int32),
            num_personal_masks=jnp.sum(cohort.participated, dtype=jnp.int32) * len(marked),
            sent=Sent(
                round=state.round,
                client_ids=cohort.client_ids,
                num_masks=received.num_masks,
                packed_masks=(),
                down=received.messages,
                up={"reply": reply},
                reports={
                    name: jnp.broadcast_to(kept[None], (cohort.participated.shape[0], *kept.shape))
                    for name, kept in ({} if work is None else work(state)).items()
                },
            ),
        )

    return Stage(name=name, num_rounds=1, round=round_fn)


def server_round(
    name: str,
    work: Callable[[Key, RoundState, Population], tuple[RoundState, Metrics]],
    *,
    masks_from: Literal["data", "seed"] = "data",
    guests: Sequence[int] = (),
    guests_send: Literal["masks", "model"] = "masks",
) -> Stage:
    """Make a round in which the server works alone: no client takes part, nothing travels.

    Args:
      name: the stage's name in the record.
      work: ``(key, state, population) -> (state, metrics)``.
      masks_from: masks that follow from the run's seed and the weights that everybody has
        need not be sent to anybody.
      guests: ids of clients that do the work in truth, for the record: each is sent the dense
        model, trains it and sends a mask back. No more than a cohort.
      guests_send: whether they send the mask alone, or also what they have trained, under it.
    """

    def round_fn(key, state, cohort, population):
        after, train = work(key, state, population)
        num_slots = cohort.participated.shape[0]
        if len(guests) > num_slots:
            raise ValueError(f"guests must be at most a cohort ({num_slots}), got {len(guests)}.")
        ids = jnp.asarray([*guests, *[-1] * (num_slots - len(guests))], jnp.int32)
        present = ids >= 0
        sizes = jnp.asarray(trees.sizes(state.params), jnp.int32)
        down, up, reports = {}, {}, {}
        if guests:
            reports = {TRAINED: jnp.broadcast_to(sizes[None], (num_slots, sizes.shape[0]))}
            down = {"broadcast": {"params": FieldLength(), "model_state": FieldLength()}}
            kept = masks_lib.num_kept(after.masks)
            up = {"masks": {"masks": FieldLength(pairs=kept)}}
            if guests_send == "model":
                up["model"] = {"params": FieldLength(known=kept), "model_state": FieldLength()}
        return _finish(
            state,
            after,
            cohort.states,
            version_step=0 if masks_from == "seed" else 1,
            train=train,
            num_downloaded=jnp.where(present[:, None, None], sizes[None, None], 0),
            participated=present,
            num_participating=jnp.int32(len(guests)),
            num_rejected=jnp.int32(0),
            num_masks_sent=jnp.int32(0),
            num_personal_masks=jnp.int32(len(guests)),
            sent=Sent(
                round=state.round,
                client_ids=ids,
                num_masks=jnp.zeros(num_slots, jnp.int32),
                packed_masks=(),
                down=down,
                up=up,
                reports=reports,
            ),
        )

    return Stage(name=name, num_rounds=1, round=round_fn)


def _finish(before, after, rows, *, version_step, **counts):
    """Count the round and the masks' version, and report the masks."""
    num_changed = masks_lib.num_changed(before.masks, after.masks)
    down = counts["num_downloaded"]
    shape = (counts["participated"].shape[0], down.shape[-1])
    trained = down if down.ndim == 1 else jnp.zeros_like(down[0, 0])
    state = after._replace(
        round=before.round + 1,
        mask_version=before.mask_version + version_step * (num_changed > 0).astype(jnp.int32),
    )
    round_metrics = RoundMetrics(
        kept=masks_lib.num_kept(after.masks),
        num_changed=num_changed,
        num_uploaded=jnp.broadcast_to(trained[None], shape),
        **counts,
    )
    return state, rows, round_metrics


def _is_mask(tree: Any) -> bool:
    """Tell whether a field is made of booleans; one without entries is not."""
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(leaf.dtype == jnp.bool_ for leaf in leaves)


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
      Work for `server_round`. Training that ends in NaN or infinities changes nothing.
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
        params, model_state = trees.tree_where(
            trees.all_finite(trained), trained, (state.params, state.model_state)
        )
        return state._replace(params=params, model_state=model_state), message.fields["metrics"]

    return work


def no_loss() -> Metrics:
    """Report work that has no loss."""
    return {"loss": metrics_lib.zero()}


def server_examples(rows: Any) -> SourceFn:
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


def examples_of(client_id: int) -> SourceFn:
    """Take one client's examples, for a mask that knows no other client."""
    if client_id < 0:
        raise ValueError(f"client_id must not be negative, got {client_id}.")
    return lambda population: client_data(population, jnp.int32(client_id))


def all_examples() -> SourceFn:
    """Take the examples of all clients, which no server has: the bound of what data can tell."""

    def source(population):
        return ClientData(
            examples=population.examples,
            order=population.order,
            start=jnp.int32(0),
            size=population.offsets[-1],
        )

    return source


def shift_rounds(stage: Stage, num_before: int) -> Stage:
    """Let a stage count its rounds from 0, though `num_before` rounds of others came before it.

    Schedules of learning rates, sparsities and readjustments are the stage's own.
    """

    def round_fn(key, state, cohort, population):
        shifted = state._replace(round=state.round - num_before)
        result, rows, round_metrics = stage.round(key, shifted, cohort, population)
        return result._replace(round=result.round + num_before), rows, round_metrics

    return stage._replace(round=round_fn)
