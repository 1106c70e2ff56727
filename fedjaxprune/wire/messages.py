"""What a round puts on the wire, as messages of named tensors.

`plan_*` needs counts and shapes and is what the ledger charges; the functions without `plan_` need
the data and give what `wire_format.encode` takes. Both name and order the tensors alike, so that
their lengths are equal; the tests encode the messages of every method and see that they are.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjaxprune import trees
from fedjaxprune.traffic import Payload
from fedjaxprune.wire import codings, headers
from fedjaxprune.wire import format as wire_format
from fedjaxprune.wire.headers import Plan

WEIGHT, SEED = "weight", "seed"
_SEED_PLAN = Plan(SEED, np.dtype("uint32"), (), None, codings.Coding(codings.ALL))


class Spec(NamedTuple):
    """A tensor that is not there: its name ``field/path`` and what it looks like."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]


def specs(field: str, tree: Any) -> tuple[Spec, ...]:
    """Describe the leaves of a tree (of arrays or of shapes) as tensors of a message."""
    leaves, structure = jax.tree.flatten(tree)
    return _specs(field, structure, tuple((leaf.dtype, leaf.shape) for leaf in leaves))


@functools.lru_cache(maxsize=1024)
def _specs(field: str, structure: Any, looks: tuple[Any, ...]) -> tuple[Spec, ...]:
    """Describe a tree's leaves; once, as every round's messages have the same."""
    tree = jax.tree.unflatten(structure, range(structure.num_leaves))
    return tuple(
        Spec(_name(field, path), np.dtype(dtype), tuple(shape))
        for path, (dtype, shape) in zip(trees.paths(tree), looks, strict=True)
    )


def plan_values(leaves: Sequence[Spec], kept: Sequence[int]) -> list[Plan]:
    """Plan the entries under masks that the receiver knows, given how many each leaf keeps."""
    return [
        headers.plan_counts(*leaf, num_known=_known(leaf, n))
        for leaf, n in zip(leaves, kept, strict=True)
    ]


def plan_delta(
    leaves: Sequence[Spec], kept: Sequence[int], payloads: Sequence[Payload]
) -> list[Plan]:
    """Plan what an uplink sends of each leaf, of which `kept` entries may travel."""
    plans = []
    for leaf, n, payload in zip(leaves, kept, payloads, strict=True):
        by_seed = payload.indices == "from_seed"
        plans.append(
            headers.plan_counts(
                *leaf._replace(dtype=np.dtype("uint16") if payload.level_bits else leaf.dtype),
                num_known=_known(leaf, payload.num_values if by_seed else n),
                num_chosen=payload.num_values if payload.indices == "explicit" else None,
                level_bits=payload.level_bits,
                num_scales=payload.num_scales,
            )
        )
    is_seeded = any(p.indices == "from_seed" and p.num_values for p in payloads)
    return [*plans, _SEED_PLAN] if is_seeded else plans


def plan_whole(leaves: Iterable[Spec]) -> list[Plan]:
    """Plan tensors that travel dense, whatever they hold (statistics, gradients)."""
    return [headers.plan_counts(*leaf) for leaf in leaves]


def plan_pairs(leaves: Sequence[Spec], places: Sequence[int], counts: Sequence[int]) -> list[Plan]:
    """Plan pairs of position and value, of leaves that have any.

    Args:
      leaves: what they belong to.
      places: of each leaf, how many entries the receiver knows that pairs may be of.
      counts: of each leaf, how many pairs there are.
    """
    return [
        headers.plan_counts(*leaf, num_known=_known(leaf, room), num_chosen=count)
        for leaf, room, count in zip(leaves, places, counts, strict=True)
        if count
    ]


def plan_places(leaves: Sequence[Spec], places: Sequence[int], counts: Sequence[int]) -> list[Plan]:
    """Plan positions without values: bits of the entries that they may be of, in a row.

    Args:
      leaves: what they belong to, of bools.
      places: of each leaf, how many entries the receiver knows that positions may be of.
      counts: of each leaf, how many positions there are; a leaf without any stays away.
    """
    return [
        headers.plan_counts(leaf.name, headers.BOOL, (room,), num_chosen=count)
        for leaf, room, count in zip(leaves, places, counts, strict=True)
        if count
    ]


def plan_masks(leaves: Sequence[Spec], kept: Sequence[int]) -> list[Plan]:
    """Plan masks in codings whose length follows from how many entries they keep."""
    return [
        headers.plan_counts(leaf.name, headers.BOOL, leaf.shape, num_chosen=n)
        for leaf, n in zip(leaves, kept, strict=True)
    ]


def values(field: str, tree: Any, masks: Any) -> dict[str, wire_format.Part]:
    """Make the part of a message that `plan_values` plans."""
    return {
        name: wire_format.kept(leaf, _known_mask(mask))
        for (name, leaf), mask in zip(_named(field, tree), _leaves(masks), strict=True)
    }


