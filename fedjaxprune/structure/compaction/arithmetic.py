"""Operations on the host, in NumPy: of constants and their sums, without compiling anything.

Sums run in float64, so that what is folded is exact to the last bit of float32.
"""

import itertools
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def conv(x: np.ndarray, kernel: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    """Convolve as ``lax.conv_general_dilated`` does with these parameters; groups must be one."""
    numbers = params["dimension_numbers"]
    images = x.transpose(*numbers.lhs_spec[:1], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    taps = kernel.transpose(*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    images, taps = images.astype(np.float64), taps.astype(np.float64)
    ndim = taps.ndim - 2
    for axis, dilation in enumerate(params["lhs_dilation"]):
        size = images.shape[axis + 1]
        grown = np.zeros(
            [(size - 1) * dilation + 1 if i == axis + 1 else n for i, n in enumerate(images.shape)]
        )
        grown[(slice(None),) * (axis + 1) + (slice(None, None, dilation),)] = images
        images = grown
    pads = [(max(low, 0), max(high, 0)) for low, high in params["padding"]]
    images = np.pad(images, [(0, 0), *pads, (0, 0)])
    for axis, (low, high) in enumerate(params["padding"]):  # negative ones crop
        end = images.shape[axis + 1] - max(-high, 0)
        images = images[(slice(None),) * (axis + 1) + (slice(max(-low, 0), end),)]
    strides, spread = params["window_strides"], params["rhs_dilation"]
    sides = [
        (images.shape[i + 1] - (taps.shape[i] - 1) * spread[i] - 1) // strides[i] + 1
        for i in range(ndim)
    ]
    total = np.zeros((images.shape[0], *sides, taps.shape[-1]))
    for place in itertools.product(*(range(n) for n in taps.shape[:ndim])):
        begins = [tap * spread[i] for i, tap in enumerate(place)]
        window = tuple(
            slice(begins[i], begins[i] + (sides[i] - 1) * strides[i] + 1, strides[i])
            for i in range(ndim)
        )
        total += images[(slice(None), *window)] @ taps[place]
    order = np.argsort([numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]])
    return total.transpose(order)


def dot(first: np.ndarray, second: np.ndarray, numbers: Any) -> np.ndarray:
    """Contract as ``lax.dot_general`` does with these dimension numbers."""
    (contracted, batch) = numbers
    letters = iter(string.ascii_letters)
    names = [[""] * first.ndim, [""] * second.ndim]
    shared = []
    for pairs in (zip(*batch, strict=True), zip(*contracted, strict=True)):
        for a, b in pairs:
            names[0][a] = names[1][b] = next(letters)
            shared.append(names[0][a])
    for side in names:
        for axis, name in enumerate(side):
            side[axis] = name or next(letters)
    output = shared[: len(batch[0])]
    output += [name for side in names for name in side if name not in shared]
    formula = f"{''.join(names[0])},{''.join(names[1])}->{''.join(output)}"
    operands = (first.astype(np.float64), second.astype(np.float64))
    return np.einsum(formula, *operands, optimize=True)


def _clamp(low: np.ndarray, x: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(x, low), high)


def _divide(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    if np.issubdtype(x.dtype, np.inexact):
        return x / by
    return np.sign(x) * np.sign(by) * (np.abs(x) // np.abs(by))  # towards zero


# The commonest operations entry by entry; all others are asked of JAX, which compiles each.
POINTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _divide,
    "max": np.maximum,
    "min": np.minimum,
    "clamp": _clamp,
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "square": np.square,
    "rsqrt": lambda x: (1.0 / np.sqrt(x.astype(np.float64))).astype(x.dtype),
    "exp": np.exp,
    "tanh": np.tanh,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def move(name: str, params: dict[str, Any], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Move entries about as the primitive does; the arrays may hold anything."""
    x = arrays[0]
    if name == "reshape":
        return [x.reshape(params["new_sizes"])]
    if name == "broadcast_in_dim":
        places = params["broadcast_dimensions"]
        dims = [1] * len(params["shape"])
        for axis, place in enumerate(places):
            dims[place] = x.shape[axis]
        return [np.broadcast_to(x.reshape(dims), params["shape"])]
    if name == "squeeze":
        return [np.squeeze(x, tuple(params["dimensions"]))]
    if name == "expand_dims":
        return [np.expand_dims(x, tuple(params["dimensions"]))]
    if name == "transpose":
        return [x.transpose(params["permutation"])]
    if name == "rev":
        return [np.flip(x, tuple(params["dimensions"]))]
    if name == "slice":
        strides = params["strides"] or (1,) * x.ndim
        parts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        return [x[tuple(slice(*part) for part in parts)]]
    if name == "concatenate":
        return [np.concatenate(arrays, axis=params["dimension"])]
    if name == "split":
        ends = np.cumsum(params["sizes"])[:-1]
        return list(np.split(x, ends, axis=params["axis"]))
    if name == "pad":
        return [_pad(x, arrays[1], params["padding_config"])]
    raise ValueError(f"{name} moves nothing.")


MOVES = (
    "reshape",
    "broadcast_in_dim",
    "squeeze",
    "expand_dims",
    "transpose",
    "rev",
    "slice",
    "concatenate",
    "split",
    "pad",
)


def _pad(x: np.ndarray, filling: np.ndarray, config: Any) -> np.ndarray:
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
