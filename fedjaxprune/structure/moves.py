"""Primitives that only move entries about, in NumPy: of arrays that may hold anything."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def move(name: str, params: Any, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Move entries about as the primitive of `MOVES` does."""
    moved = MOVES[name](params, *arrays)
    return moved if isinstance(moved, list) else [moved]


def pad(x: np.ndarray, filling: Any, config: Any) -> np.ndarray:
    """Pad as ``lax.pad`` does: by (before, after, between) for each axis; negative ones crop."""
    shape = [
        low + high + n + max(n - 1, 0) * interior
        for n, (low, high, interior) in zip(x.shape, config, strict=True)
    ]
    result = np.full(shape, filling, x.dtype)
    targets, sources = [], []
    for n, size, (low, _, interior) in zip(x.shape, shape, config, strict=True):
        places = low + np.arange(n) * (interior + 1)
        inside = (places >= 0) & (places < size)
        targets.append(places[inside])
        sources.append(np.arange(n)[inside])
    result[np.ix_(*targets)] = x[np.ix_(*sources)]
    return result


def places_of_dot(numbers: Any, ndims: Sequence[int]) -> list[dict[int, int]]:
    """Say for both operands of a product which of their axes becomes which axis of the output."""
    contracted, batched = numbers
    places, offset = [], len(batched[0])
    for ndim, summed, batch in zip(ndims, contracted, batched, strict=True):
        free = [axis for axis in range(ndim) if axis not in batch and axis not in summed]
        place = {axis: i for i, axis in enumerate(batch)}
        places.append(place | {axis: i for i, axis in enumerate(free, offset)})
        offset += len(free)
    return places


def places_of_gather(equation: Any) -> dict[int, int]:
    """Say which axes of what is looked up become which axes of the output."""
    numbers = equation.params["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
    windows = (axis for axis in range(equation.invars[0].aval.ndim) if axis not in gone)
    return dict(zip(windows, numbers.offset_dims, strict=True))


def _broadcast(params: Any, x: np.ndarray) -> np.ndarray:
    dims = [1] * len(params["shape"])
    for place, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        dims[place] = size
    return np.broadcast_to(x.reshape(dims), params["shape"])


def _slice(params: Any, x: np.ndarray) -> np.ndarray:
    strides = params["strides"] or (1,) * x.ndim
    parts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return x[tuple(slice(*part) for part in parts)]


def _split(params: Any, x: np.ndarray) -> list[np.ndarray]:
    return list(np.split(x, np.cumsum(params["sizes"])[:-1], axis=params["axis"]))


MOVES: dict[str, Callable[..., Any]] = {
    "reshape": lambda params, x: x.reshape(params["new_sizes"]),
    "broadcast_in_dim": _broadcast,
    "squeeze": lambda params, x: np.squeeze(x, tuple(params["dimensions"])),
    "expand_dims": lambda params, x: np.expand_dims(x, tuple(params["dimensions"])),
    "transpose": lambda params, x: x.transpose(params["permutation"]),
    "rev": lambda params, x: np.flip(x, tuple(params["dimensions"])),
    "slice": _slice,
    "concatenate": lambda params, *arrays: np.concatenate(arrays, axis=params["dimension"]),
    "split": _split,
    "pad": lambda params, x, filling: pad(x, filling, params["padding_config"]),
}
