"""Exchanges in which clients only report, and the server computes something of the reports."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.federated import aggregators
from fedjaxprune.federated import cohort as cohort_lib
from fedjaxprune.rounds import stages, traffic
from fedjaxprune.rounds.protocol import Hooks, Protocol, add_reports, broadcast_of, joining, weigh
from fedjaxprune.traffic import TRAINED, FieldLength, Sent
from fedjaxprune.types import (
    Aggregator,
    Client,
    CohortAggregator,
    CohortRule,
    FieldSpec,
    Key,
    Message,
    RoundMetrics,
    RoundState,
    Stage,
    State,
)


class Download(NamedTuple):
    """What clients receive in an exchange.

    Attributes:
      messages: by name, the fields of each (see `traffic.Sent`).
      num_downloaded: ``[C, T, L]`` int32, live entries per leaf of the models that each receives.
      num_masks: ``[C]`` int32, masks among it.
      is_trained: whether clients train the one model that they receive, and send as many entries
        back.
    """

    messages: Mapping[str, Mapping[str, FieldLength]]
    num_downloaded: jax.Array
    num_masks: jax.Array
    is_trained: bool = False


class Exchange(NamedTuple):
    """How often an exchange takes place, who is asked, and what is computed for it.

    Attributes:
      num_rounds: how often.
      cohort: who is asked (`Stage.cohort`).
      compute: ``state -> {TRAINED, EVALUATED or BACKPROPAGATED: [T, L]}`` (of `traffic`), models
        that each client passes its examples through, for the record of arithmetic; None for none.
      is_over: ``state -> [] bool``; once it is True no client is asked any more; None: never.
      hooks: what happens before and after each round.
    """

    num_rounds: int = 1
    cohort: CohortRule = "sampled"
    compute: Callable[[RoundState], Mapping[str, jax.Array]] | None = None
    is_over: Callable[[RoundState], jax.Array] | None = None
    hooks: Hooks | None = None


DownloadFn = Callable[[RoundState, jax.Array], Download]


def dense_download(state: RoundState, masks_held: jax.Array) -> Download:
    """Send the dense model and what is not trained to everybody, and no masks."""
    sizes = jnp.asarray(trees.sizes(state.params), jnp.int32)
    return Download(
        messages={"broadcast": {"params": FieldLength(), "model_state": FieldLength()}},
        num_downloaded=jnp.broadcast_to(sizes[None, None], (*masks_held.shape, 1, *sizes.shape)),
        num_masks=jnp.zeros(masks_held.shape, jnp.int32),
    )


def live_download(state: RoundState, masks_held: jax.Array) -> Download:
    """Send live weights and what is not trained to everybody, and masks to those who lack them.

    Masks travel in codings whose length follows from their counts.
    """
    kept = masks_lib.num_kept(state.masks)
    receivers = masks_held != state.masks_id
    return Download(
        messages={
            "broadcast": {"params": FieldLength(live_counts=kept), "model_state": FieldLength()},
            "masks": {"masks": FieldLength(clients=receivers, sent_counts=kept)},
        },
        num_downloaded=jnp.broadcast_to(kept[None, None], (*masks_held.shape, 1, *kept.shape)),
        num_masks=receivers.astype(jnp.int32),
    )


def dense_and_trained(state: RoundState, masks_held: jax.Array) -> Download:
    """Do as `dense_download`, to clients that train it and send as many entries back."""
    return dense_download(state, masks_held)._replace(is_trained=True)


def reporting_round(
    protocol: Protocol,
    *,
    name: str,
    client: Client,
    fields: Mapping[str, FieldSpec],
    server_update: Callable[[Key, RoundState, Mapping[str, Any]], RoundState],
    broadcast: Callable[[RoundState], Any] = broadcast_of,
    download: DownloadFn = dense_download,
    exchange: Exchange = Exchange(),  # noqa: B008
) -> Stage:
    """Make an exchange in which clients report and the server computes something of the reports.

    Clients keep no state of it but which masks they hold, even if they train for it. A round in
    which no message arrives, or which brings in a NaN or an infinity, changes nothing.

    Args:
      protocol: says how the cohort is mapped.
      name: the stage's name in the record.
      client: reports; its message needs no delta, and has `metrics`.
      fields: of its message. ``"whole"`` travels, of ``"masked"`` only entries under the masks of
        the broadcast, ``"bits"`` are masks (call the field `masks`, as which it is counted),
        ``"nothing"`` follows from the others or is for the record alone.
      server_update: ``(key, state, fields) -> state``, from the aggregated fields.
      broadcast: ``state -> Broadcast``, or whatever the client understands.
      download: ``(state, masks_held [C]) -> Download``; a client whose `masks_held` is not the
        state's `masks_id` does not hold the masks in force.
      exchange: how often, with whom, and what is computed.

    Raises:
      ValueError: if a field is to travel in a way that exchanges do not know.
    """
    joined = _aggregators(protocol, name, fields)
    update = _noted(client, protocol, fields)

    def round_fn(key, state, members, population):
        client_key, own_key = jax.random.split(key)
        ids, present, rows = members
        if exchange.is_over is not None:
            is_over = exchange.is_over(state)
            present, ids = present & ~is_over, jnp.where(is_over, -1, ids)
        outcome = cohort_lib.run(
            client_key,
            update,
            joined,
            broadcast(state),
            members._replace(participated=present, states=()),
            population,
            chunk_size=protocol.chunk_size,
            mesh=protocol.mesh,
        )
        is_heard = outcome.fields[traffic.NUM_MESSAGES] > 0
        after = server_update(own_key, state, outcome.fields)
        counts = is_heard & stages.is_sound(state, after)
        after = trees.tree_where(counts, after, state)
        rejected = outcome.rejected | (present & is_heard & ~counts)
        received = download(state, rows.masks_held)
        metrics = RoundMetrics(
            train=jax.tree.map(_sum_candidates, outcome.fields["metrics"]),
            num_live=masks_lib.num_kept(after.masks),
            num_changed=masks_lib.num_changed(state.masks, after.masks),
            num_downloaded=received.num_downloaded,
            num_uploaded=_num_uploaded(received),
            participated=present,
            num_participating=jnp.sum(present, dtype=jnp.int32),
            num_rejected=jnp.sum(rejected, dtype=jnp.int32),
            sent=Sent(
                round=state.round,
                client_ids=ids,
                num_masks=received.num_masks,
                packed_masks=(),
                down=received.messages,
                up={"reply": _reply(outcome.fields[traffic.SUMMARY])},
                reports={TRAINED: received.num_downloaded} if received.is_trained else {},
            ),
        )
        if exchange.compute is not None:
            metrics = add_reports(metrics, exchange.compute(state))
        rows = rows._replace(masks_held=jnp.where(present, state.masks_id, rows.masks_held))
        return stages.close(state, after), rows, metrics, counts

    return Stage(
        name=name,
        num_rounds=exchange.num_rounds,
        round=stages.with_hooks(round_fn, exchange.hooks),
        cohort=exchange.cohort,
    )


def _noted(
    client: Client, protocol: Protocol, fields: Mapping[str, FieldSpec]
) -> Callable[..., tuple[Message, State]]:
    """Make of a client's reports what arrives, and note for the ledger what of it travels."""
    travelling = [field for field, spec in fields.items() if spec.send != "nothing"]

    def update(key, given, own, data):
        message, _ = client.update(key, given, (), data)
        arrived = traffic.zero_unsent(fields, message.fields)
        narrow = [field for field in travelling if fields[field].send == "masked"]
        arrived |= {field: masks_lib.apply(given.masks, arrived[field]) for field in narrow}
        sent = {field: traffic.only_sent(fields, field, arrived[field]) for field in travelling}
        summary = {
            "template": trees.shape_only(sent),
            "sent_counts": {
                field: masks_lib.num_kept(tree)
                for field, tree in sent.items()
                if fields[field].send == "bits"
            },
            "live_counts": {field: masks_lib.num_kept(given.masks) for field in narrow},
        }
        added = {traffic.NUM_MESSAGES: jnp.int32(1), traffic.SUMMARY: summary}
        return Message({**arrived, **added}, weigh(protocol, message.weight)), own

    return update