def delta(
    tree: Any, masks: Any, payloads: Sequence[Payload], *, seed: int | None
) -> dict[str, wire_format.Part]:
    """Make the part of a message that `plan_delta` plans, from a delta that left an uplink.

    Positions are those of the entries that are not zero, filled up with the first zeros where an
    uplink sent zeros. Levels are read off the values: 1 bit is a sign, more bits are evenly spaced
    between the smallest and the largest value.

    Args:
      tree: the delta, zero where nothing was sent.
      masks: entries that may travel, which the receiver knows.
      payloads: what the uplink says it sends of each leaf.
      seed: of the positions, for uplinks that draw them; None for others.
    """
    message = {}
    rows = zip(_named("delta", tree), _leaves(masks), payloads, strict=True)
    for (name, leaf), mask, payload in rows:
        known, bits = _known_mask(mask), payload.level_bits
        if payload.indices == "from_seed":
            chosen = _first(leaf, mask, payload.num_values)
            message[name] = wire_format.kept(leaf, _known_mask(chosen))
        elif payload.indices == "explicit":
            chosen = _first(leaf, mask, payload.num_values)
            message[name] = wire_format.pairs(leaf, chosen, known=known)
        elif bits:
            levels, scales = _quantized(leaf, mask, payload)
            message[name] = wire_format.levels(levels, bits=bits, scales=scales, known=known)
        else:
            message[name] = wire_format.kept(leaf, known)
    if any(p.indices == "from_seed" and p.num_values for p in payloads):
        message[SEED] = wire_format.kept(np.asarray(seed, np.uint32), None)
    return message


def whole(field: str, tree: Any) -> dict[str, wire_format.Part]:
    """Make the part of a message that `plan_whole` plans."""
    return {name: wire_format.kept(leaf, None) for name, leaf in _named(field, tree)}


def pairs(field: str, tree: Any, places: Any, *, chosen: Any = None) -> dict[str, wire_format.Part]:
    """Make the part of a message that `plan_pairs` plans.

    Args:
      field: the field's name.
      tree: the values.
      places: masks of the entries that pairs may be of.
      chosen: masks of the entries that pairs are of; None: those that are not zero.
    """
    sent = [leaf != 0 for leaf in _leaves(tree)] if chosen is None else _leaves(chosen)
    rows = zip(_named(field, tree), _leaves(places), sent, strict=True)
    return {
        name: wire_format.pairs(leaf, marks, known=_known_mask(place))
        for (name, leaf), place, marks in rows
        if np.any(marks)
    }


def places(field: str, tree: Any, known: Any) -> dict[str, wire_format.Part]:
    """Make the part of a message that `plan_places` plans: where entries are not zero.

    Args:
      field: the field's name.
      tree: zero where nothing is named.
      known: masks of the entries that may be named, which the receiver holds.
    """
    rows = zip(_named(field, tree), _leaves(known), strict=True)
    return {
        name: wire_format.counted(leaf[mask] != 0) for (name, leaf), mask in rows if np.any(leaf)
    }


def weight(value: Any) -> dict[str, wire_format.Part]:
    """Make the number of examples that a client reports: one float32."""
    return {WEIGHT: wire_format.kept(np.asarray(value, np.float32), None)}


def personal_masks(masks: Any, flags: Sequence[bool]) -> dict[str, wire_format.Part]:
    """Make the message of a client's own masks that `plan_masks` plans, of the prunable leaves."""
    shown = masks_in_force(masks, flags)
    return {name: wire_format.counted(leaf) for name, leaf in shown.items()}


def masks_in_force(masks: Any, flags: Sequence[bool]) -> dict[str, np.ndarray]:
    """Make the message that brings a client the masks of the prunable leaves, as short as can be.

    Its length depends on the positions, so that there is no plan of it without the data.
    """
    return {
        name: leaf for (name, leaf), flag in zip(_named("masks", masks), flags, strict=True) if flag
    }


def unpack_masks(leaves: Sequence[Spec], packed: Sequence[bytes]) -> Mapping[str, np.ndarray]:
    """Read the masks that the device packed to bits: the message of `masks_in_force`."""
    message = {}
    for leaf, bits in zip(leaves, packed, strict=True):
        size = int(np.prod(leaf.shape, dtype=np.int64))
        flat = np.unpackbits(np.frombuffer(bits, np.uint8), count=size)
        message[leaf.name] = flat.view(np.bool_).reshape(leaf.shape)
    return message


def _name(field: str, path: str) -> str:
    """Name a tensor; a field may be one tensor."""
    return f"{field}/{path}" if path else field


def _named(field: str, tree: Any) -> list[tuple[str, np.ndarray]]:
    """List a tree's leaves, on the host, with their names."""
    names = [_name(field, path) for path in trees.paths(tree)]
    return list(zip(names, _leaves(tree), strict=True))


def _leaves(tree: Any) -> list[np.ndarray]:
    """List a tree's leaves on the host."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def _known(leaf: Spec, kept: int) -> int | None:
    """Name no mask where all entries are kept."""
    return None if kept == int(np.prod(leaf.shape, dtype=np.int64)) else kept


def _known_mask(mask: np.ndarray) -> np.ndarray | None:
    """Name no mask where all entries are kept."""
    return None if mask.all() else mask


def _first(leaf: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """Mark the entries that were sent: those that are not zero, then zeros, `count` in all."""
    order = np.argsort(~(leaf != 0).ravel() + 2 * ~mask.ravel(), kind="stable")
    chosen = np.zeros(leaf.size, np.bool_)
    chosen[order[:count]] = True
    return chosen.reshape(leaf.shape)


def _quantized(
    leaf: np.ndarray, mask: np.ndarray, payload: Payload
) -> tuple[np.ndarray, np.ndarray]:
    """Read levels and scales off quantized values."""
    sent = leaf[mask].astype(np.float64)
    if payload.num_scales == 0:
        return np.zeros(leaf.shape, np.uint16), np.zeros(0, np.float32)
    if payload.num_scales == 1:
        return (leaf >= 0).astype(np.uint16) * mask, np.array([np.abs(sent).max()], np.float32)
    low, high = sent.min(), sent.max()
    step = (high - low) / (2**payload.level_bits - 1)
    levels = np.rint((leaf.astype(np.float64) - low) / (step if step > 0 else 1.0))
    return np.where(mask, levels, 0).astype(np.uint16), np.array([low, high], np.float32)
