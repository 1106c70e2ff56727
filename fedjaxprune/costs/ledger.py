"""What a round put on the wire: the length of its messages, and what papers would have charged.

The lengths are those that `wire_format.encode` writes (the tests do write them). A stage says which
fields its messages have (`traffic.FieldLength`), and nothing else is charged. All lengths but one
follow from counts that the round reports; the masks in force, whose coding looks at positions, are
counted for real on the host, once for each version, from the bits that the round hands over. The
fields of a message travel in the order of their names.

Who is charged: a client that took part, both ways, whether its message was finite or not; a client
that dropped out, for what it had received; filling, nothing. A client that dropped out counts as
not having kept the masks.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjaxprune import live_weights
from fedjaxprune import masks as masks_lib
from fedjaxprune.costs import storage_models
from fedjaxprune.traffic import (
    DOWNLINK,
    ClientBits,
    FieldLength,
    LinkBits,
    Payload,
    PublishedBits,
    Traffic,
)
from fedjaxprune.types import Algorithm, PrunableFn, RoundMetrics, RoundState
from fedjaxprune.wire import format as wire_format
from fedjaxprune.wire import headers, messages
from fedjaxprune.wire.headers import Plan
from fedjaxprune.wire.messages import Spec

PayloadFn = Callable[[int], Payload]
Counts = tuple[int, ...]  # by leaf

# Of which kind a field's values are; all others are values.
KINDS: Mapping[str, str] = {
    "model_state": "statistics",
    "statistics": "statistics",
    messages.WEIGHT: "framing",
    messages.SEED: "indices",
    "chosen": "masks",
}
_ROUNDS = 16  # counts of all slots that are remembered: half a megabyte each for a thousand clients
NOTHING = LinkBits(values=0, indices=0, masks=0, statistics=0, framing=0)


class _Network(NamedTuple):
    """What of the parameters does not change from round to round."""

    leaves: tuple[Spec, ...]
    flags: tuple[bool, ...]
    masks: tuple[Spec, ...]  # those that travel
    num_prunable: int


class _Coder(NamedTuple):
    """A field whose entries travel as an uplink or a downlink says."""

    message: str  # the only one in which it does; empty: any
    field: str
    payload: PayloadFn
    shaped: Callable[[int, tuple[int, ...]], Payload] | None = None


class _Part(NamedTuple):
    """One field of one message, all in Python integers."""

    leaves: tuple[Spec, ...]
    live_counts: Counts | None
    sent_counts: Counts | None
    payloads: tuple[Payload, ...] | None


class _Frozen(NamedTuple):
    """Counts that can be looked up: an array of int64 as bytes."""

    shape: tuple[int, ...]
    data: bytes


class _Column(NamedTuple):
    """One field of a message to or from every slot."""

    name: str
    leaves: tuple[Spec, ...]
    clients: _Frozen | None
    live_counts: _Frozen | None
    sent_counts: _Frozen | None


def account(metrics: RoundMetrics, state: RoundState, algorithm: Algorithm) -> Traffic:
    """Charge a round.

    Args:
      metrics: of the round, on the host.
      state: of which only shapes and types are read.
      algorithm: whose payloads, `prunable` and `published` are read.
    """
    prunable = algorithm.prunable
    by_uplink = _Coder("", "delta", algorithm.payload, algorithm.shaped_payload)
    by_downlink = _Coder(DOWNLINK, "params", algorithm.downlink_payload)
    sent, present = metrics.sent, np.asarray(metrics.participated)
    ids = np.asarray(sent.client_ids)
    reached = received(present, ids)
    uninformed = (np.asarray(sent.num_masks) > 0) & reached
    network = _network(state, prunable)

    in_force = NOTHING
    if len(sent.packed_masks) and uninformed.any():
        packed = tuple(np.asarray(bits).tobytes() for bits in sent.packed_masks)
        in_force = _count_masks(network.masks, packed)
    going_down = _lengths(sent.down, state, network, by_downlink, reached)
    going_up = _lengths(sent.up, state, network, by_uplink, present)
    informed = {bits: _sum([bits, in_force]) for bits in set(going_down)}

    exchanges: dict[tuple[LinkBits, LinkBits], list[int]] = {}
    lacks_masks, names = uninformed.tolist(), ids.tolist()
    for slot in reached.nonzero()[0].tolist():
        here = going_down[slot]
        here = informed[here] if lacks_masks[slot] else here
        exchanges.setdefault((going_up[slot], here), []).append(names[slot])
    up, down = (
        _sum(LinkBits(*(len(who) * n for n in both[way])) for both, who in exchanges.items())
        for way in (0, 1)
    )
    groups: dict[tuple[int, int], list[int]] = {}
    for (there, here), who in exchanges.items():
        groups.setdefault((sum(there), sum(here)), []).extend(who)
    published = charge_by_formula(metrics, state, prunable=prunable)
    published |= {name: charge(metrics, state) for name, charge in algorithm.published.items()}
    return Traffic(
        uplink_bits=sum(up),
        downlink_bits=sum(down),
        uplink=up,
        downlink=down,
        clients=tuple(
            ClientBits(bits[0], bits[1], tuple(sorted(members)))
            for bits, members in sorted(groups.items())
        ),
        published=published,
    )


def received(present: np.ndarray, client_ids: np.ndarray) -> np.ndarray:
    """Tell which slots received the broadcast: clients that took part or dropped out afterwards.

    A slot is padding if its id is below 0, or is that of a present client or an earlier slot.
    """
    ids, here = np.asarray(client_ids).tolist(), np.asarray(present).tolist()
    met = {client for client, is_here in zip(ids, here, strict=True) if is_here}
    for slot, client in enumerate(ids):
        here[slot] |= client >= 0 and client not in met
        met.add(client)
    return np.array(here, np.bool_)


def charge_by_formula(
    metrics: RoundMetrics, state: RoundState, *, prunable: PrunableFn
) -> dict[str, PublishedBits]:
    """Charge a round by every formula that fits every method.

    Those of `storage_models.STORAGE` charge each transfer of a model by what is live;
    `values_and_bitmaps` charges 32 bits for a live value and one for each prunable weight of a mask
    that travels, and is how FedDIP's specification is charged.
    """
    present, network = np.asarray(metrics.participated), _network(state, prunable)
    reached = received(present, np.asarray(metrics.sent.client_ids))
    names, storages = zip(*storage_models.STORAGE.items(), strict=True)
    bits = _charge(_transfers(metrics, present, reached), network.leaves, storages)
    charged = dict(zip(names, bits, strict=True))
    plain, num_prunable = charged["values"], network.num_prunable
    num_masks = int(np.asarray(metrics.sent.num_masks)[reached].sum(dtype=np.int64))
    own = [message["masks"] for message in metrics.sent.up.values() if "masks" in message]
    num_own = sum(int(np.count_nonzero(_travels(field, present))) for field in own)
    charged["values_and_bitmaps"] = PublishedBits(
        plain.uplink + num_own * num_prunable, plain.downlink + num_masks * num_prunable
    )
    return charged


def charge_storage(
    metrics: RoundMetrics, state: RoundState, storage: storage_models.StorageFn
) -> PublishedBits:
    """Charge every transfer of a model, or of a delta, by a formula of what is live in it."""
    present = np.asarray(metrics.participated)
    reached = received(present, np.asarray(metrics.sent.client_ids))
    leaves = messages.specs("params", state.params)
    return _charge(_transfers(metrics, present, reached), leaves, (storage,))[0]


def num_sent(metrics: RoundMetrics, field: str) -> list[int]:
    """Count by leaf what all clients sent of a reply's field with positions; [] for nothing."""
    found = metrics.sent.up.get("reply", {}).get(field)
    if found is None or isinstance(found.sent_counts, tuple):
        return []
    who = _travels(found, np.asarray(metrics.participated))
    return np.asarray(found.sent_counts, np.int64)[who].sum(axis=0).tolist()