def _aggregators(protocol, name, fields) -> dict[str, Aggregator | CohortAggregator]:
    """Choose how the fields of an exchange's messages become those of the cohort."""
    total = aggregators.unweighted_sum()
    joined = {"metrics": total, traffic.NUM_MESSAGES: total, traffic.SUMMARY: aggregators.stack()}
    for field, spec in fields.items():
        if spec.send not in ("whole", "masked", "bits", "nothing"):
            raise ValueError(
                f"the field {field!r} of the exchange {name!r} must be sent as 'whole', 'masked', "
                f"'bits' or 'nothing', got {spec.send!r}."
            )
        joined[field] = joining(protocol) if spec.aggregate is None else spec.aggregate
    return joined


def _num_uploaded(received: Download) -> jax.Array:
    """Count as many entries of a model going up as came down, or none: ``[C, L]``."""
    one = received.num_downloaded[:, 0]
    return one if received.is_trained else jnp.zeros_like(one)


def _reply(summary: Mapping[str, Any]) -> dict[str, FieldLength]:
    """Describe the clients' message by what was noted of its fields, gathered ``[C, ...]``."""
    reply = {
        name: FieldLength(
            template=jax.tree.map(lambda leaf: leaf[0], template),
            sent_counts=summary["sent_counts"].get(name, ()),
            live_counts=summary["live_counts"].get(name, ()),
        )
        for name, template in summary["template"].items()
    }
    return {**reply, "weight": traffic.weight_field()}


def _sum_candidates(leaf: jax.Array) -> jax.Array:
    """Add up accumulators over an axis of candidates, if there is one."""
    return jnp.sum(leaf) if leaf.ndim else leaf
