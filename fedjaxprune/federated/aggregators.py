"""Many messages to one: monoids that a cohort streams through, and those that need all at once.

A client of weight 0 is absent: whatever its message holds (NaN too), it adds nothing. Sums are kept
in float32 or wider, whatever the clients send.
"""

import fractions
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from fedjaxprune import trees
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

    def init_fn(like):
        _require_inexact("weighted_mean", like)
        return WeightedSum(total=_zeros(like), weight=jnp.float32(0.0))

    def add_fn(accumulator, value, masks, weight):
        del masks  # everybody counts everywhere
        _require_inexact("weighted_mean", value)
        present = weight > 0
        total = jax.tree.map(
            lambda total, leaf: total + _weigh(present, leaf.astype(total.dtype), weight),
            accumulator.total,
            value,
        )
        weight = jnp.where(present, weight, jnp.zeros_like(weight))
        return WeightedSum(total=total, weight=accumulator.weight + weight)

    def finish_fn(accumulator):
        return jax.tree.map(lambda total: _divide(total, accumulator.weight), accumulator.total)

    return Aggregator(init=init_fn, add=add_fn, merge=_add_trees, finish=finish_fn)


def unweighted_mean() -> Aggregator:
    """Average every coordinate over the present clients, each counted once, whatever its weight.

    Otherwise as `weighted_mean`.
    """
    mean = weighted_mean()

    def add_fn(accumulator, value, masks, weight):
        return mean.add(accumulator, value, masks, (weight > 0).astype(jnp.float32))

    return mean._replace(add=add_fn)


def weighted_sum() -> Aggregator:
    """Add up the present clients' values, each times its client's weight.

    Returns:
      An `Aggregator` from one client's value ``[...]`` and weight ``[]`` to the sum ``[...]``, at
      least float32. Masks are ignored: what a client does not hold counts as zero.

    Raises:
      ValueError: while tracing, if a leaf is not of floating point.
    """
    mean = weighted_mean()
    return mean._replace(finish=lambda accumulator: accumulator.total)


def holder_mean() -> Aggregator:
    """Average each coordinate over the clients that hold it.

    With personal masks a plain mean drags rarely held weights towards zero, since every client
    without a coordinate still counts in its denominator. Here only holders count.

    Returns:
      An `Aggregator` from one client's delta ``[...]``, personal masks ``[...]`` and weight ``[]``
      (number of examples; 0 for an absent client) to one delta ``[...]``, zero where nobody holds
      it.

    Raises:
      ValueError: while tracing, if the clients report no personal masks, or if a leaf is not of
        floating point.

    References:
      Diao et al., `HeteroFL <https://arxiv.org/abs/2010.01264>`_, 2021.
    """

    def init_fn(like):
        _require_inexact("holder_mean", like)
        return HolderSum(total=_zeros(like), weight=_zeros(like))

    def add_fn(accumulator, value, masks, weight):
        if masks is None:
            raise ValueError(
                "aggregators.holder_mean averages over the clients that hold a coordinate, but the "
                "messages carry no personal masks: report them as the field 'masks', or use "
                "aggregators.weighted_mean."
            )
        _require_inexact("holder_mean", value)
        chex.assert_trees_all_equal_shapes(masks, value)
        holds = jax.tree.map(lambda mask: mask & (weight > 0), masks)
        total = jax.tree.map(
            lambda total, leaf, held: total + _weigh(held, leaf.astype(total.dtype), weight),
            accumulator.total,
            value,
            holds,
        )
        weights = jax.tree.map(
            lambda total, held: total + _weigh(held, jnp.ones_like(total), weight),
            accumulator.weight,
            holds,
        )
        return HolderSum(total=total, weight=weights)

    def finish_fn(accumulator):
        return jax.tree.map(_divide, accumulator.total, accumulator.weight)

    return Aggregator(init=init_fn, add=add_fn, merge=_add_trees, finish=finish_fn)


def vote_counts() -> Aggregator:
    """Count for each coordinate the present clients that keep it; every client has one vote.

    Returns:
      An `Aggregator` from one client's bool masks ``[...]`` and weight ``[]`` (0 for an absent
      client) to counts ``[...]`` int32.

    Raises:
      ValueError: while tracing, if a leaf is not bool.
    """

    def init_fn(like):
        _require_bool(like)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.int32), like)

    def add_fn(accumulator, value, masks, weight):
        del masks  # the votes are the value
        _require_bool(value)
        return jax.tree.map(
            lambda count, mask: count + (mask & (weight > 0)).astype(jnp.int32), accumulator, value
        )

    return Aggregator(init=init_fn, add=add_fn, merge=_add_trees, finish=lambda counts: counts)


def vote_weights() -> Aggregator:
    """Sum for each coordinate the weights of the present clients that keep it.

    Returns:
      An `Aggregator` from one client's bool masks ``[...]`` and weight ``[]`` to sums ``[...]``
      float32, exact for numbers of examples that add up to less than 2²⁴.

    Raises:
      ValueError: while tracing, if a leaf is not bool.
    """

    def init_fn(like):
        _require_bool(like)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), like)

    def add_fn(accumulator, value, masks, weight):
        del masks  # the votes are the value
        _require_bool(value)
        return jax.tree.map(
            lambda sums, mask: sums + _weigh(mask & (weight > 0), jnp.ones_like(sums), weight),
            accumulator,
            value,
        )

    return Aggregator(init=init_fn, add=add_fn, merge=_add_trees, finish=lambda sums: sums)


