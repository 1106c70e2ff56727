"""Mergeable accumulators: a mean is a sum and a weight, never a mean of means."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Mean(NamedTuple):
    """A weighted mean in the making.

    Attributes:
      total: ``[...]`` weighted sum.
      weight: ``[...]`` sum of the weights.
    """

    total: jax.Array
    weight: jax.Array


def zero() -> Mean:
    """Make the accumulator of nothing, which merges into any other without a trace."""
    return Mean(total=jnp.float32(0.0), weight=jnp.float32(0.0))


def mean(values: jax.Array, weights: jax.Array) -> Mean:
    """Accumulate `values` ``[B]`` with `weights` ``[B]``; a value of weight 0 may be anything."""
    values = values.astype(jnp.float32)
    return Mean(
        total=jnp.sum(jnp.where(weights > 0, values * weights, jnp.zeros_like(values))),
        weight=jnp.sum(weights),
    )


def merge(first: Any, second: Any) -> Any:
    """Add two trees of accumulators; associative, commutative, with `zero` as its zero."""
    return jax.tree.map(jnp.add, first, second)


def value(accumulator: Mean) -> jax.Array:
    """Read the mean; NaN where nothing was accumulated."""
    return accumulator.total / accumulator.weight
