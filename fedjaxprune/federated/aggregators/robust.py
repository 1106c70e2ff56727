"""Aggregators that bound what a few wrong clients can do; they need all messages at once.

A client of weight 0 is absent: whatever its message holds (NaN too), it adds nothing.
"""

import fractions
import math

import jax
import jax.numpy as jnp

from fedjaxprune.federated.aggregators import _sums
from fedjaxprune.registry import Part, call
from fedjaxprune.settings import Settings, setting
from fedjaxprune.types import CohortAggregator


def median() -> CohortAggregator:
    """Take the median of every coordinate over the present clients, each counted once.

    Of an even number of clients it is the mean of the middle two; without clients it is zero. A NaN
    counts as plus infinity. Masks are ignored: what a client does not hold counts as zero.

    Returns:
      A `CohortAggregator` from values ``[C, ...]`` and weights ``[C]`` to one value ``[...]``.

    Raises:
      ValueError: while tracing, if a leaf is not of floating point.

    References:
      Yin et al., `Byzantine-robust distributed learning: towards optimal statistical rates
      <https://arxiv.org/abs/1803.01498>`_, 2018, definition 1.
    """

    def reduce_fn(values, masks, weights):
        del masks  # everybody counts everywhere
        _sums.require_inexact("median", values)
        num_participating = jnp.sum(weights > 0, dtype=jnp.int32)

        def leaf(values):
            ordered = _sort_present(values, weights)
            low = ordered[jnp.maximum(num_participating - 1, 0) // 2]
            high = ordered[num_participating // 2]  # num_participating // 2 < C, as C >= 1
            middle = jnp.where(low == high, low, 0.5 * low + 0.5 * high)
            return jnp.where(num_participating > 0, middle, jnp.zeros_like(middle))

        return jax.tree.map(leaf, values)

    return CohortAggregator(reduce=reduce_fn)


def trimmed_mean(*, fraction: float) -> CohortAggregator:
    """Average every coordinate after dropping its smallest and its largest values.

    Args:
      fraction: of the present clients, ``floor(fraction * present)`` are dropped at either end; in
        [0, 0.5). The product is taken in decimals: 0.29 of 100 clients are 29. A run says so
        before it starts if its cohort is so small that nobody is dropped.

    Returns:
      A `CohortAggregator` from values ``[C, ...]`` and weights ``[C]`` to one value ``[...]``, the
      unweighted mean of the rest; without clients zero. A NaN counts as plus infinity. Masks are
      ignored: what a client does not hold counts as zero.

    Raises:
      ValueError: if `fraction` is outside [0, 0.5); while tracing, if a leaf is not of floating
      point.

    References:
      Yin et al., `Byzantine-robust distributed learning: towards optimal statistical rates
      <https://arxiv.org/abs/1803.01498>`_, 2018, definition 2.
    """
    if not 0.0 <= fraction < 0.5:
        raise ValueError(f"fraction must lie in [0, 0.5), got {fraction}.")
    exact = fractions.Fraction(repr(float(fraction)))

    def reduce_fn(values, masks, weights):
        del masks  # everybody counts everywhere
        _sums.require_inexact("trimmed_mean", values)
        num_participating = jnp.sum(weights > 0, dtype=jnp.int32)
        trims = [int(exact * n) for n in range(weights.shape[0] + 1)]
        num_trimmed = jnp.array(trims, jnp.int32)[num_participating]

        def leaf(values):
            ordered = _sort_present(values, weights)
            rank = jnp.arange(ordered.shape[0], dtype=jnp.int32)
            inside = (rank >= num_trimmed) & (rank < num_participating - num_trimmed)
            inside = inside.reshape(-1, *[1] * (ordered.ndim - 1))
            rest = jnp.where(inside, ordered, jnp.zeros_like(ordered))
            return _sums.divide(jnp.sum(rest, axis=0), num_participating - 2 * num_trimmed)

        return jax.tree.map(leaf, values)

    def note_fn(num_clients):
        if fraction == 0.0 or int(exact * num_clients) > 0:
            return ""
        advice = "it needs three clients at least"
        if num_clients > 2:
            least = math.ceil(1000 / num_clients) / 1000
            advice = f"a fraction of {least} drops one at either end"
        return (
            f"the trimmed mean of fraction {fraction} drops nobody of a cohort of {num_clients}, "
            f"and is the plain mean of each client once: {advice}."
        )

    return CohortAggregator(reduce=reduce_fn, note=note_fn)


def _sort_present(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Sort ``[C, ...]`` along the clients, the absent ones last (as infinities, as NaN is too)."""
    values = values.astype(_sums.sum_dtype(values.dtype))
    present = (weights > 0).reshape(-1, *[1] * (values.ndim - 1))
    usable = present & ~jnp.isnan(values)
    return jnp.sort(jnp.where(usable, values, jnp.full_like(values, jnp.inf)), axis=0)


class TrimmedMeanSettings(Settings):
    """Settings of `trimmed_mean`."""

    fraction: float = setting(
        0.1, "Fraction of the values dropped at either end.", unit="fraction", ge=0, lt=0.5
    )


PARTS = {
    "median": Part(call(median), summary="coordinate-wise median, each client once"),
    "trimmed_mean": Part(
        call(trimmed_mean),
        TrimmedMeanSettings,
        summary="mean without the smallest and largest values of each coordinate",
    ),
}
