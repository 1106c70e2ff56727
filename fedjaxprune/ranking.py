"""Exact top-k masks with a traced k, without sorting: both wings stand on this.

The k-th largest score is found by bisection over an order-preserving integer image of the scores,
with one count over all entries per step: no sort, no gather, no histogram, so it maps over clients,
shards, and costs a few passes over the data whatever `k` is.
"""

from typing import Any

import jax
import jax.numpy as jnp


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
    k = jnp.clip(jnp.asarray(k, jnp.int32), 0, size)
    keys = [order_keys(leaf) for leaf in leaves]
    threshold, num_above = _threshold(keys, k)
    stop = _stop(keys, threshold, k - num_above)
    kept = [
        (leaf > threshold) | ((leaf == threshold) & (position < stop))
        for leaf, position in zip(keys, _positions(keys), strict=True)
    ]
    return jax.tree.unflatten(structure, kept)


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


def _threshold(keys: list[jax.Array], k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Find a key with at most `k` keys above it, and their number.

    It is one with exactly `k` above it, or else the smallest with at most `k`: then the rest is to
    be taken from the keys that equal it.
    """

    def unfinished(carry):
        low, high, num_above = carry
        return (low < high) & (num_above < k)

    def halve(carry):
        low, high, num_above = carry
        middle = low + (high - low) // 2
        count = _count([leaf > middle for leaf in keys])
        enough = count <= k
        return (
            jnp.where(enough, low, middle + 1),
            jnp.where(enough, middle, high),
            jnp.where(enough, count, num_above),
        )

    start = (jnp.uint32(0), jnp.uint32(0xFFFFFFFF), jnp.int32(0))
    _, threshold, num_above = jax.lax.while_loop(unfinished, halve, start)
    return threshold, num_above


def _stop(keys: list[jax.Array], threshold: jax.Array, num_ties: jax.Array) -> jax.Array:
    """Find the position before which `num_ties` keys equal the threshold."""
    size = sum(leaf.size for leaf in keys)

    def unfinished(carry):
        low, high = carry
        return low < high

    def halve(carry):
        low, high = carry
        middle = low + (high - low) // 2
        before = _count(
            [
                (leaf == threshold) & (position < middle)
                for leaf, position in zip(keys, _positions(keys), strict=True)
            ]
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


def _count(marks: list[jax.Array]) -> jax.Array:
    """Count the True entries of all leaves: ``[]`` int32."""
    return sum((jnp.sum(leaf, dtype=jnp.int32) for leaf in marks), start=jnp.int32(0))