def unweighted_sum() -> Aggregator:
    """Sum the present clients' values, unweighted: what accumulators (`metrics.Mean`) want.

    Returns:
      An `Aggregator` from one client's tree ``[...]`` and weight ``[]`` (0 for an absent client) to
      the sums ``[...]``; integers stay integers, booleans are counted in int32.
    """

    def init_fn(like):
        return _zeros(like)

    def add_fn(accumulator, value, masks, weight):
        del masks  # everybody counts everywhere

        def leaf(sum_so_far, value):
            value = value.astype(sum_so_far.dtype)
            return sum_so_far + jnp.where(weight > 0, value, jnp.zeros_like(value))

        return jax.tree.map(leaf, accumulator, value)

    return Aggregator(init=init_fn, add=add_fn, merge=_add_trees, finish=lambda sums: sums)


def stack() -> CohortAggregator:
    """Keep what every client says, ``[C, ...]``, absent ones included: counts for the record."""
    return CohortAggregator(reduce=lambda values, masks, weights: values)


def median() -> CohortAggregator:
    """Take the median of every coordinate over the present clients, each counted once.

    Of an even number of clients it is the mean of the middle two; it is zero if nobody is present.
    A NaN counts as plus infinity. Masks are ignored: what a client does not hold counts as zero.

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
        _require_inexact("median", values)
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
        [0, 0.5). The product is taken in decimals: 0.29 of 100 clients are 29.

    Returns:
      A `CohortAggregator` from values ``[C, ...]`` and weights ``[C]`` to one value ``[...]``, the
      unweighted mean of the rest; zero if nobody is present. A NaN counts as plus infinity. Masks
      are ignored: what a client does not hold counts as zero.

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
        _require_inexact("trimmed_mean", values)
        num_participating = jnp.sum(weights > 0, dtype=jnp.int32)
        trims = [int(exact * n) for n in range(weights.shape[0] + 1)]
        num_trimmed = jnp.array(trims, jnp.int32)[num_participating]

        def leaf(values):
            ordered = _sort_present(values, weights)
            rank = jnp.arange(ordered.shape[0], dtype=jnp.int32)
            inside = (rank >= num_trimmed) & (rank < num_participating - num_trimmed)
            inside = inside.reshape(-1, *[1] * (ordered.ndim - 1))
            rest = jnp.where(inside, ordered, jnp.zeros_like(ordered))
            return _divide(jnp.sum(rest, axis=0), num_participating - 2 * num_trimmed)

        return jax.tree.map(leaf, values)

    return CohortAggregator(reduce=reduce_fn)


def _zeros(like: Any) -> Any:
    """Make the zero that sums of such leaves start from."""

    def leaf(value):
        if value.dtype == jnp.bool_:
            return jnp.zeros(value.shape, jnp.int32)
        if jnp.issubdtype(value.dtype, jnp.inexact):
            return jnp.zeros(value.shape, _sum_dtype(value.dtype))
        return jnp.zeros(value.shape, value.dtype)

    return jax.tree.map(leaf, like)


def _sum_dtype(dtype: Any) -> Any:
    """Widen half precision to float32."""
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32


def _weigh(condition: jax.Array, value: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiply where `condition` holds; elsewhere zero, whatever the value was."""
    return jnp.where(condition, value, jnp.zeros_like(value)) * jnp.where(
        weight > 0, weight, jnp.zeros_like(weight)
    ).astype(value.dtype)


def _divide(total: jax.Array, weight: jax.Array) -> jax.Array:
    """Divide, or give zero where there is nothing to divide by."""
    weight = weight.astype(total.dtype)
    safe = jnp.where(weight > 0, weight, jnp.ones_like(weight))
    return jnp.where(weight > 0, total / safe, jnp.zeros_like(total))


def _add_trees(first: Any, second: Any) -> Any:
    """Merge accumulators that are sums."""
    return jax.tree.map(jnp.add, first, second)


def _sort_present(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Sort ``[C, ...]`` along the clients, the absent ones last (as infinities, as NaN is too)."""
    values = values.astype(_sum_dtype(values.dtype))
    present = (weights > 0).reshape(-1, *[1] * (values.ndim - 1))
    usable = present & ~jnp.isnan(values)
    return jnp.sort(jnp.where(usable, values, jnp.full_like(values, jnp.inf)), axis=0)


def _require_inexact(name: str, tree: Any) -> None:
    """Refuse leaves that have no mean."""
    for path, leaf in zip(trees.paths(tree), jax.tree.leaves(tree), strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"aggregators.{name} averages floating-point leaves, but {path!r} is {leaf.dtype}: "
                "aggregate it with aggregators.total or aggregators.votes."
            )


def _require_bool(tree: Masks) -> None:
    """Refuse votes that are not yes or no."""
    for path, leaf in zip(trees.paths(tree), jax.tree.leaves(tree), strict=True):
        if leaf.dtype != jnp.bool_:
            raise ValueError(f"aggregators.votes counts bool masks, but {path!r} is {leaf.dtype}.")
