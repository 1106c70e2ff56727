"""Operations on the host, in NumPy: of constants and their sums, without compiling anything.

Sums run in float64, so that what is folded is exact to the last bit of float32.
"""

import itertools
import string
from collections.abc import Callable
from typing import Any

import numpy as np

from fedjaxprune.structure import moves


def conv(x: np.ndarray, kernel: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    """Convolve as ``lax.conv_general_dilated`` does with these parameters; groups must be one."""
    numbers = params["dimension_numbers"]
    images = x.transpose(*numbers.lhs_spec[:1], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    taps = kernel.transpose(*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    images, taps = images.astype(np.float64), taps.astype(np.float64)
    ndim = taps.ndim - 2
    holes = zip(params["padding"], params["lhs_dilation"], strict=True)
    config = [(*pads, dilation - 1) for pads, dilation in holes]
    images = moves.pad(images, 0.0, [(0, 0, 0), *config, (0, 0, 0)])
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
    pairs = [*zip(*batch, strict=True), *zip(*contracted, strict=True)]
    names = [[-1] * first.ndim, [-1] * second.ndim]
    for name, (a, b) in enumerate(pairs):
        names[0][a] = names[1][b] = name
    output, free = list(range(len(batch[0]))), itertools.count(len(pairs))
    for side in names:
        for axis, name in enumerate(side):
            if name < 0:
                side[axis] = next(free)
                output.append(side[axis])
    letters = ["".join(string.ascii_letters[n] for n in part) for part in (*names, output)]
    operands = (first.astype(np.float64), second.astype(np.float64))
    return np.einsum("{},{}->{}".format(*letters), *operands, optimize=True)


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
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
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
