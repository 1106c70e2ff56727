"""How much of each layer is kept? From scores and a sparsity to one count per leaf.

Scores arrive with what must not be chosen at -inf and what must be chosen at +inf; most allocations
look at nothing but shapes. Counts are computed in float64 and leave as int32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import topk, trees
from fedjaxprune.pruning import schedules
from fedjaxprune.types import PrunableFn

# (scores, sparsity [] float64) -> the tree with the number of weights to keep, [] int32, per leaf
AllocationFn = Callable[[Any, jax.Array], Any]


def nothing(path: str, leaf: jax.Array) -> bool:
    """Choose no leaf."""
    del path, leaf
    return False


def uniform() -> AllocationFn:
    """Prune every leaf to the same sparsity."""

    def allocate(scores: Any, sparsity: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: schedules.num_kept(leaf.size, sparsity), scores)

    return allocate


def global_pool(*, least: int = 0) -> AllocationFn:
    """Let all leaves compete in one pool: a leaf keeps as many as are among the best of the model.

    The pool keeps exactly ``size - round(sparsity * size)``. Unless `least` says so, nothing
    protects a layer from being pruned away.

    Args:
      least: entries of every leaf that come before all others, its best ones.

    Raises:
      ValueError: if `least` is negative.
    """
    if least < 0:
        raise ValueError(f"least must not be negative, got {least}.")

    def first(leaf: jax.Array) -> jax.Array:
        chosen = topk.top_k(leaf, jnp.int32(least)) & (leaf > -jnp.inf)
        return jnp.where(chosen, jnp.inf, leaf)

    def allocate(scores: Any, sparsity: jax.Array) -> Any:
        ranked = jax.tree.map(first, scores) if least else scores
        best = topk.tree_top_k(ranked, schedules.num_kept(sum(trees.sizes(scores)), sparsity))
        return jax.tree.map(lambda leaf: jnp.sum(leaf, dtype=jnp.int32), best)

    return allocate


def at_least(inner: AllocationFn, *, least: int = 1) -> AllocationFn:
    """Keep `least` weights of every leaf, without changing how many `inner` keeps in all.

    What small leaves gain is taken from the largest leaf, of equal ones the first, and then from
    the next largest; no leaf goes below `least`. If `inner` keeps fewer than `least` of every leaf
    together, the total grows to that.

    Args:
      inner: the allocation that is guarded.
      least: weights of every leaf, or all of a smaller one.

    Raises:
      ValueError: if `least` is negative.
    """
    if least < 0:
        raise ValueError(f"least must not be negative, got {least}.")

    def allocate(scores: Any, sparsity: jax.Array) -> Any:
        counts, structure = jax.tree.flatten(inner(scores, sparsity))
        sizes = trees.sizes(scores)
        floors = [min(least, size) for size in sizes]
        guarded = [jnp.maximum(n, floor) for n, floor in zip(counts, floors, strict=True)]
        excess = sum(
            (after - before for after, before in zip(guarded, counts, strict=True)),
            start=jnp.int32(0),
        )
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            taken = jnp.minimum(excess, guarded[i] - floors[i])
            guarded[i], excess = guarded[i] - taken, excess - taken
        return jax.tree.unflatten(structure, guarded)

    return allocate


def erk(*, power: float = 1.0, dense: PrunableFn = nothing) -> AllocationFn:
    """Keep more of small layers: density in proportion to ``(sum of axes / product of axes)``.

    A leaf keeps ``floor(density * size)``, so the model keeps up to one weight per leaf less than
    asked. A product within a part in 10¹² of the next integer counts as it, for densities are only
    known to rounding.

    Args:
      power: exponent of the raw score; 1 is the paper's, 0 is uniform.
      dense: ``(path, leaf) ->`` is the leaf to be kept whole, whatever its score?

    References:
      Evci et al., `RigL <https://arxiv.org/abs/1911.11134>`_, 2020.
    """
    _check_power(power)

    def densities(tree: Any, sparsity: jax.Array) -> jax.Array:
        return erk_densities(tree, sparsity, power=power, dense=dense)

    return _by_density(densities)


def er(*, dense: PrunableFn = nothing) -> AllocationFn:
    """Keep more of small layers, as `erk` does, without regard to the size of convolutions.

    The density is in proportion to ``(inputs + outputs) / (inputs * outputs)``, the last two axes.
    So convolutions keep far more than under `erk`.

    Args:
      dense: as in `erk`.

    References:
      Mocanu et al., `SET <https://arxiv.org/abs/1707.04780>`_, 2018; Evci et al., `RigL
      <https://arxiv.org/abs/1911.11134>`_, 2020, whose code has both.
    """

    def densities(tree: Any, sparsity: jax.Array) -> jax.Array:
        raw = np.array([_raw_score(leaf.shape[-2:]) for leaf in jax.tree.leaves(tree)])
        return _densities(tree, sparsity, raw, dense)

    return _by_density(densities)


def erk_densities(
    tree: Any, sparsity: jax.Array, *, power: float = 1.0, dense: PrunableFn = nothing
) -> jax.Array:
    """Compute the kept fraction of every leaf under `erk`.

    A leaf that would get more than all of its weights is kept whole, and the others share what is
    left, until nobody would. The next to be whole is always of the highest raw score left, so the
    sets are known beforehand, and the sparsity, which may be traced, only decides how far it goes.

    Args:
      tree: arrays or shapes (`jax.ShapeDtypeStruct`).
      sparsity: ``[]`` over all leaves, the whole ones included.
      power: as in `erk`.
      dense: as in `erk`. Where these leaves alone exceed what may be kept, all others get 0.

    Returns:
      ``[L]`` float64 in [0, 1].
    """
    _check_power(power)
    raw = np.array([_raw_score(leaf.shape) ** power for leaf in jax.tree.leaves(tree)])
    return _densities(tree, sparsity, raw, dense)


def _by_density(densities: Callable[[Any, jax.Array], jax.Array]) -> AllocationFn:
    """Make an allocation that keeps ``floor(density * size)`` of every leaf."""

    def allocate(scores: Any, sparsity: jax.Array) -> Any:
        leaves, structure = jax.tree.flatten(scores)
        if not leaves:
            return scores
        with jax.enable_x64(True):
            sizes = np.array(trees.sizes(scores), np.float64)
            kept = jnp.floor(densities(scores, sparsity) * sizes * (1.0 + 1e-12)).astype(jnp.int32)
            return jax.tree.unflatten(structure, [kept[i] for i in range(len(leaves))])

    return allocate


def _densities(tree: Any, sparsity: jax.Array, raw: np.ndarray, dense: PrunableFn) -> jax.Array:
    """Share the live weights in proportion to raw scores ``[L]``, as `erk_densities` says."""
    sizes = np.array(trees.sizes(tree), np.float64)
    flags = trees.map_with_path(lambda path, leaf: bool(dense(path, leaf)), tree)
    forced = np.array(jax.tree.leaves(flags), np.bool_)

    levels = np.unique(raw[~forced & (sizes > 0)])[::-1]  # [G] descending
    whole = forced | (raw >= np.append(np.inf, levels)[:, None])  # [G + 1, L]: after each step
    num_whole = np.sum(whole * sizes, axis=1)  # [G + 1]
    share = np.sum(~whole * raw * sizes, axis=1)  # [G + 1]
    with jax.enable_x64(True):
        budget = (1.0 - jax.lax.convert_element_type(sparsity, jnp.float64)) * np.sum(sizes)
        # After the last step nobody is left to share, and that step is always possible.
        scale = jnp.maximum(budget - num_whole, 0.0) / np.where(share > 0, share, 1.0)  # [G + 1]
        possible = scale * np.append(levels, 0.0) <= 1.0
        step = jax.lax.argmax(possible.astype(jnp.int32), 0, jnp.int32)  # the first
        return jnp.where(jnp.asarray(whole)[step], 1.0, scale[step] * raw)


def _raw_score(shape: tuple[int, ...]) -> float:
    size = int(np.prod(shape, dtype=np.int64))
    return max(sum(shape), 1) / size if size else 0.0


def _check_power(power: float) -> None:
    if not 0.0 <= power < float("inf"):
        raise ValueError(f"power must be finite and not negative, got {power}.")
