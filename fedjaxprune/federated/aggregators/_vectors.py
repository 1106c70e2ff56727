"""Whole messages as vectors: norms, distances and means over all leaves of a field together.

What a mask switches off is exactly zero in a message, so it adds nothing to any norm or distance.
"""

import fractions
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import trees
from fedjaxprune.federated.aggregators import _sums

_MAX_POWER = 126  # 2 ** 126 and its inverse are normal float32 numbers


def of_present(values: Any, weights: jax.Array) -> tuple[Any, jax.Array]:
    """Give the messages ``[C, ...]`` in float32 or wider, zeros where absent; and who is present.

    Returns:
      The values, and ``[C]`` bool.
    """
    present = weights > 0

    def leaf(value):
        value = value.astype(_sums.sum_dtype(value.dtype))
        return jnp.where(_along(present, value), value, jnp.zeros_like(value))

    return jax.tree.map(leaf, values), present


def norms(values: Any) -> jax.Array:
    """Measure each client's vector, ``[C]`` float32; a NaN makes it infinite.

    Squares are of scaled values (`unit`), so that none of them leaves float32 unless the norm does.
    """
    scaled, power = unit(values)
    return jnp.ldexp(jnp.sqrt(_squared_norms(scaled)), power)


def unit(values: Any) -> tuple[Any, jax.Array]:
    """Scale each client's vector to a largest absolute value in [0.5, 1), by a power of 2.

    Powers of 2 change no digit: where nothing is too small or too large, a norm, a product or a
    mean of scaled values is bit for bit the scaled one of the values.

    Returns:
      The scaled values ``[C, ...]`` and the powers ``[C]`` int32: a value is
      ``scaled * 2 ** power``. A vector of zeros, or with a value that is not finite, has power 0.
    """

    def leaf(value):
        axes = range(1, value.ndim)
        return jnp.max(jnp.abs(value), axis=axes, initial=0.0).astype(jnp.float32)

    leaves = [leaf(value) for value in jax.tree.leaves(values)]
    if not leaves:
        return values, jnp.zeros([], jnp.int32)
    largest = functools.reduce(jnp.maximum, leaves)
    power = jnp.where(jnp.isfinite(largest), jnp.frexp(largest)[1], 0)
    power = jnp.clip(power, -_MAX_POWER, _MAX_POWER)  # beyond it there is no normal float32
    factors = jnp.ldexp(jnp.ones_like(largest), -power)

    def scale(value):
        value = value.astype(_sums.sum_dtype(value.dtype))
        return value * _along(factors, value).astype(value.dtype)

    return jax.tree.map(scale, values), power


def _squared_norms(values: Any) -> jax.Array:
    def leaf(value):
        return jnp.sum(jnp.square(value), axis=range(1, value.ndim)).astype(jnp.float32)

    squares = trees.tree_sum(jax.tree.map(leaf, values), dtype=jnp.float32)
    return jnp.where(jnp.isnan(squares), jnp.full_like(squares, jnp.inf), squares)


def away_from(values: Any, center: Any) -> Any:
    """Subtract `center` ``[...]`` from each client's vector."""
    return jax.tree.map(lambda leaf, there: leaf - there[None], values, center)


def distances(values: Any, num_clients: int) -> jax.Array:
    """Measure how far clients are from each other, ``[C, C]`` float32; exactly symmetric."""

    def row(place):
        return norms(away_from(values, trees.take_rows(values, place)))

    return jax.lax.map(row, jnp.arange(num_clients, dtype=jnp.int32))


def products(values: Any, reference: Any) -> jax.Array:
    """Multiply each client's vector by `reference` ``[...]``: inner products ``[C]`` float32."""

    def leaf(value, other):
        product = value * other.astype(value.dtype)[None]
        return jnp.sum(product, axis=range(1, value.ndim)).astype(jnp.float32)

    return trees.tree_sum(jax.tree.map(leaf, values, reference), dtype=jnp.float32)


def combine(values: Any, shares: jax.Array) -> Any:
    """Add up ``shares [C] * values [C, ...]``; a share of 0 adds nothing whatever the value is."""

    def leaf(value):
        share = _along(shares, value)
        safe = jnp.where(share > 0, value, jnp.zeros_like(value))
        return jnp.sum(share.astype(value.dtype) * safe, axis=0)

    return jax.tree.map(leaf, values)


def middle(numbers: jax.Array, present: jax.Array) -> jax.Array:
    """Give the median of those present, ``[]``; of an even number the lower of the middle two."""
    ordered = jnp.sort(jnp.where(present, numbers, jnp.full_like(numbers, jnp.inf)))
    return ordered[jnp.maximum(jnp.sum(present, dtype=jnp.int32) - 1, 0) // 2]


@functools.lru_cache(maxsize=64)
def tolerated(fraction: float, num_clients: int) -> tuple[int, ...]:
    """Count the clients that are a fraction of 0, 1, ... clients, rounded up, in decimals."""
    exact = fractions.Fraction(repr(float(fraction)))
    return tuple(math.ceil(exact * n) for n in range(num_clients + 1))


def _along(numbers: jax.Array, leaf: jax.Array) -> jax.Array:
    """Give ``[C]`` the number of axes of a leaf ``[C, ...]``."""
    return numbers.reshape(-1, *[1] * (leaf.ndim - 1))
