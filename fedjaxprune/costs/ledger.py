"""What a round put on the wire: the length of its messages, and what papers would have charged.

The lengths are those that `wire.encode` writes (the tests do write them). All but one follow from
counts that the round reports; the masks in force, whose coding looks at positions, are counted for
real on the host, once for each version, from the bits that the round hands over.

Who is charged: a client that took part, both ways, whether its message was finite or not; a client
that dropped out, for what it had received; filling, nothing. A client that dropped out counts as
not having kept the masks.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune.accounts import ClientBits, LinkBits, ModelledBits, Payload, Traffic
from fedjaxprune.base import PrunableFn, RoundMetrics, RoundState
from fedjaxprune.costs import formulas, headers, messages, wire
from fedjaxprune.costs.headers import Plan
from fedjaxprune.costs.messages import Spec

FormulaFn = Callable[[RoundMetrics, RoundState], ModelledBits]

# Of which kind a field's values are; all others are values.
KINDS: Mapping[str, str] = {
    "model_state": "statistics",
    messages.WEIGHT: "framing",
    messages.SEED: "positions",
}
NOTHING = LinkBits(values=0, positions=0, masks=0, statistics=0, framing=0)


def account(
    metrics: RoundMetrics,
    state: RoundState,
    *,
    payload: Callable[[int], Payload],
    prunable: PrunableFn,
    modelled: Mapping[str, FormulaFn],
) -> Traffic:
    """Charge a round.

    Args:
      metrics: of the round, on the host.
      state: of which only shapes and types are read.
      payload: of the uplink.
      prunable: which leaves' masks travel.
      modelled: formulas by name, beside those that fit every method (`charge_by_formula`).
    """
    sent, present = metrics.sent, np.asarray(metrics.present)
    ids = np.asarray(sent.client_ids)
    reached = received(present, ids)
    stale = np.asarray(sent.stale) & reached
    flags = masks_lib.prunable_leaves(state.params, prunable)
    leaves = messages.specs("params", state.params)

    broadcast = _broadcast(leaves, _ints(metrics.downlink_kept), _specs("model_state", state))
    masks = _masks_in_force(_prunable(leaves, flags), sent.packed_masks) if stale.any() else NOTHING
    renewed = _sum([broadcast, masks])
    going_up = _uplinks(metrics, leaves, flags, payload)

    uplink, downlink = [], []
    groups: dict[tuple[int, int], list[int]] = {}
    for slot in np.flatnonzero(reached).tolist():
        here = renewed if stale[slot] else broadcast
        there = going_up[slot] if present[slot] else NOTHING
        uplink.append(there)
        downlink.append(here)
        groups.setdefault((sum(there), sum(here)), []).append(int(ids[slot]))
    up, down = _sum(uplink), _sum(downlink)
    general = charge_by_formula(metrics, state, prunable=prunable)
    return Traffic(
        uplink_bits=sum(up),
        downlink_bits=sum(down),
        uplink=up,
        downlink=down,
        clients=tuple(
            ClientBits(bits[0], bits[1], tuple(sorted(members)))
            for bits, members in sorted(groups.items())
        ),
        modelled={**general, **{name: fn(metrics, state) for name, fn in modelled.items()}},
    )


def received(present: np.ndarray, client_ids: np.ndarray) -> np.ndarray:
    """Tell who was sent the broadcast: those present, and those that dropped out afterwards.

    Filling is told by an id below 0, or one that a present client or an earlier slot has.
    """
    _, first = np.unique(client_ids, return_index=True)
    is_first = np.zeros(len(client_ids), np.bool_)
    is_first[first] = True
    own = is_first & (client_ids >= 0) & ~np.isin(client_ids, client_ids[present])
    return present | own


def charge_by_formula(
    metrics: RoundMetrics, state: RoundState, *, prunable: PrunableFn
) -> dict[str, ModelledBits]:
    """Charge a round by every formula that fits every method.

    Those of `formulas.STORAGE` charge each transfer by what is live; `values_and_bitmaps` charges
    32 bits for a live value and one for each prunable weight of a mask that travels, and is how
    FedDIP's specification is charged.
    """
    present = np.asarray(metrics.present)
    reached = received(present, np.asarray(metrics.sent.client_ids))
    num_stale = int(np.count_nonzero(np.asarray(metrics.sent.stale) & reached))
    num_reached = int(np.count_nonzero(reached))
    shapes = tuple(tuple(leaf.shape) for leaf in jax.tree.leaves(state.params))
    flags = masks_lib.prunable_leaves(state.params, prunable)
    num_prunable = sum(math.prod(shape) for shape, f in zip(shapes, flags, strict=True) if f)
    going_up = collections.Counter(_rows(metrics.uplink_kept, present))
    down = _ints(metrics.downlink_kept)
    charged = {}
    for name in formulas.STORAGE:
        up = sum(times * _storage(name, kept, shapes) for kept, times in going_up.items())
        charged[name] = ModelledBits(up, num_reached * _storage(name, down, shapes))
    plain = charged["values"]
    charged["values_and_bitmaps"] = ModelledBits(
        plain.uplink + int(metrics.num_personal_masks) * num_prunable,
        plain.downlink + num_stale * num_prunable,
    )
    return charged


def message_bits(plans: Sequence[Plan]) -> LinkBits:
    """Sum up a message by kind."""
    kinds = dict.fromkeys(LinkBits._fields, 0)
    kinds["framing"] = wire.frame_bytes(len(plans))
    for plan, length in zip(plans, wire.measure(plans), strict=True):
        field = plan.name.split("/", 1)[0]
        of_values = KINDS.get(field, "values")
        kinds["framing"] += length.header
        kinds["masks" if field == "masks" else "positions"] += length.positions
        kinds[of_values] += length.values
    return LinkBits(**{name: 8 * num_bytes for name, num_bytes in kinds.items()})


def _uplinks(
    metrics: RoundMetrics,
    leaves: tuple[Spec, ...],
    flags: Sequence[bool],
    payload: Callable[[int], Payload],
) -> list[LinkBits]:
    """Charge each slot's messages to the server; only those of present clients mean anything."""
    sent = metrics.sent
    everyone = np.ones(len(metrics.present), np.bool_)
    kept = _rows(metrics.uplink_kept, everyone)
    fields = {name: np.asarray(is_sent).tolist() for name, is_sent in sent.fields.items()}
    whole = {name: messages.specs(name, sent.like[name]) for name in fields}
    whole = {name: tuple(_unstack(spec) for spec in those) for name, those in whole.items()}
    delta = tuple(spec._replace(name=f"delta/{spec.name.split('/', 1)[1]}") for spec in leaves)
    personal: list[tuple[int, ...]] = []
    if len(sent.personal_kept):
        mine = np.asarray(sent.personal_kept)[:, np.asarray(flags)]
        personal = _rows(mine, everyone)
    bits, seen = [], {}
    for slot, row in enumerate(kept):
        case = row, tuple(fields[name][slot] for name in fields), tuple(personal[slot : slot + 1])
        if case not in seen:
            extras = tuple(whole[name] for name in sorted(fields) if fields[name][slot])
            seen[case] = _delta(delta, row, tuple(map(payload, row)), extras)
            if personal:
                masks = _personal(_prunable(leaves, flags), personal[slot])
                seen[case] = _sum([seen[case], masks])
        bits.append(seen[case])
    return bits