def _transfers(
    metrics: RoundMetrics, present: np.ndarray, reached: np.ndarray
) -> tuple[_Frozen, _Frozen]:
    """Tell what is live in each delta from a client and in each model to one: ``[m, L]``."""
    down = np.asarray(metrics.num_downloaded)[reached]
    up = np.asarray(metrics.num_uploaded)[present]
    return _freeze(up), _freeze(down.reshape(-1, down.shape[-1]))


@functools.lru_cache(maxsize=_ROUNDS)
def _charge(
    transfers: tuple[_Frozen, _Frozen],
    leaves: tuple[Spec, ...],
    storages: tuple[storage_models.StorageFn, ...],
) -> tuple[PublishedBits, ...]:
    """Charge transfers both ways by each formula; what carries no model is none."""
    shapes = [leaf.shape for leaf in leaves]
    models = [collections.Counter(map(tuple, _thaw(rows).tolist())) for rows in transfers]

    def charge(storage: storage_models.StorageFn, models: collections.Counter[Counts]) -> int:
        return sum(n * storage(kept, shapes) for kept, n in models.items() if any(kept))

    return tuple(PublishedBits(*(charge(fn, both) for both in models)) for fn in storages)


def message_bits(plans: Sequence[Plan]) -> LinkBits:
    """Sum up a message by kind."""
    kinds = dict.fromkeys(LinkBits._fields, 0)
    kinds["framing"] = wire_format.frame_bytes(len(plans))
    for plan, length in zip(plans, wire_format.measure(plans), strict=True):
        field = plan.name.split("/", 1)[0]
        kinds["framing"] += length.header
        kinds["masks" if field == "masks" else "indices"] += length.positions
        kinds[KINDS.get(field, "values")] += length.values
    return LinkBits(**{name: 8 * num_bytes for name, num_bytes in kinds.items()})


