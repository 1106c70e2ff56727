"""Masks whose size follows from what weights are worth and what they cost.

A weight's gain is its squared gradient, the loss that a step along it takes off. Its cost is the
time that it adds to a round. Masks are chosen for the largest gain per second of the whole model.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import topk, trees
from fedjaxprune.pruning import pruners, schedules
from fedjaxprune.types import Masks, Pruner, Schedule

# In the statistics that the pruner sees: gains of prunable weights, a tree, and the sum of all
# others, [] float32.
GAINS, OTHER_GAINS = "gains", "other_gains"
TimeFn = Callable[[str, Any], float]  # (path, leaf) -> seconds that a live weight adds to a round

_ZERO, _INFINITY = 0x80000000, 0xFF800000  # order keys of floats


def admit(
    kept: Masks,
    gains: Any,
    *,
    other_gains: jax.Array,
    times: Any,
    constant: jax.Array | float,
    most: jax.Array | None = None,
) -> Masks:
    """Add weights to those that are kept as long as the gain per second of the model rises.

    In descending order of gain per second a weight is let in if its own is greater than that of
    the model so far. That is the best of all masks with the kept weights: a ratio rises by adding
    what has a higher one, and then stays below it. So what is let in are the weights above a
    threshold, which is searched for among the floats, with a sum over all weights per step. Sums
    are in float64; gains per second are compared as float32.

    Args:
      kept: tree of ``[...]`` bool, weights that stay in any case.
      gains: tree of ``[...]`` float32, not negative.
      other_gains: ``[]`` float32, the gain of all that is never pruned.
      times: tree of ``[]``, seconds that each live weight of a leaf adds to a round; above 0.
      constant: ``[]``, seconds of a round that do not depend on the masks.
      most: ``[]`` int32, live weights beyond which none is let in; None for no bound. The weights
        of most gain per second come first, of equal ones those of lower index.

    Returns:
      The masks. Multiplying all gains by a factor changes nothing, nor does one for all times.
    """
    leaves, structure = jax.tree.flatten(kept)
    gain_leaves = jax.tree.leaves(gains)
    with jax.enable_x64(True):
        wide = functools.partial(jax.lax.convert_element_type, new_dtype=jnp.float64)
        seconds = list(map(wide, jax.tree.leaves(times)))
        unit = functools.reduce(jnp.maximum, seconds, jnp.float64(0.0))
        shares, rest = [each / unit for each in seconds], wide(constant) / unit
        narrow = [share.astype(jnp.float32) for share in shares]
    worth = [gain.astype(jnp.float32) / share for gain, share in _both(gain_leaves, narrow)]
    keys = [jnp.where(mask, jnp.uint32(0), topk.order_keys(w)) for mask, w in _both(leaves, worth)]

    def ratio_of(threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sum up gains and times of what is kept and of what lies above a key: float64 each."""
        gain, time = wide(other_gains), rest
        for mask, key, own, share in zip(leaves, keys, gain_leaves, shares, strict=True):
            live = mask | (key > threshold)
            gain += jnp.sum(jnp.where(live, own.astype(jnp.float64), 0.0))
            time += share * trees.count(live).astype(jnp.float64)
        return gain, time

    def halve(bounds):
        low, high = bounds
        middle = low + (high - low) // jnp.uint32(2)
        level = jax.lax.bitcast_convert_type(middle ^ jnp.uint32(_ZERO), jnp.float32)
        gain, time = ratio_of(middle)
        is_better = level.astype(jnp.float64) * time > gain
        return (
            jnp.where(is_better, low, middle + jnp.uint32(1)),
            jnp.where(is_better, middle, high),
        )

    with jax.enable_x64(True):
        low, _ = jax.lax.while_loop(
            lambda bounds: bounds[0] < bounds[1], halve, (jnp.uint32(_ZERO), jnp.uint32(_INFINITY))
        )
    chosen = [key >= low for key in keys]
    if most is not None:
        num_kept = sum((trees.count(mask) for mask in leaves), start=jnp.int32(0))
        ranked = [jnp.where(mark, w, -jnp.inf) for mark, w in _both(chosen, worth)]
        first = topk.tree_top_k(ranked, jnp.maximum(most - num_kept, 0))
        chosen = [mark & one for mark, one in _both(chosen, first)]
    return jax.tree.unflatten(structure, [mask | mark for mask, mark in _both(leaves, chosen)])


def cost_benefit(
    drop_fraction: Schedule | float,
    *,
    times: TimeFn,
    constant: float,
    sparsity: Schedule | None = None,
) -> Pruner:
    """Drop the smallest weights, then let back, or in, what raises the gain per second.

    Of `n` live weights of a leaf the ``floor(drop_fraction * n)`` of smallest magnitude become
    candidates, and so are all pruned ones; see `admit`.

    Args:
      drop_fraction: in [0, 1), or a schedule of it.
      times: ``(path, leaf) -> seconds`` that a live weight of a leaf adds to a round.
      constant: seconds of a round that do not depend on the masks.
      sparsity: by round, the least pruned fraction beyond which nothing is let in; None for none.

    Returns:
      A `Pruner` that reads ``inputs.statistics["gains"]``, a tree of the parameters, and
      ``["other_gains"]``, ``[]``.

    Raises:
      ValueError: the constant is negative or, while tracing, a time is not positive.

    References:
      Jiang et al., `PruneFL <https://arxiv.org/abs/1909.12326>`_, 2022.
    """
    if not 0.0 <= constant < float("inf"):
        raise ValueError(f"constant must be finite and not negative, got {constant}.")
    fewer = pruners.drop(drop_fraction)

    def seconds(path, leaf):
        time = float(times(path, leaf))
        if not 0.0 < time < float("inf"):
            raise ValueError(f"times must be positive and finite, got {time} for {path!r}.")
        return time

    def update_fn(key, masks, state, inputs):
        kept, _ = fewer.update(key, masks, (), inputs)
        most = None
        if sparsity is not None:
            size = sum(trees.sizes(masks))
            most = schedules.num_kept(size, schedules.evaluate(sparsity, inputs.round))
        masks = admit(
            kept,
            inputs.statistics[GAINS],
            other_gains=inputs.statistics[OTHER_GAINS],
            times=trees.map_with_path(seconds, masks),
            constant=constant,
            most=most,
        )
        return masks, state

    return Pruner(init=lambda params: (), update=update_fn)


def _both(first: list[Any], second: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(first, second, strict=True))