@functools.lru_cache(maxsize=1024)
def _broadcast(
    leaves: tuple[Spec, ...], kept: tuple[int, ...], statistics: tuple[Spec, ...]
) -> LinkBits:
    """Charge the message that every client of the round receives."""
    return message_bits([*messages.plan_values(leaves, kept), *messages.plan_whole(statistics)])


@functools.lru_cache(maxsize=4096)
def _delta(
    leaves: tuple[Spec, ...],
    kept: tuple[int, ...],
    payloads: tuple[Payload, ...],
    extras: tuple[tuple[Spec, ...], ...],
) -> LinkBits:
    """Charge a client's message."""
    plans = messages.plan_delta(leaves, kept, payloads)
    for those in extras:
        plans.extend(messages.plan_whole(those))
    return message_bits([*plans, *messages.plan_weight()])


@functools.lru_cache(maxsize=4096)
def _personal(leaves: tuple[Spec, ...], kept: tuple[int, ...]) -> LinkBits:
    """Charge a client's message of its own masks."""
    return message_bits(messages.plan_personal_masks(leaves, kept))


def _masks_in_force(leaves: tuple[Spec, ...], packed: Sequence[Any]) -> LinkBits:
    """Charge the message of the masks in force."""
    return _count_masks(leaves, tuple(np.asarray(bits).tobytes() for bits in packed))


@functools.lru_cache(maxsize=2)
def _count_masks(leaves: tuple[Spec, ...], packed: tuple[bytes, ...]) -> LinkBits:
    """Plan masks as the encoder would; once for each version, as masks rarely change."""
    return message_bits(wire.plan(messages.unpack_masks(leaves, packed)))


@functools.lru_cache(maxsize=4096)
def _storage(name: str, kept: tuple[int, ...], shapes: tuple[tuple[int, ...], ...]) -> int:
    """Charge one transfer by a formula."""
    return formulas.STORAGE[name](kept, shapes)


def _prunable(leaves: Iterable[Spec], flags: Iterable[bool]) -> tuple[Spec, ...]:
    """Describe the masks that travel."""
    return tuple(
        Spec(f"masks/{leaf.name.split('/', 1)[1]}", headers.BOOL, leaf.shape)
        for leaf, flag in zip(leaves, flags, strict=True)
        if flag
    )


def _specs(field: str, state: RoundState) -> tuple[Spec, ...]:
    """Describe a field of the state."""
    return messages.specs(field, getattr(state, field))


def _unstack(spec: Spec) -> Spec:
    """Drop the leading axis of a tree that only tells shapes."""
    return spec._replace(shape=spec.shape[1:])


def _ints(row: Any) -> tuple[int, ...]:
    """Read counts as Python integers."""
    return tuple(np.asarray(row).tolist())


def _rows(counts: Any, which: np.ndarray) -> list[tuple[int, ...]]:
    """Read rows of counts as Python integers."""
    return [tuple(row) for row in np.asarray(counts)[which].tolist()]


def _sum(parts: Iterable[LinkBits]) -> LinkBits:
    """Add bits up by kind."""
    return LinkBits(*map(sum, zip(NOTHING, *parts, strict=True)))
