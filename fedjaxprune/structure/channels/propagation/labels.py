"""What the walk knows of an array: whose channels its entries are, and when they are zero.

Every index of every axis of every parameter is an *atom*. An array in the network has labels: a
label says, for each entry, to which atom it belongs, and whether it is zero once that atom's
channel is pruned. What a network adds, multiplies or contracts entry by entry belongs together:
atoms are merged into classes, and a class is one channel, wherever it appears.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Label(NamedTuple):
    """Whose channel each entry of an array is, along some of its axes.

    Both arrays have as many axes as the array, of size 1 where they do not vary.
    """

    ids: np.ndarray  # atom of each entry, -1 for none
    zero: np.ndarray  # whether the entry is zero when the atom's channel is pruned


class Value(NamedTuple):
    """An array of the network."""

    shape: tuple[int, ...]
    labels: tuple[Label, ...] = ()  # several vary along different axes (a kernel's in and out)
    varies: bool = False  # whether it depends on the network's inputs, not on parameters alone
    const: float | None = None  # the number that all of its entries are
    # Leaves that it is made of since the last contraction, as ``(leaf, axis)``; for one that
    # varies, the filters that made it.
    sources: frozenset[tuple[int, int]] = frozenset()


class Book(NamedTuple):
    """What the walk writes down; the only mutable thing in it."""

    parents: list[int]  # of each atom, for merging; grows as atoms are made
    owners: list[tuple[int, int, int]]  # ``(leaf, axis, index)`` of each atom
    # Of ``(leaf, axis)``: ``"filter"`` makes channels, ``"input"`` reads them.
    roles: dict[tuple[int, int], str]
    # Of a filter: the leaves that act on its output before it meets another's.
    attached: dict[tuple[int, int], set[tuple[int, int]]]
    # Each ``(atom, why)``: where a pruned channel may be something else than zero; where a channel
    # that is not zero enters another's computation; and channels that are not the network's own to
    # remove.
    leaks: set[tuple[int, str]]
    mixes: set[tuple[int, str]]
    fixed: set[tuple[int, str]]


def new_book() -> Book:
    """Make a book with nothing in it."""
    return Book([], [], {}, {}, set(), set(), set())


def new_value(book: Book, leaf: int, shape: tuple[int, ...], *, is_param: bool) -> Value:
    """Make the value of a leaf, with an atom for every index of every axis."""
    labels = []
    for axis, size in enumerate(shape):
        if size < 2:  # a single entry is no choice
            continue
        first = len(book.parents)
        book.parents.extend(range(first, first + size))
        book.owners.extend((leaf, axis, i) for i in range(size))
        ids = np.arange(first, first + size).reshape(
            [size if i == axis else 1 for i in range(len(shape))]
        )
        labels.append(Label(ids, np.full(ids.shape, is_param)))
    sources = frozenset((leaf, axis) for axis, size in enumerate(shape) if size > 1)
    return Value(shape, tuple(labels), sources=sources if is_param else frozenset())


def find(book: Book, atom: int) -> int:
    """Find the class of an atom."""
    root = atom
    while book.parents[root] != root:
        root = book.parents[root]
    while book.parents[atom] != root:
        book.parents[atom], atom = root, book.parents[atom]
    return root


def unify(book: Book, first: np.ndarray, second: np.ndarray) -> None:
    """Merge the classes of atoms that stand at the same places."""
    both = (first >= 0) & (second >= 0)
    pairs = np.unique(np.stack(np.broadcast_arrays(first, second))[:, both], axis=1)
    for a, b in pairs.T:
        book.parents[find(book, int(a))] = find(book, int(b))


def note(entries: set[tuple[int, str]], ids: np.ndarray, why: str) -> None:
    """Write down the same about all atoms of `ids`."""
    entries.update((int(atom), why) for atom in np.unique(ids) if atom >= 0)


def varying(label: Label) -> set[int]:
    """List the axes along which a label varies."""
    return {axis for axis, size in enumerate(label.ids.shape) if size > 1}


def shrink(label: Label) -> Label:
    """Cut axes along which nothing changes down to size 1."""
    ids, zero = label
    for axis in range(ids.ndim):
        if ids.shape[axis] > 1:
            first = [part[(slice(None),) * axis + (slice(0, 1),)] for part in (ids, zero)]
            if (ids == first[0]).all() and (zero == first[1]).all():
                ids, zero = first
    return Label(ids, zero)


def partner(label: Label, others: Iterable[Label], axes: Sequence[tuple[int, int]]) -> Label | None:
    """Choose, of the `others`, the label that goes with this one along paired axes.

    Where several could, it is the one that cuts the axis into the same channels.
    """
    mine = varying(label)
    candidates = [
        other for other in others if any(a in mine and b in varying(other) for a, b in axes)
    ]
    if len(candidates) > 1:
        same = [other for other in candidates if _same_cut(label.ids, other.ids)]
        candidates = same or candidates
    return candidates[0] if candidates else None


def _same_cut(first: np.ndarray, second: np.ndarray) -> bool:
    first, second = first.ravel(), second.ravel()
    if first.shape != second.shape:
        return False
    ours, theirs = (np.unique(ids, return_inverse=True)[1] for ids in (first, second))
    pairs = len(np.unique(np.stack([ours, theirs]), axis=1).T)
    return pairs == ours.max(initial=-1) + 1 == theirs.max(initial=-1) + 1


def join(
    book: Book, values: Sequence[Value], shape: tuple[int, ...], *, needs_all: bool
) -> list[Label]:
    """Merge the labels of arrays that meet entry by entry, all of a shape or scalar.

    If it `needs_all`, the result is zero only where all are (a sum), else where one is (a product).
    """
    joined: list[Label] = []
    same = [(axis, axis) for axis in range(len(shape))]
    pending = [list(value.labels) if len(value.shape) == len(shape) else [] for value in values]
    for i in range(len(values)):
        while pending[i]:
            label = pending[i].pop(0)
            ids, zero = label.ids, label.zero
            for j, other in enumerate(values):
                if j == i:
                    continue
                match = partner(Label(ids, zero), pending[j], same) if j > i else None
                if match is None:
                    silent = np.asarray(other.const == 0.0)
                else:
                    pending[j] = [each for each in pending[j] if each is not match]
                    unify(book, ids, match.ids)
                    silent = match.zero
                    ids = np.where(ids >= 0, ids, match.ids)
                zero = zero & silent if needs_all else zero | silent
            joined.append(Label(*(np.array(x) for x in np.broadcast_arrays(ids, zero))))
    return joined


def give_up(book: Book, labels: Sequence[Label], why: str) -> None:
    """Write down that nothing is known of these channels from here on."""
    for label in labels:
        note(book.leaks, label.ids, why)
        note(book.mixes, label.ids, why)


def set_role(book: Book, label: Label, role: str) -> None:
    """Give the leaves of a label a role; who makes channels stays a filter."""
    for atom in np.unique(label.ids):
        if atom >= 0:
            place = book.owners[int(atom)][:2]
            if book.roles.get(place) != "filter":
                book.roles[place] = role


def sources_of(values: Sequence[Value]) -> frozenset[tuple[int, int]]:
    """Unite what made the values: those that vary, if any does."""
    alive = [value for value in values if value.varies] or list(values)
    return frozenset().union(*(value.sources for value in alive))


def map_labels(value: Value, shape: Any, function: Callable[[np.ndarray], np.ndarray]) -> Value:
    """Move ids and zeros alike."""
    labels = tuple(Label(*(function(x) for x in label)) for label in value.labels)
    return value._replace(shape=tuple(shape), labels=labels)


def placed(label: Label, places: Mapping[int, int], ndim: int) -> Label:
    """Put axes to their places in an array of more axes; the rest of the label is of size 1."""
    order = sorted(places, key=places.__getitem__)

    def move(x: np.ndarray) -> np.ndarray:
        dims = [1] * ndim
        for axis, place in places.items():
            dims[place] = x.shape[axis]
        rest = (axis for axis in range(x.ndim) if axis not in places)
        return x.transpose(*order, *rest).reshape(dims)

    return Label(*map(move, label))
