"""Winograd's convolution: the same sums with a quarter of the multiplications or less.

A tile of ``m × m`` outputs of an ``r × r`` kernel needs ``(m + r - 1)²`` multiplications instead of
``m² r²``: images and kernel are transformed by small constant matrices, multiplied point by point
(here a matrix product over the channels for each point), and transformed back. With ``m = 4`` that
is 4 times fewer for a 3×3 kernel and 6.25 times for a 5×5 one. All is in float32; the relative
error against the plain sums is a few millionths, as the tests hold.

References:
  Lavin and Gray, `Fast algorithms for convolutional neural networks
  <https://arxiv.org/abs/1509.09308>`_, 2016.
"""

import fractions
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjaxprune.kernels import strides as geometry
from fedjaxprune.kernels.strides import Pads

TILE = 4  # outputs a side
_POINTS = tuple(map(fractions.Fraction, ("0", "1", "-1", "2", "-2", "1/2", "-1/2")))
# Where it was faster than the plain sums on CPU (docs/lab/performance.md).
_FEWEST_CHANNELS, _MOST_FILLING = 16, 1.5
_MANY_MULTIPLICATIONS, _FEWEST_MULTIPLICATIONS = 2.5e8, 6e7
_MANY_BYTES, _CACHED_BYTES = 6 * 2**20, 2**20  # images above the first are cut into parts of these


class Fewest(NamedTuple):
    """From where on a direction goes Winograd's way."""

    tiles: int  # of the whole batch
    weights: int  # per tap, of a layer that has not very many multiplications


CONVOLVE, GRADIENT = Fewest(tiles=128, weights=2048), Fewest(tiles=64, weights=1024)


class Transforms(NamedTuple):
    """The constant matrices of one tile and kernel size, in the paper's letters."""

    images: np.ndarray  # B^T [n, n], with n = TILE + r - 1
    kernel: np.ndarray  # G [n, r]
    outputs: np.ndarray  # A^T [TILE, n]


@functools.cache
def transforms(taps: int) -> Transforms:
    """Derive the matrices for 3 or 5 taps by Toom and Cook's evaluation, in exact fractions."""
    size = TILE + taps - 1
    points = _POINTS[: size - 1]

    def polynomial(roots):
        coefficients = [fractions.Fraction(1)]
        for root in roots:
            shifted = [fractions.Fraction(0), *coefficients]
            scaled = [root * c for c in coefficients] + [fractions.Fraction(0)]
            coefficients = [a - b for a, b in zip(shifted, scaled, strict=True)]
        return coefficients + [fractions.Fraction(0)] * (size - len(coefficients))

    others = [[p for p in points if p != point] for point in points]
    scales = [
        math.prod((point - p for p in rest), start=fractions.Fraction(1))
        for point, rest in zip(points, others, strict=True)
    ]
    images = [*(polynomial(rest) for rest in others), polynomial(points)]
    kernel = [[point**k / f for k in range(taps)] for point, f in zip(points, scales, strict=True)]
    kernel.append([fractions.Fraction(int(k == taps - 1)) for k in range(taps)])
    outputs = [[point**i for point in points] for i in range(TILE)]
    outputs = [[*row, fractions.Fraction(int(i == TILE - 1))] for i, row in enumerate(outputs)]
    return Transforms(*(np.array(m, np.float64) for m in (images, kernel, outputs)))


