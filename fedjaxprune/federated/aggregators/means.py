"""Sums and means as monoids, through which a cohort streams.

A client of weight 0 is absent: whatever its message holds (NaN too), it adds nothing. Sums are kept
in float32 or wider, whatever the clients send, and count beyond 2²⁴ (`_sums.additive`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import trees
from fedjaxprune.federated.aggregators import _sums
from fedjaxprune.registry import Part, call
from fedjaxprune.types import Aggregator, CohortAggregator, Masks


class WeightedSum(NamedTuple):
    """A weighted mean in the making.

    Attributes:
      total: tree of ``[...]``, sum of weight times value.
      weight: ``[]`` sum of the weights.
    """

    total: Any
    weight: jax.Array


class HolderSum(NamedTuple):
    """A mean over holders in the making.

    Attributes:
      total: tree of ``[...]``, sum of weight times value over the holders of each coordinate.
      weight: tree of ``[...]``, sum of the holders' weights.
    """

    total: Any
    weight: Any


def weighted_mean() -> Aggregator:
    """Average every coordinate over the clients, by weight.

    Returns:
      An `Aggregator` from one client's value ``[...]`` and weight ``[]`` to one value ``[...]``,
      zero where the total weight is 0. Masks are ignored: what a client does not hold counts as
      zero.

    Raises:
      ValueError: while tracing, if a leaf is not of floating point.

    References:
      McMahan et al., `Communication-efficient learning of deep networks from decentralized data
      <https://arxiv.org/abs/1602.05629>`_, 2017.
    """
    return _weighted(lambda weight: weight, _divide_all)


def unweighted_mean() -> Aggregator:
    """Average every coordinate over the present clients, each counted once, whatever its weight.

    Otherwise as `weighted_mean`.
    """
    return _weighted(lambda weight: (weight > 0).astype(jnp.float32), _divide_all)


def weighted_sum() -> Aggregator:
    """Add up the present clients' values, each times its client's weight.

    Returns:
      An `Aggregator` from one client's value ``[...]`` and weight ``[]`` to the sum ``[...]``, at
      least float32. Masks are ignored: what a client does not hold counts as zero.

    Raises:
      ValueError: while tracing, if a leaf is not of floating point.
    """
    return _weighted(lambda weight: weight, lambda sums: sums.total)


def holder_mean() -> Aggregator:
    """Average each coordinate over the clients that hold it.

    With personal masks a plain mean drags rarely held weights towards zero, since every client
    without a coordinate still counts in its denominator. Here only holders count.

    Returns:
      An `Aggregator` from one client's delta ``[...]``, personal masks ``[...]`` and weight ``[]``
      (number of examples; 0 for an absent client) to one delta ``[...]``, zero where no client
      holds it.

    Raises:
      ValueError: while tracing, if the clients report no personal masks, or if a leaf is not of
        floating point.

    References:
      Diao et al., `HeteroFL <https://arxiv.org/abs/2010.01264>`_, 2021.
    """

    def zeros(like):
        _sums.require_inexact("holder_mean", like)
        return HolderSum(total=_zeros(like), weight=_zeros(like))

    def terms(value, masks, weight):
        if masks is None:
            raise ValueError(
                "aggregators.holder_mean averages over the clients that hold a coordinate, but the "
                "messages carry no personal masks: report them as the field 'masks', or use "
                "aggregators.weighted_mean."
            )
        _sums.require_inexact("holder_mean", value)
        if jax.tree.map(jnp.shape, masks) != jax.tree.map(jnp.shape, value):
            raise ValueError("aggregators.holder_mean needs masks of the shapes of the deltas.")
        holds = jax.tree.map(lambda mask: mask & (weight > 0), masks)
        wide = _widen(value)
        return HolderSum(
            total=jax.tree.map(lambda leaf, held: _weigh(held, leaf, weight), wide, holds),
            weight=jax.tree.map(
                lambda leaf, held: _weigh(held, jnp.ones_like(leaf), weight), wide, holds
            ),
        )

    def finish(sums):
        return jax.tree.map(_sums.divide, sums.total, sums.weight)

    return _sums.additive(zeros, terms, finish)


def vote_counts() -> Aggregator:
    """Count for each coordinate the present clients that keep it; every client has one vote.

    Returns:
      An `Aggregator` from one client's bool masks ``[...]`` and weight ``[]`` (0 for an absent
      client) to counts ``[...]`` int32.

    Raises:
      ValueError: while tracing, if a leaf is not bool.
    """
    return _votes(jnp.int32, lambda votes, weight: votes.astype(jnp.int32))


def vote_weights() -> Aggregator:
    """Sum for each coordinate the weights of the present clients that keep it.

    Returns:
      An `Aggregator` from one client's bool masks ``[...]`` and weight ``[]`` to sums ``[...]``
      float32.

    Raises:
      ValueError: while tracing, if a leaf is not bool.
    """
    return _votes(jnp.float32, lambda votes, weight: _weigh(votes, jnp.float32(1.0), weight))


def unweighted_sum() -> Aggregator:
    """Sum the present clients' values, unweighted: what accumulators (`metrics.Mean`) want.

    Returns:
      An `Aggregator` from one client's tree ``[...]`` and weight ``[]`` (0 for an absent client) to
      the sums ``[...]``; integers stay integers, booleans are counted in int32.
    """

    def terms(value, masks, weight):
        del masks  # everybody counts everywhere

        def leaf(value, zero):
            value = value.astype(zero.dtype)
            return jnp.where(weight > 0, value, zero)

        return jax.tree.map(leaf, value, _zeros(value))

    return _sums.additive(_zeros, terms, lambda sums: sums)


def stack() -> CohortAggregator:
    """Keep what every client says, ``[C, ...]``, absent ones included: counts for the record."""
    return CohortAggregator(reduce=lambda values, masks, weights: values)


def _weighted(
    count: Callable[[jax.Array], jax.Array], finish: Callable[[WeightedSum], Any]
) -> Aggregator:
    """Add up values times ``count(weight)``, and these weights."""

    def zeros(like):
        _sums.require_inexact("weighted_mean", like)
        return WeightedSum(total=_zeros(like), weight=jnp.float32(0.0))

    def terms(value, masks, weight):
        del masks  # everybody counts everywhere
        _sums.require_inexact("weighted_mean", value)
        weight = count(weight)
        present = weight > 0
        return WeightedSum(
            total=jax.tree.map(lambda leaf: _weigh(present, leaf, weight), _widen(value)),
            weight=jnp.where(present, weight, jnp.zeros_like(weight)),
        )

    return _sums.additive(zeros, terms, finish)


def _divide_all(sums: WeightedSum) -> Any:
    return jax.tree.map(lambda total: _sums.divide(total, sums.weight), sums.total)


def _votes(dtype: Any, count: Callable[[jax.Array, jax.Array], jax.Array]) -> Aggregator:
    """Add up ``(votes of the present [...] bool, weight) -> [...]`` of one client's masks."""

    def zeros(like):
        _require_bool(like)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), like)

    def terms(value, masks, weight):
        del masks  # the votes are the value
        _require_bool(value)
        return jax.tree.map(lambda mask: count(mask & (weight > 0), weight), value)

    return _sums.additive(zeros, terms, lambda sums: sums)