def _lengths(
    sent: Mapping[str, Mapping[str, FieldLength]],
    state: RoundState,
    network: _Network,
    coder: _Coder,
    who: np.ndarray,
) -> Sequence[LinkBits]:
    """Charge each slot's messages in one direction; nothing for slots that have none."""
    num_slots = len(who)
    lengths = [
        _by_slot(
            tuple(_column(name, fields[name], state, network, who) for name in sorted(fields)),
            coder if coder.message in ("", message) else None,
            num_slots,
        )
        for message, fields in sent.items()
    ]
    if len(lengths) == 1:
        return lengths[0]
    return [_sum(of_slot) for of_slot in zip([NOTHING] * num_slots, *lengths, strict=True)]


@functools.lru_cache(maxsize=_ROUNDS)
def _by_slot(
    columns: tuple[_Column, ...], coder: _Coder | None, num_slots: int
) -> tuple[LinkBits, ...]:
    """Charge a message to or from every slot; once, as long as none of its counts changes."""
    if not columns:
        return (NOTHING,) * num_slots
    cases = zip(*(_cells(column, num_slots) for column in columns), strict=True)

    def part(column: _Column, counts: Any) -> _Part:
        live, sent = counts
        payloads = None
        if coder is not None and column.name == coder.field and sent is None:
            payloads = tuple(map(coder.payload, live))
            if coder.shaped is not None:
                payloads = tuple(map(coder.shaped, live, (leaf.shape for leaf in column.leaves)))
        return _Part(column.leaves, live, sent, payloads)

    seen: dict[Any, LinkBits] = {}
    lengths = []
    for case in cases:
        if case not in seen:
            fields = (pair for pair in zip(columns, case, strict=True) if pair[1] is not None)
            seen[case] = _message(tuple(part(*field) for field in fields))
        lengths.append(seen[case])
    return tuple(lengths)


@functools.lru_cache(maxsize=4096)
def _message(parts: tuple[_Part, ...]) -> LinkBits:
    """Charge a message; one without fields is not sent."""
    plans = []
    for leaves, live_counts, sent_counts, payloads in parts:
        if payloads is not None:
            plans += messages.plan_delta(leaves, live_counts or (), payloads)
        elif sent_counts is not None and all(leaf.dtype == headers.BOOL for leaf in leaves):
            if live_counts is None:
                plans += messages.plan_masks(leaves, sent_counts)
            else:
                plans += messages.plan_places(leaves, live_counts, sent_counts)
        elif sent_counts is not None:
            places = live_counts or [math.prod(leaf.shape) for leaf in leaves]
            plans += messages.plan_pairs(leaves, places, sent_counts)
        elif live_counts is not None:
            plans += messages.plan_values(leaves, live_counts)
        else:
            plans += messages.plan_whole(leaves)
    return message_bits(plans) if parts else NOTHING