def pays(
    x: tuple[int, ...], kernel: tuple[int, ...], outputs: tuple[int, ...], *, fewest: Fewest
) -> bool:
    """Tell whether Winograd's way was faster than the plain sums on CPU.

    It needs a square kernel of 3 or 5, channels that make a matrix product worth while, tiles of
    which few are filling and which pay the kernel's transform back, and enough work in all to pay
    for compiling it.
    """
    taps, across, in_channels, out_channels = kernel
    if taps != across or taps not in (3, 5) or min(in_channels, out_channels) < _FEWEST_CHANNELS:
        return False
    if min(outputs) < 1:  # cropped to nothing
        return False
    pixels = outputs[0] * outputs[1]
    tiles = -(-outputs[0] // TILE) * -(-outputs[1] // TILE)
    is_wide = in_channels * out_channels >= fewest.weights
    enough = _FEWEST_MULTIPLICATIONS if is_wide else _MANY_MULTIPLICATIONS
    return (
        x[0] * tiles >= fewest.tiles
        and tiles * TILE**2 <= _MOST_FILLING * pixels
        and x[0] * pixels * math.prod(kernel) >= enough
    )


def convolve(x: jax.Array, kernel: jax.Array, padding: Pads) -> jax.Array:
    """Convolve ``[B, H, W, C]`` with ``[r, r, C, O]`` with stride 1."""
    transformed = _transform_kernel(kernel)
    parts = _split(x)
    if parts.shape[0] == 1:
        return _convolve(x, transformed, kernel.shape[0], padding)
    outputs = lax.map(lambda x: _convolve(x, transformed, kernel.shape[0], padding), parts)
    return outputs.reshape(-1, *outputs.shape[2:])


def kernel_gradient(x: jax.Array, cotangent: jax.Array, taps: int, padding: Pads) -> jax.Array:
    """Compute the gradient ``[r, r, C, O]`` of `convolve` by its kernel."""
    parts = _split(x)
    if parts.shape[0] == 1:
        products = _correlate(x, cotangent, taps, padding)
    else:
        size = TILE + taps - 1
        zeros = [jnp.zeros((size, x.shape[3], cotangent.shape[3]), x.dtype)] * size
        cotangents = cotangent.reshape(*parts.shape[:2], *cotangent.shape[1:])

        def add(total, part):
            more = _correlate(part[0], part[1], taps, padding)
            return jax.tree.map(jnp.add, total, more), None

        products, _ = lax.scan(add, zeros, (parts, cotangents))
    matrix = transforms(taps).kernel.T
    columns = _combine(matrix, products)  # r times [n, C, O]
    return jnp.stack([jnp.stack(_combine(matrix, column)) for column in columns], axis=1)


def _split(x: jax.Array) -> jax.Array:
    """Cut a batch that is too large for the cache into equal parts."""
    size = x.size * x.dtype.itemsize
    most = min(size // _CACHED_BYTES, x.shape[0]) if size > _MANY_BYTES else 1
    parts = next(n for n in range(most, 0, -1) if x.shape[0] % n == 0)
    return x.reshape(parts, -1, *x.shape[1:])


def _convolve(x: jax.Array, kernel: list[jax.Array], taps: int, padding: Pads) -> jax.Array:
    """Convolve with a transformed kernel."""
    matrix, out_channels = transforms(taps).outputs, kernel[0].shape[2]
    height, width = (x.shape[i + 1] + sum(padding[i]) - taps + 1 for i in range(2))
    down, across = -(-height // TILE), -(-width // TILE)
    tiles = _transform_images(x, padding, taps, down, across)
    products = [_multiply(a, b, (2,), (1,)) for a, b in zip(tiles, kernel, strict=True)]
    columns = [_combine(matrix, column) for column in _combine(matrix, products)]  # [T, O] each
    tile = (x.shape[0], down, across, out_channels)
    rows = [jnp.stack([column[i].reshape(tile) for column in columns], axis=3) for i in range(TILE)]
    images = jnp.stack(rows, axis=2)  # [B, down, TILE, across, TILE, O]
    images = images.reshape(x.shape[0], down * TILE, across * TILE, out_channels)
    return images[:, :height, :width]


def _correlate(x: jax.Array, cotangent: jax.Array, taps: int, padding: Pads) -> list[jax.Array]:
    """Multiply transformed images and cotangents: for each column ``[n, C, O]``."""
    matrix = transforms(taps).outputs.T
    _, height, width, out_channels = cotangent.shape
    down, across = -(-height // TILE), -(-width // TILE)
    filling = ((0, 0), (0, down * TILE - height), (0, across * TILE - width), (0, 0))
    cotangent = jnp.pad(cotangent, filling)
    rows = jnp.stack(_combine(matrix, [cotangent[:, i::TILE] for i in range(TILE)]))
    columns = _combine(matrix, [rows[:, :, :, j::TILE] for j in range(TILE)])
    gradients = [column.reshape(len(matrix), -1, out_channels) for column in columns]
    tiles = _transform_images(x, padding, taps, down, across)
    return [_multiply(a, b, (1,), (1,)) for a, b in zip(tiles, gradients, strict=True)]


def _transform_images(
    x: jax.Array, padding: Pads, taps: int, down: int, across: int
) -> list[jax.Array]:
    """Cut images into overlapping tiles and transform them: for each column ``[n, T, C]``."""
    batch, height, width, channels = x.shape
    matrix = transforms(taps).images
    (top, _), (left, _) = padding
    after = (down * TILE + taps - 1 - height - top, across * TILE + taps - 1 - width - left)
    x = geometry.pad(x, ((top, after[0]), (left, after[1])))
    ends = TILE * (down - 1) + 1, TILE * (across - 1) + 1
    rows = jnp.stack(
        _combine(matrix, [x[:, i : i + ends[0] : TILE] for i in range(len(matrix))])
    )  # [n, B, down, W, C]
    columns = _combine(matrix, [rows[:, :, :, j : j + ends[1] : TILE] for j in range(len(matrix))])
    return [column.reshape(len(matrix), batch * down * across, channels) for column in columns]


def _transform_kernel(kernel: jax.Array) -> list[jax.Array]:
    """Transform a kernel: for each column ``[n, C, O]``."""
    matrix = transforms(kernel.shape[0]).kernel
    rows = jnp.stack(_combine(matrix, list(kernel)))  # [n, r, C, O]
    return _combine(matrix, [rows[:, j] for j in range(kernel.shape[1])])


def _combine(matrix: np.ndarray, parts: Any) -> list[jax.Array]:
    """Multiply a constant matrix with a list of arrays, without its zeros."""
    results = []
    for row in matrix:
        terms = [
            part if factor == 1 else -part if factor == -1 else part * float(factor)
            for factor, part in zip(row, parts, strict=True)
            if factor
        ]
        results.append(functools.reduce(jnp.add, terms))
    return results


def _multiply(first, second, first_axis, second_axis):
    """Multiply point by point, as matrices."""
    return lax.dot_general(first, second, ((first_axis, second_axis), ((0,), (0,))))
