"""Exact top-k masks with a traced k, without sorting.

The k-th largest score is searched for among the order-preserving integer images of the scores, with
one count over all entries per step: no sort, no gather, no histogram, so it maps over clients,
shards, and costs a few passes over the data whatever `k` is.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import trees


def top_k(scores: jax.Array, k: jax.Array) -> jax.Array:
    """Mark the `k` largest entries.

    Exactly ``min(k, size)`` entries are kept. Of equal scores the lower flat index is kept first,
    as `jax.lax.top_k` does; -0.0 equals 0.0; NaN ranks with -inf, below everything else.

    Args:
      scores: ``[...]``, floats or integers of at most 32 bits.
      k: ``[]`` int32, may be traced; negative counts as 0.

    Returns:
      ``[...]`` bool.

    Raises:
      ValueError: while tracing, if the dtype has no 32-bit order.
    """
    return tree_top_k(scores, k)


def tree_top_k(scores: Any, k: jax.Array) -> Any:
    """Mark the `k` largest entries of all leaves together, which are never concatenated.

    Args:
      scores: tree of ``[...]``, together fewer than 2³¹ entries; all floats, or all of one integer
        dtype.
      k: ``[]`` int32, may be traced; negative counts as 0.

    Returns:
      The tree with bool leaves, ``min(k, size)`` of the entries True. Ties as in `top_k`, where the
      leaves' order is the tree's.

    Raises:
      ValueError: while tracing, if the leaves have no common 32-bit order.
    """
    leaves, structure = jax.tree.flatten(scores)
    size = sum(leaf.size for leaf in leaves)
    if size == 0:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.bool_), scores)
    dtypes = {jnp.dtype(leaf.dtype) for leaf in leaves}
    if len(dtypes) > 1 and not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        raise ValueError(
            "tree_top_k ranks leaves that are all floats, or all of one integer dtype, got "
            f"{', '.join(sorted(map(str, dtypes)))}."
        )
    return jax.tree.unflatten(structure, _largest(leaves, jnp.asarray(k, jnp.int32)))


# Traced once for leaves of the same shapes: a search takes longer to trace than a local step.
@functools.partial(jax.jit, inline=True)
def _largest(leaves: list[jax.Array], k: jax.Array) -> list[jax.Array]:
    """Mark the `k` largest entries of leaves that have a common order."""
    keys = [order_keys(leaf) for leaf in leaves]
    k = jnp.clip(k, 0, sum(leaf.size for leaf in leaves))
    threshold, num_above = _threshold(keys, k)
    stop = _stop(keys, threshold, k - num_above)
    return [
        (leaf > threshold) | ((leaf == threshold) & (position < stop))
        for leaf, position in zip(keys, _positions(keys), strict=True)
    ]


def order_keys(scores: jax.Array) -> jax.Array:
    """Map scores to uint32 of the same order and ties as in `top_k`.

    This works on bits, since comparing floats may take subnormal ones for zero.
    """
    dtype = scores.dtype
    sign = jnp.uint32(0x80000000)
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize <= 4:
        bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
        bits = jnp.where((bits & ~sign) > jnp.uint32(0x7F800000), jnp.uint32(0xFF800000), bits)
        bits = jnp.where(bits == sign, jnp.uint32(0), bits)
        return jnp.where(bits >= sign, ~bits, bits | sign)
    if jnp.issubdtype(dtype, jnp.unsignedinteger) and dtype.itemsize <= 4:
        return scores.astype(jnp.uint32)
    if jnp.issubdtype(dtype, jnp.signedinteger) and dtype.itemsize <= 4:
        return jax.lax.bitcast_convert_type(scores.astype(jnp.int32), jnp.uint32) ^ sign
    raise ValueError(f"scores must be floats or integers of at most 32 bits, got {dtype}.")


class _Bounds(NamedTuple):
    """Where the threshold lies, and how many keys lie above the ends of that.

    Attributes:
      low, high: the smallest key with at most `k` keys above it is in ``low .. high``.
      above_low: keys from `low` on, more than `k` of them.
      above_high: keys above `high`, at most `k`.
      halve: whether the step before took off less than half, so that the next one must.
    """

    low: jax.Array
    high: jax.Array
    above_low: jax.Array
    above_high: jax.Array
    halve: jax.Array


def _threshold(keys: list[jax.Array], k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Find a key with at most `k` keys above it, and their number.

    It is one with exactly `k` above it, or else the smallest with at most `k`: then the rest is to
    be taken from the keys that equal it. Steps go by turns to the middle of the bounds and to where
    the counts at both ends say that `k` is crossed: 64 at most, about a dozen for random numbers.
    """

    def unfinished(bounds):
        return (bounds.low < bounds.high) & (bounds.above_high < k)

    def step(bounds):
        low, high = bounds.low, bounds.high
        middle = low + jnp.where(bounds.halve, (high - low) // 2, _crossing(bounds, k))
        count = sum((trees.count(leaf > middle) for leaf in keys), start=jnp.int32(0))
        enough = count <= k
        new_low = jnp.where(enough, low, middle + 1)
        new_high = jnp.where(enough, middle, high)
        return _Bounds(
            low=new_low,
            high=new_high,
            above_low=jnp.where(enough, bounds.above_low, count),
            above_high=jnp.where(enough, count, bounds.above_high),
            halve=~bounds.halve & (new_high - new_low > (high - low) // 2),
        )

    start = _Bounds(
        low=jnp.uint32(0),
        high=jnp.uint32(0xFFFFFFFF),
        above_low=jnp.int32(sum(leaf.size for leaf in keys)),
        above_high=jnp.int32(0),
        halve=jnp.bool_(True),
    )
    found = jax.lax.while_loop(unfinished, step, start)
    return found.high, found.above_high


def _crossing(bounds: _Bounds, k: jax.Array) -> jax.Array:
    """Say how far above `low` the number of keys above falls to `k`, were they spread evenly."""
    span = (bounds.high - bounds.low).astype(jnp.float32)
    excess = (bounds.above_low - k).astype(jnp.float32)
    share = excess / (bounds.above_low - bounds.above_high).astype(jnp.float32)
    # Where float32 rounds the span up, the last key that may be looked at is one below `high`.
    return jnp.minimum((span * share).astype(jnp.uint32), bounds.high - bounds.low - 1)


def _stop(keys: list[jax.Array], threshold: jax.Array, num_ties: jax.Array) -> jax.Array:
    """Find the position before which `num_ties` keys equal the threshold."""
    size = sum(leaf.size for leaf in keys)

    def unfinished(carry):
        low, high = carry
        return low < high

    def halve(carry):
        low, high = carry
        middle = low + (high - low) // 2
        before = sum(
            (
                trees.count((leaf == threshold) & (position < middle))
                for leaf, position in zip(keys, _positions(keys), strict=True)
            ),
            start=jnp.int32(0),
        )
        return (  # the right count ends the search: low == high
            jnp.where(before < num_ties, middle + 1, jnp.where(before == num_ties, middle, low)),
            jnp.where(before < num_ties, high, middle),
        )

    high = jnp.where(num_ties > 0, jnp.int32(size), jnp.int32(0))
    _, stop = jax.lax.while_loop(unfinished, halve, (jnp.int32(0), high))
    return stop


def _positions(keys: list[jax.Array]) -> list[jax.Array]:
    """Number the entries of all leaves through: int32 of each leaf's shape."""
    positions, offset = [], 0
    for leaf in keys:
        positions.append(offset + jax.lax.iota(jnp.int32, leaf.size).reshape(leaf.shape))
        offset += leaf.size
    return positions