def _column(
    name: str, field: FieldLength, state: RoundState, network: _Network, who: np.ndarray
) -> _Column:
    """Take a field's counts off it; those of slots not in `who` may be anything."""
    sent_counts, template = field.sent_counts, field.template
    if not isinstance(template, tuple) or template:
        specs = messages.specs(name, template)
        leaves = tuple(spec._replace(shape=spec.shape[1:]) for spec in specs)
    elif name == "masks":
        leaves = network.masks
        sent_counts = np.asarray(sent_counts)[..., np.asarray(network.flags)]
    else:
        params, own = state.params, live_weights.without(state.model_state)
        leaves = messages.specs(name, own if name == "model_state" else params)
    slots = _travels(field, who)
    counts = (
        None if isinstance(n, tuple) else _freeze(n) for n in (field.live_counts, sent_counts)
    )
    return _Column(name, leaves, None if slots.all() else _freeze(slots), *counts)


def _travels(field: FieldLength, who: np.ndarray) -> np.ndarray:
    """Mark those of some slots to or from which a field travels."""
    return who if isinstance(field.clients, tuple) else np.asarray(field.clients) & who


def _cells(column: _Column, num_slots: int) -> Sequence[tuple[Counts | None, Counts | None] | None]:
    """Read both counts of a field for each slot; None for slots that it is not for."""
    rows = (_rows(counts, num_slots) for counts in (column.live_counts, column.sent_counts))
    here = [True] * num_slots if column.clients is None else _thaw(column.clients).tolist()
    cells = zip(zip(*rows, strict=True), here, strict=True)
    return [both if is_here else None for both, is_here in cells]


def _rows(counts: _Frozen | None, num_slots: int) -> Sequence[Counts | None]:
    """Read counts as Python integers, slot by slot; None where nothing is said."""
    if counts is None:
        return [None] * num_slots
    rows = _thaw(counts).tolist()
    return [tuple(rows)] * num_slots if len(counts.shape) == 1 else list(map(tuple, rows))


def _freeze(counts: Any) -> _Frozen:
    """Make of an array what can be looked up."""
    array = np.asarray(counts)
    return _Frozen(array.shape, array.astype(np.int64).tobytes())


def _thaw(counts: _Frozen) -> np.ndarray:
    """Undo `_freeze`."""
    return np.frombuffer(counts.data, np.int64).reshape(counts.shape)


@functools.lru_cache(maxsize=2)
def _count_masks(leaves: tuple[Spec, ...], packed: tuple[bytes, ...]) -> LinkBits:
    """Plan masks as the encoder would; once for each version, as masks rarely change."""
    return message_bits(wire_format.plan(messages.unpack_masks(leaves, packed)))


def _network(state: RoundState, prunable: PrunableFn) -> _Network:
    """Describe the parameters and their masks."""
    leaves, structure = jax.tree.flatten(state.params)
    shapes = tuple((tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in leaves)
    return _describe(structure, shapes, prunable)


@functools.lru_cache(maxsize=64)
def _describe(structure: Any, shapes: tuple[Any, ...], prunable: PrunableFn) -> _Network:
    """Describe a network once, for all its rounds."""
    params = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    leaves = messages.specs("params", params)
    flags = tuple(masks_lib.prunable_leaves(params, prunable))
    that_travel = tuple(
        Spec(f"masks{leaf.name.removeprefix('params')}", headers.BOOL, leaf.shape)
        for leaf, flag in zip(leaves, flags, strict=True)
        if flag
    )
    return _Network(leaves, flags, that_travel, sum(math.prod(leaf.shape) for leaf in that_travel))


def _sum(parts: Iterable[LinkBits]) -> LinkBits:
    """Add bits up by kind."""
    return LinkBits(*map(sum, zip(NOTHING, *parts, strict=True)))
