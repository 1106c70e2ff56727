"""Candidate pools: several random layer densities for one set of weights.

A candidate is a list of counts, one for each layer; its mask keeps that many of the largest weights
of the layer. A pool is therefore a small table ``[candidates, layers]``, from which masks are made
when they are needed.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import trees
from fedjaxprune.pruning import allocation
from fedjaxprune.topk import top_k
from fedjaxprune.types import Key, Masks, Params, PrunableFn

NUM_TRIES = 10_000  # draws of a candidate; then the closest one is taken
TOLERANCE = 0.02  # relative, of the density of a candidate: fixed in FedTiny's code


def pool_size(density: float) -> int:
    """Choose the size at which sending the pool costs a tenth of a dense model: ``0.1 / density``.

    It is at least 1.

    Raises:
      ValueError: `density` is outside (0, 1].

    References:
      Huang et al., `FedTiny <https://arxiv.org/abs/2212.01977>`_, 2023.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1], got {density}.")
    return max(1, round(0.1 / density))


def noisy_counts(
    key: Key,
    sizes: np.ndarray,
    densities: np.ndarray,
    *,
    noise: float,
    num_wanted: float,
    tolerance: float,
) -> jax.Array:
    """Draw one candidate: layer densities with noise whose total is close to `num_wanted`.

    Layer `l` keeps ``max(floor(densities[l] * (1 + u) * sizes[l]), 1)`` weights with ``u`` uniform
    in ``(-noise, noise)``. If the total misses `num_wanted` by `tolerance` or more, all layers are
    drawn again. After 10,000 draws the closest one is taken, as a small network may have no counts
    that are close enough. If all weights are wanted, all are kept, without a draw.

    Args:
      key: of the draw.
      sizes: ``[layers]`` integers.
      densities: ``[layers]`` in [0, 1], the center of the draws.
      noise: largest relative deviation, in [0, 1].
      num_wanted: live weights of all layers together.
      tolerance: weights by which the total may differ from it.

    Returns:
      ``[layers]`` int32.
    """
    if num_wanted >= sizes.sum():
        return jnp.asarray(sizes, jnp.int32)
    with jax.enable_x64(True):
        base = jnp.asarray(densities, jnp.float64)
        whole = jnp.asarray(sizes, jnp.float64)

        def draw(step):
            own = jax.random.fold_in(key, step)
            u = jax.random.uniform(own, base.shape, jnp.float32, -noise, noise)
            return counts_of(base * (1.0 + u.astype(jnp.float64)), whole)

        def miss(counts):
            return jnp.abs(jnp.sum(counts.astype(jnp.float64)) - num_wanted)

        def unfinished(carry):
            step, _, best = carry
            return (step < NUM_TRIES) & (best >= tolerance)

        def again(carry):
            step, counts, best = carry
            new = draw(step)
            is_better = miss(new) < best
            counts = jnp.where(is_better, new, counts)
            return step + jnp.int32(1), counts, jnp.minimum(best, miss(new))

        first = draw(jnp.int32(0))
        _, counts, _ = jax.lax.while_loop(unfinished, again, (jnp.int32(1), first, miss(first)))
    return counts


def counts_of(densities: jax.Array, sizes: jax.Array) -> jax.Array:
    """Turn layer densities into counts: ``max(floor(density * size), 1)``, at most the size.

    Both ``[layers]`` float64; a product within a part in 10¹² below an integer counts as it.
    """
    kept = jnp.floor(jnp.clip(densities, 0.0, 1.0) * sizes * (1.0 + 1e-12))
    return jnp.minimum(jnp.maximum(kept, 1.0), sizes).astype(jnp.int32)


def uniform(params: Params, share: float, prunable: PrunableFn) -> np.ndarray:
    """Give every prunable leaf the same density: ``[layers]`` float64."""
    return np.full(len(sizes_of(params, prunable)), share, np.float64)


def erk(params: Params, share: float, prunable: PrunableFn) -> np.ndarray:
    """Give small layers more, as `allocation.erk_densities` does: ``[layers]`` float64."""
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
        for path, leaf in trees.items(params)
        if prunable(path, leaf)
    ]
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return np.asarray(allocation.erk_densities(leaves, jnp.float64(1.0 - share)))


def sizes_of(params: Params, prunable: PrunableFn) -> np.ndarray:
    """List the sizes of the prunable leaves: ``[layers]`` int64."""
    sizes = [leaf.size for path, leaf in trees.items(params) if prunable(path, leaf)]
    return np.array(sizes, np.int64)


def by_magnitude(params: Params, counts: jax.Array, prunable: PrunableFn) -> Masks:
    """Make a candidate's masks: keep the given number of the largest weights of each leaf.

    Args:
      params: dense weights that the pool was made for.
      counts: ``[layers]`` int32, for the prunable leaves.
      prunable: which leaves may be pruned; all others are kept whole.
    """
    rows = iter(range(counts.shape[0]))

    def kept(path, leaf):
        if not prunable(path, leaf):
            return jnp.ones(leaf.shape, jnp.bool_)
        return top_k(jnp.abs(leaf.astype(jnp.float32)), counts[next(rows)])

    return trees.map_with_path(kept, params)
