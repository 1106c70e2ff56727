"""What a mask is: a total boolean tree of the parameters' shapes."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import trees
from fedjaxprune.types import Masks, Params, PrunableFn


def is_kernel(path: str, leaf: jax.Array) -> bool:
    """Call prunable the kernels of dense and convolution layers, by path and shape.

    A leaf is one if the last part of its path is ``kernel`` (flax), ``weight`` or ``w`` (other
    libraries) and it has at least two axes: biases and normalization are never pruned.
    """
    return path.rsplit("/", 1)[-1] in ("kernel", "weight", "w") and leaf.ndim >= 2


def excluding(prunable: PrunableFn, *paths: str) -> PrunableFn:
    """Exempt the leaves at `paths` (a network's first convolution, say) from what is prunable."""

    def prunable_fn(path: str, leaf: jax.Array) -> bool:
        return path not in paths and prunable(path, leaf)

    return prunable_fn


def full(params: Params) -> Masks:
    """Make the masks that keep everything."""
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.bool_), params)


def apply(masks: Masks, params: Params) -> Params:
    """Set pruned entries to exact zeros, whatever they were (NaN and -0.0 included)."""
    return jax.tree.map(
        lambda mask, leaf: jnp.where(mask, leaf, jnp.zeros_like(leaf)), masks, params
    )


def restrict(masks: Masks, prunable: PrunableFn) -> Masks:
    """Switch everything back on outside the `prunable` leaves."""
    return trees.map_with_path(
        lambda path, mask: mask if prunable(path, mask) else jnp.ones_like(mask), masks
    )


def num_kept(masks: Masks) -> jax.Array:
    """Count the live entries of every leaf: ``[L]`` int32."""
    return jnp.stack([trees.count(leaf) for leaf in jax.tree.leaves(masks)])


def num_changed(before: Masks, after: Masks) -> jax.Array:
    """Count the entries in which two masks differ: ``[]`` int32."""
    flips = jax.tree.map(lambda a, b: trees.count(a != b), before, after)
    return trees.tree_sum(flips, dtype=jnp.int32)


def prunable_leaves(tree: Any, prunable: PrunableFn) -> list[bool]:
    """Tell for every leaf, in order, whether it is prunable; a Python list, as shapes decide it."""
    return [bool(prunable(path, leaf)) for path, leaf in trees.items(tree)]


def sparsity(masks: Masks, prunable: PrunableFn) -> jax.Array:
    """Measure the pruned fraction of the prunable weights: ``[]`` float32."""
    flags = prunable_leaves(masks, prunable)
    size = sum(n for n, flag in zip(trees.sizes(masks), flags, strict=True) if flag)
    if size == 0:
        return jnp.float32(0.0)
    kept = jnp.sum(jnp.where(jnp.array(flags), num_kept(masks), 0), dtype=jnp.int32)
    return jnp.float32(1.0) - kept.astype(jnp.float32) / jnp.float32(size)


def pack(masks: Masks) -> Any:
    """Pack every leaf to bits, row-major, most significant first: ``[ceil(size / 8)]`` uint8."""
    return jax.tree.map(lambda leaf: jnp.packbits(leaf.ravel()), masks)


def unpack(packed: Any, like: Params) -> Masks:
    """Undo `pack`, given a tree of the shapes."""
    return jax.tree.map(
        lambda bits, leaf: (
            jnp.unpackbits(bits, count=leaf.size).reshape(leaf.shape).astype(jnp.bool_)
        ),
        packed,
        like,
    )
