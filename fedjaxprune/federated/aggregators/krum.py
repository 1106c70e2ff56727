"""Krum and multi-Krum: keep the messages that have the closest neighbors.

All leaves of a field are one vector. A client of weight 0 is absent: whatever its message holds
(NaN too), it adds nothing.
"""

import jax.numpy as jnp

from fedjaxprune.federated.aggregators import _sums, _vectors
from fedjaxprune.registry import Part, call
from fedjaxprune.settings import Settings, setting
from fedjaxprune.types import CohortAggregator


def krum(*, tolerated: float) -> CohortAggregator:
    """Take the message that is closest to its neighbors.

    Of `n` present clients up to `f` may be hostile. A message's score is the sum of its squared
    distances to the ``n - f - 2`` nearest others (at least one). The smallest score wins; of equal
    ones the mean is taken, so that the order of the clients is irrelevant. Every client counts
    once, whatever its weight. The paper's guarantee needs ``n >= 2 f + 3``.

    Args:
      tolerated: of the present clients, ``f = ceil(tolerated * n)`` may be hostile; in [0, 0.5).
        The product is taken in decimals.

    Returns:
      A `CohortAggregator` from values ``[C, ...]`` and weights ``[C]`` to one value ``[...]``;
      without clients zero. What a client does not hold counts as zero: weights outside global masks
      are no part of any distance, and personal masks are part of what clients differ in.

    Raises:
      ValueError: if `tolerated` is outside [0, 0.5); while tracing, if a leaf is not of floating
      point.

    References:
      Blanchard et al., `Machine learning with adversaries: Byzantine tolerant gradient descent
      <https://arxiv.org/abs/1703.02757>`_, 2017.
    """
    return _nearest("krum", tolerated, lambda num_present, num_hostile: jnp.ones_like(num_present))


def multi_krum(*, tolerated: float) -> CohortAggregator:
    """Average the ``n - f`` messages that are closest to their neighbors.

    Scores, arguments and the role of masks are those of `krum`. Clients with equal scores share the
    places that are left for them.
    """
    return _nearest(
        "multi_krum",
        tolerated,
        lambda num_present, num_hostile: jnp.maximum(num_present - num_hostile, 1),
    )


def _nearest(name, tolerated, num_chosen) -> CohortAggregator:
    """Average the messages of the smallest scores."""
    if not 0.0 <= tolerated < 0.5:
        raise ValueError(f"tolerated must lie in [0, 0.5), got {tolerated}.")

    def reduce_fn(values, masks, weights):
        del masks  # everybody counts everywhere
        _sums.require_inexact(name, values)
        size = weights.shape[0]
        values, present = _vectors.of_present(values, weights)
        num_present = jnp.sum(present, dtype=jnp.int32)
        num_hostile = jnp.array(_vectors.tolerated(tolerated, size), jnp.int32)[num_present]
        distances = _vectors.distances(values, size)
        is_other = present[None, :] & ~jnp.eye(size, dtype=jnp.bool_)
        ordered = jnp.sort(jnp.where(is_other, distances, jnp.inf), axis=1)
        num_neighbors = jnp.maximum(num_present - num_hostile - 2, 1)
        is_near = jnp.arange(size, dtype=jnp.int32)[None, :] < num_neighbors
        # The root of the sum of squares, which sorts alike and cannot be too small for float32.
        scores = _vectors.norms(jnp.where(is_near, ordered, jnp.zeros_like(ordered)))
        chosen = num_chosen(num_present, num_hostile)
        return _vectors.combine(values, _smallest(scores, present, chosen))

    return CohortAggregator(reduce=reduce_fn)


def _smallest(scores, present, number):
    """Give each of the `number` smallest scores an equal share ``[C]``; equal ones share places."""
    largest = jnp.finfo(scores.dtype).max  # those present come before those absent
    scores = jnp.where(present, jnp.minimum(scores, largest), jnp.inf)
    last = jnp.sort(scores)[jnp.maximum(number - 1, 0)]
    is_below, is_tied = scores < last, (scores == last) & present
    places = (number - jnp.sum(is_below, dtype=jnp.int32)).astype(jnp.float32)
    num_tied = jnp.maximum(jnp.sum(is_tied, dtype=jnp.int32), 1).astype(jnp.float32)
    shares = jnp.where(is_below, 1.0, jnp.where(is_tied, places / num_tied, 0.0))
    return shares / jnp.maximum(number, 1).astype(jnp.float32)


class KrumSettings(Settings):
    """Settings of `krum` and `multi_krum`."""

    tolerated: float = setting(
        0.2, "Fraction of a round's clients that may be hostile.", unit="fraction", ge=0, lt=0.5
    )


PARTS = {
    "krum": Part(
        call(krum), KrumSettings, summary="the message closest to its neighbors (Krum, 2017)"
    ),
    "multi_krum": Part(
        call(multi_krum), KrumSettings, summary="mean of the messages closest to their neighbors"
    ),
}