def _zeros(like: Any) -> Any:
    """Make the zero that sums of such leaves start from."""

    def leaf(value):
        if value.dtype == jnp.bool_:
            return jnp.zeros(value.shape, jnp.int32)
        is_inexact = jnp.issubdtype(value.dtype, jnp.inexact)
        return jnp.zeros(value.shape, _sums.sum_dtype(value.dtype) if is_inexact else value.dtype)

    return jax.tree.map(leaf, like)


def _widen(tree: Any) -> Any:
    """Convert leaves to the types of their sums."""
    return jax.tree.map(lambda leaf: leaf.astype(_sums.sum_dtype(leaf.dtype)), tree)


def _weigh(condition: jax.Array, value: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiply where `condition` holds; elsewhere zero, whatever the value was."""
    return jnp.where(condition, value, jnp.zeros_like(value)) * jnp.where(
        weight > 0, weight, jnp.zeros_like(weight)
    ).astype(value.dtype)


def _require_bool(tree: Masks) -> None:
    """Refuse votes that are not yes or no."""
    for path, leaf in trees.items(tree):
        if leaf.dtype != jnp.bool_:
            raise ValueError(
                f"aggregators.vote_counts counts bool masks, but {path!r} is {leaf.dtype}."
            )


PARTS = {
    "weighted_mean": Part(
        call(weighted_mean), summary="mean of the deltas, weighted by numbers of examples"
    ),
    "unweighted_mean": Part(call(unweighted_mean), summary="mean of the deltas, each client once"),
}
