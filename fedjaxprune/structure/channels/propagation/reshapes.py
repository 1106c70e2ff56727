"""Rules of primitives that move entries about."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedjaxprune.structure import moves
from fedjaxprune.structure.channels.propagation import labels as labels_lib
from fedjaxprune.structure.channels.propagation.labels import Book, Label, Value


def broadcast(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Place axes among new ones."""
    del book
    shape, places = equation.params["shape"], equation.params["broadcast_dimensions"]
    labels = (
        labels_lib.placed(each, dict(enumerate(places)), len(shape)) for each in values[0].labels
    )
    return [values[0]._replace(shape=tuple(shape), labels=tuple(labels))]


def reshape(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Refold runs of axes; a label is spread out only where it varies."""
    del book
    (value, *_), shape = values, tuple(equation.outvars[0].aval.shape)
    blocks = _blocks(value.shape, shape)

    def refold(x: np.ndarray) -> np.ndarray:
        full, dims = list(x.shape), []
        for old, new in blocks:
            varies = any(x.shape[axis] > 1 for axis in old)
            for axis in old:
                full[axis] = value.shape[axis] if varies else 1
            dims += [shape[axis] if varies else 1 for axis in new]
        return np.broadcast_to(x, full).reshape(dims)

    return [labels_lib.map_labels(value, shape, refold)]


def _blocks(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Cut two shapes of the same size into the shortest runs of axes of equal size."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        a = b = 1
        if i < len(old):
            left, a, i = [i], old[i], i + 1
        if j < len(new):
            right, b, j = [j], new[j], j + 1
        while a != b:
            if (a < b or j >= len(new)) and i < len(old):
                left.append(i)
                a, i = a * old[i], i + 1
            else:
                right.append(j)
                b, j = b * new[j], j + 1
        blocks.append((left, right))
    return blocks


def reindex(function: Callable[[Any, np.ndarray], np.ndarray]) -> Any:
    """Make the rule of a primitive that only moves entries, by ``(params, entries)``."""

    def rule(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
        del book
        move = functools.partial(function, equation.params)
        return [labels_lib.map_labels(values[0], equation.outvars[0].aval.shape, move)]

    return rule


def cut(params: Any, x: np.ndarray) -> np.ndarray:
    """Slice."""
    strides = params["strides"] or [1] * x.ndim
    parts = zip(params["start_indices"], params["limit_indices"], strides, x.shape, strict=True)
    return x[tuple(slice(a, b, c) if n > 1 else slice(None) for a, b, c, n in parts)]


def reverse(params: Any, x: np.ndarray) -> np.ndarray:
    """Flip axes."""
    return np.flip(x, params["dimensions"])


def tile(params: Any, x: np.ndarray) -> np.ndarray:
    """Repeat axes."""
    return np.tile(x, [n if x.shape[i] > 1 else 1 for i, n in enumerate(params["reps"])])


def pad(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Pad with entries that belong to no channel."""
    del book
    value, filling = values
    shape = tuple(equation.outvars[0].aval.shape)

    def spread(x: np.ndarray, fill: Any) -> np.ndarray:
        config = zip(equation.params["padding_config"], x.shape, strict=True)
        return moves.pad(x, fill, [each if n > 1 else (0, 0, 0) for each, n in config])

    labels = tuple(
        Label(spread(each.ids, -1), spread(each.zero, filling.const == 0.0))
        for each in value.labels
    )
    return [value._replace(shape=shape, labels=labels, const=None)]


def concatenate(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Put arrays side by side; along channels, so are their channels."""
    axis = equation.params["dimension"]
    shape = tuple(equation.outvars[0].aval.shape)
    along = [[x for x in value.labels if axis in labels_lib.varying(x)] for value in values]
    labels = []
    if any(len(each) > 1 for each in along):
        for each in along:
            labels_lib.give_up(book, each, "a concatenation of merged axes is not understood")
    elif any(along):
        parts = []
        for value, own in zip(values, along, strict=True):
            dims = [1] * len(shape)
            dims[axis] = value.shape[axis]
            none = Label(np.full(dims, -1), np.full(dims, value.const == 0.0))
            parts.append(own[0] if own else none)
        dims = [max(part.ids.shape[i] for part in parts) for i in range(len(shape))]
        spread = [
            [np.broadcast_to(x, [*dims[:axis], x.shape[axis], *dims[axis + 1 :]]) for x in part]
            for part in parts
        ]
        labels.append(Label(*(np.concatenate(x, axis=axis) for x in zip(*spread, strict=True))))
    rest = [
        value._replace(
            shape=shape, labels=tuple(x for x in value.labels if axis not in labels_lib.varying(x))
        )
        for value in values
    ]
    labels += labels_lib.join(book, rest, shape, needs_all=True)
    varies = any(value.varies for value in values)
    return [Value(shape, tuple(labels), varies, sources=labels_lib.sources_of(values))]


def split(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Cut an axis into parts."""
    del book
    axis, start, outputs = equation.params["axis"], 0, []
    for size, var in zip(equation.params["sizes"], equation.outvars, strict=True):
        part = slice(start, start + size)

        def cut(x: np.ndarray, part: slice = part) -> np.ndarray:
            index = [slice(None)] * x.ndim
            index[axis] = part
            return x[tuple(index)] if x.shape[axis] > 1 else x

        outputs.append(labels_lib.map_labels(values[0], var.aval.shape, cut))
        start += size
    return outputs
