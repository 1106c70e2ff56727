"""What a round put on the wire: the length of its messages, and what papers would have charged.

The lengths are those that `wire.encode` writes (the tests do write them). A stage says which fields
its messages have (`accounts.Field`), and nothing else is charged. All lengths but one follow from
counts that the round reports; the masks in force, whose coding looks at positions, are counted for
real on the host, once for each version, from the bits that the round hands over. The fields of a
message travel in the order of their names.

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

from fedjaxprune import masks as masks_lib
from fedjaxprune.accounts import ClientBits, Field, LinkBits, ModelledBits, Payload, Traffic
from fedjaxprune.base import PrunableFn, RoundMetrics, RoundState
from fedjaxprune.costs import formulas, headers, messages, wire
from fedjaxprune.costs.headers import Plan
from fedjaxprune.costs.messages import Spec

FormulaFn = Callable[[RoundMetrics, RoundState], ModelledBits]
PayloadFn = Callable[[int], Payload]
Counts = tuple[int, ...]  # by leaf

# Of which kind a field's values are; all others are values.
KINDS: Mapping[str, str] = {
    "model_state": "statistics",
    "statistics": "statistics",
    messages.WEIGHT: "framing",
    messages.SEED: "positions",
}
NOTHING = LinkBits(values=0, positions=0, masks=0, statistics=0, framing=0)


class _Part(NamedTuple):
    """One field of one message, all in Python integers."""

    leaves: tuple[Spec, ...]
    known: Counts | None
    pairs: Counts | None
    payloads: tuple[Payload, ...] | None


def account(
    metrics: RoundMetrics,
    state: RoundState,
    *,
    payload: PayloadFn,
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
    uninformed = (np.asarray(sent.num_masks) > 0) & reached
    leaves = messages.specs("params", state.params)
    flags = masks_lib.prunable_leaves(state.params, prunable)

    in_force = NOTHING
    if len(sent.packed_masks) and uninformed.any():
        in_force = _masks_in_force(_prunable(leaves, flags), sent.packed_masks)
    going_down = _lengths(sent.down, state, flags, payload, reached)
    going_up = _lengths(sent.up, state, flags, payload, present)
    informed = {bits: _sum([bits, in_force]) for bits in set(going_down)}

    uplink, downlink = [], []
    groups: dict[tuple[int, int], list[int]] = {}
    for slot in np.flatnonzero(reached).tolist():
        here = going_down[slot]
        here = informed[here] if uninformed[slot] else here
        there = going_up[slot]
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

    Those of `formulas.STORAGE` charge each transfer of a model by what is live;
    `values_and_bitmaps` charges 32 bits for a live value and one for each prunable weight of a mask
    that travels, and is how FedDIP's specification is charged.
    """
    reached = received(np.asarray(metrics.present), np.asarray(metrics.sent.client_ids))
    flags = masks_lib.prunable_leaves(state.params, prunable)
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)]
    num_prunable = sum(size for size, flag in zip(sizes, flags, strict=True) if flag)
    charged = {
        name: charge_storage(metrics, state, storage) for name, storage in formulas.STORAGE.items()
    }
    plain = charged["values"]
    num_masks = int(np.asarray(metrics.sent.num_masks)[reached].sum(dtype=np.int64))
    charged["values_and_bitmaps"] = ModelledBits(
        plain.uplink + int(metrics.num_personal_masks) * num_prunable,
        plain.downlink + num_masks * num_prunable,
    )
    return charged


def charge_storage(
    metrics: RoundMetrics, state: RoundState, storage: formulas.StorageFn
) -> ModelledBits:
    """Charge every transfer of a model, or of a delta, by a formula of what is live in it."""
    present = np.asarray(metrics.present)
    reached = received(present, np.asarray(metrics.sent.client_ids))
    shapes = tuple(tuple(leaf.shape) for leaf in jax.tree.leaves(state.params))
    up = collections.Counter(_rows(metrics.uplink_kept, present))
    both = [
        sum(times * _storage(storage, kept, shapes) for kept, times in transfers.items())
        for transfers in (up, _downloads(metrics, reached))
    ]
    return ModelledBits(*both)


def _downloads(metrics: RoundMetrics, reached: np.ndarray) -> collections.Counter[Counts]:
    """Count the models that were sent to clients, by what is live in them."""
    kept = np.asarray(metrics.downlink_kept)
    if kept.ndim == 1:
        return collections.Counter({tuple(kept.tolist()): int(np.count_nonzero(reached))})
    return collections.Counter(map(tuple, kept[reached].reshape(-1, kept.shape[-1]).tolist()))


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


