"""Centers of whole messages that few clients cannot move far.

All leaves of a field are one vector. A client of weight 0 is absent: whatever its message holds
(NaN too), it adds nothing. Every other client counts once, whatever its weight, as a hostile one
could claim any number of examples. What a client does not hold counts as zero: weights outside
global masks are no part of any norm, and personal masks are part of what clients differ in. A
message whose norm is not a finite float32 adds nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune.federated.aggregators import _sums, _vectors
from fedjaxprune.federated.aggregators.robust import median
from fedjaxprune.registry import Part, call
from fedjaxprune.settings import FLOAT_MAX, Count, Settings, setting
from fedjaxprune.types import CohortAggregator


def geometric_median(*, num_iterations: int, smoothing: float = 1e-6) -> CohortAggregator:
    """Take the point whose distances to all messages have the smallest sum (RFA).

    Each iteration of the smoothed Weiszfeld algorithm averages the messages with weights
    ``1 / max(smoothing, distance to the last center)``. We differ from the paper in the start (the
    median of each coordinate, not the mean, so that one huge message costs no iterations) and in
    the weights (each client once, not by its number of examples).

    Args:
      num_iterations: of the algorithm; at least 1.
      smoothing: distance below which messages count alike.

    Returns:
      A `CohortAggregator` from values ``[C, ...]`` and weights ``[C]`` to one value ``[...]``;
      without clients zero.

    Raises:
      ValueError: if an argument is out of range; while tracing, if a leaf is not of floating point.

    References:
      Pillutla et al., `Robust aggregation for federated learning
      <https://arxiv.org/abs/1912.13445>`_, 2019, algorithm 2.
    """
    _require_positive("num_iterations", num_iterations)
    _require_positive("smoothing", smoothing)

    def move(values, present, center):
        distances = _vectors.norms(_vectors.away_from(values, center))
        distances = jnp.maximum(distances, jnp.float32(smoothing))
        shares = jnp.where(present, 1.0 / distances, jnp.zeros_like(distances))
        total = jnp.sum(shares)
        safe = jnp.where(total > 0, total, jnp.ones_like(total))
        moved = _vectors.combine(values, shares / safe)
        return jax.tree.map(lambda new, old: jnp.where(total > 0, new, old), moved, center)

    return _iterated("geometric_median", move, num_iterations)


def centered_clipping(*, radius: float | None, num_iterations: int) -> CohortAggregator:
    """Average the messages after pulling those far away towards a center, and do so again.

    Each iteration moves the center by the mean of ``(message - center) * min(1, radius /
    distance)``. We differ from the paper in that the aggregator keeps nothing between rounds: it
    starts from the median of each coordinate, not from the last round's result, and clients send
    no momentum.

    Args:
      radius: distance that a message may have, in the unit of the message. None takes the median of
        the clients' distances, anew in each iteration.
      num_iterations: at least 1.

    Returns:
      A `CohortAggregator` from values ``[C, ...]`` and weights ``[C]`` to one value ``[...]``;
      without clients zero.

    Raises:
      ValueError: if an argument is out of range; while tracing, if a leaf is not of floating point.

    References:
      Karimireddy et al., `Learning from history for Byzantine robust optimization
      <https://arxiv.org/abs/2012.10333>`_, 2021.
    """
    _require_positive("num_iterations", num_iterations)
    _require_positive("radius", radius)

    def move(values, present, center):
        return _clipped_mean(values, present, center, radius)

    # A radius in the unit of deltas says nothing of statistics and gradients.
    beside = None
    if radius is not None:
        beside = centered_clipping(radius=None, num_iterations=num_iterations)
    return _iterated("centered_clipping", move, num_iterations)._replace(beside=beside)


def norm_bounding(*, bound: float | None) -> CohortAggregator:
    """Average the messages after shortening those that are longer than a bound.

    Args:
      bound: norm that a message may have, in its unit. None takes the median of the clients' norms.

    Returns:
      A `CohortAggregator` from values ``[C, ...]`` and weights ``[C]`` to one value ``[...]``;
      without clients zero.

    Raises:
      ValueError: if `bound` is not positive; while tracing, if a leaf is not of floating point.

    References:
      Sun et al., `Can you really backdoor federated learning? <https://arxiv.org/abs/1911.07963>`_,
      2019.
    """
    _require_positive("bound", bound)

    def reduce_fn(values, masks, weights):
        del masks  # everybody counts everywhere
        _sums.require_inexact("norm_bounding", values)
        values, present = _vectors.of_present(values, weights)
        zero = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), values)
        return _clipped_mean(values, present, zero, bound)

    return CohortAggregator(
        reduce=reduce_fn, beside=None if bound is None else norm_bounding(bound=None)
    )


def _iterated(name, move, num_iterations) -> CohortAggregator:
    """Move a center, ``(values, present, center) -> center``, from the coordinates' medians."""

    def reduce_fn(values, masks, weights):
        del masks  # everybody counts everywhere
        _sums.require_inexact(name, values)
        start = median().reduce(values, None, weights)
        values, present = _vectors.of_present(values, weights)
        return jax.lax.fori_loop(
            0, num_iterations, lambda _, center: move(values, present, center), start
        )

    return CohortAggregator(reduce=reduce_fn)


def _clipped_mean(values, present, center, radius):
    """Average what is at most `radius` away from a center, and what is pulled there."""
    away = _vectors.away_from(values, center)
    distances = _vectors.norms(away)
    limit = _vectors.middle(distances, present) if radius is None else jnp.float32(radius)
    is_far = distances > limit
    factors = jnp.where(is_far, limit / jnp.where(is_far, distances, 1.0), 1.0)
    num_present = jnp.maximum(jnp.sum(present, dtype=jnp.int32), 1).astype(jnp.float32)
    counts = present & jnp.isfinite(distances)
    shares = jnp.where(counts, factors / num_present, jnp.zeros_like(factors))
    moved = _vectors.combine(away, shares)
    return jax.tree.map(jnp.add, center, moved)


def _require_positive(name, value):
    """Refuse numbers that are not above 0; None passes."""
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be greater than 0, got {value}.")


def _norm(meaning: str, *, unset: str) -> Any:
    """Make a setting of a norm, with what it is where it is not set."""
    return setting(None, meaning, unit="norm of a message", unset=unset, gt=0, le=FLOAT_MAX)


class GeometricMedianSettings(Settings):
    """Settings of `geometric_median`."""

    num_iterations: Count = setting(10, "Steps of the Weiszfeld algorithm.", unit="steps")


class CenteredClippingSettings(Settings):
    """Settings of `centered_clipping`."""

    radius: float | None = _norm(
        "Distance from the center that a message may have.",
        unset="the median of the clients' distances",
    )
    num_iterations: Count = setting(3, "Times that the center moves.", unit="steps")


class NormBoundingSettings(Settings):
    """Settings of `norm_bounding`."""

    bound: float | None = _norm(
        "Norm that a message may have.", unset="the median of the clients' norms"
    )


PARTS = {
    "geometric_median": Part(
        call(geometric_median),
        GeometricMedianSettings,
        summary="geometric median of the messages (Pillutla et al., 2019, arXiv 1912.13445)",
    ),
    "centered_clipping": Part(
        call(centered_clipping),
        CenteredClippingSettings,
        summary="mean of the messages, clipped around a robust center (Karimireddy et al., 2021)",
    ),
    "norm_bounding": Part(
        call(norm_bounding),
        NormBoundingSettings,
        summary="mean of the messages, long ones shortened",
    ),
}