def _lengths(
    sent: Mapping[str, Mapping[str, Field]],
    state: RoundState,
    flags: Sequence[bool],
    payload: PayloadFn,
    who: np.ndarray,
) -> list[LinkBits]:
    """Charge each slot's messages in one direction; nothing for slots that have none."""
    totals = [NOTHING] * len(who)
    for fields in sent.values():
        names = sorted(fields)
        leaves = [_leaves(name, fields[name], state, flags) for name in names]
        known = [_by_slot(fields[name].known, len(who)) for name in names]
        pairs = [_by_slot(_flagged(name, fields[name], flags), len(who)) for name in names]
        slots = [_by_slot(fields[name].slots, len(who)) for name in names]
        seen: dict[Any, LinkBits] = {}
        for slot in np.flatnonzero(who).tolist():
            case = tuple(
                None if here[slot] is False else (those[slot], chosen[slot])
                for here, those, chosen in zip(slots, known, pairs, strict=True)
            )
            if case not in seen:
                seen[case] = _message(
                    tuple(
                        _Part(
                            specs,
                            *counts,
                            tuple(map(payload, counts[0])) if name == "delta" else None,
                        )
                        for name, specs, counts in zip(names, leaves, case, strict=True)
                        if counts is not None
                    )
                )
            totals[slot] = _sum([totals[slot], seen[case]])
    return totals


@functools.lru_cache(maxsize=4096)
def _message(parts: tuple[_Part, ...]) -> LinkBits:
    """Charge a message; one without fields is not sent."""
    plans = []
    for part in parts:
        if part.payloads is not None:
            plans += messages.plan_delta(part.leaves, part.known or (), part.payloads)
        elif part.pairs is not None and all(leaf.dtype == headers.BOOL for leaf in part.leaves):
            plans += messages.plan_masks(part.leaves, part.pairs)
        elif part.pairs is not None:
            places = part.known or [math.prod(leaf.shape) for leaf in part.leaves]
            plans += messages.plan_pairs(part.leaves, places, part.pairs)
        elif part.known is not None:
            plans += messages.plan_values(part.leaves, part.known)
        else:
            plans += messages.plan_whole(part.leaves)
    return message_bits(plans) if parts else NOTHING


def _leaves(name: str, field: Field, state: RoundState, flags: Sequence[bool]) -> tuple[Spec, ...]:
    """Describe the tensors of a field."""
    if not isinstance(field.like, tuple) or field.like:
        those = messages.specs(name, field.like)
        return tuple(spec._replace(shape=spec.shape[1:]) for spec in those)
    if name == "masks":
        return _prunable(messages.specs("params", state.params), flags)
    return messages.specs(name, state.model_state if name == "model_state" else state.params)


def _flagged(name: str, field: Field, flags: Sequence[bool]) -> Any:
    """Take the counts of a field's pairs, of masks those of the leaves that travel."""
    if name == "masks" and isinstance(field.like, tuple) and not field.like:
        return np.asarray(field.pairs)[..., np.asarray(flags)]
    return field.pairs


def _by_slot(counts: Any, num_slots: int) -> list[Any]:
    """Read what is said by slot, or for all of them; None where nothing is said."""
    if isinstance(counts, tuple):
        return [None] * num_slots
    rows = np.asarray(counts)
    if rows.dtype == np.bool_:
        return rows.tolist()
    if rows.ndim == 1:
        return [tuple(rows.tolist())] * num_slots
    return [tuple(row) for row in rows.tolist()]


def _masks_in_force(leaves: tuple[Spec, ...], packed: Sequence[Any]) -> LinkBits:
    """Charge the message of the masks in force."""
    return _count_masks(leaves, tuple(np.asarray(bits).tobytes() for bits in packed))


@functools.lru_cache(maxsize=2)
def _count_masks(leaves: tuple[Spec, ...], packed: tuple[bytes, ...]) -> LinkBits:
    """Plan masks as the encoder would; once for each version, as masks rarely change."""
    return message_bits(wire.plan(messages.unpack_masks(leaves, packed)))


@functools.lru_cache(maxsize=4096)
def _storage(storage: formulas.StorageFn, kept: Counts, shapes: tuple[tuple[int, ...], ...]) -> int:
    """Charge one transfer by a formula; what carries no model is none."""
    return storage(kept, shapes) if any(kept) else 0


def _prunable(leaves: Iterable[Spec], flags: Iterable[bool]) -> tuple[Spec, ...]:
    """Describe the masks that travel."""
    return tuple(
        Spec(f"masks/{leaf.name.split('/', 1)[1]}", headers.BOOL, leaf.shape)
        for leaf, flag in zip(leaves, flags, strict=True)
        if flag
    )


def _rows(counts: Any, which: np.ndarray) -> list[tuple[int, ...]]:
    """Read rows of counts as Python integers."""
    return [tuple(row) for row in np.asarray(counts)[which].tolist()]


def _sum(parts: Iterable[LinkBits]) -> LinkBits:
    """Add bits up by kind."""
    return LinkBits(*map(sum, zip(NOTHING, *parts, strict=True)))
