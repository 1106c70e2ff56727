"""Movement pruning: rank weights by how far the clients moved them.

The score (*guidance*) is the mean over clients of each weight's squared deviation. Scores are
scaled to be comparable between leaves, may be multiplied by the clients' agreement, and the lowest
in the whole model are pruned.

References:
  Internò et al., `AutoFLIP <https://arxiv.org/abs/2405.10271>`_, 2024; the versions of 2026 use the
  clients' agreement.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import topk
from fedjaxprune.pruning import allocation as allocations
from fedjaxprune.pruning import pruners, scores
from fedjaxprune.types import Masks, Params, PrunableFn, Pruner

# (values [...], live [...] bool) -> [...] float32; only live entries are read
ScaleFn = Callable[[jax.Array, jax.Array], jax.Array]
Agreement = Literal["none", "scaled", "majority"]


def min_max(values: jax.Array, live: jax.Array) -> jax.Array:
    """Scale a leaf's live values to [0, 1]; equal values become 0."""
    low = jnp.min(jnp.where(live, values, jnp.inf), initial=jnp.inf)
    high = jnp.max(jnp.where(live, values, -jnp.inf), initial=-jnp.inf)
    return _scale(values, live, low, high - low)


def robust(values: jax.Array, live: jax.Array) -> jax.Array:
    """Subtract the median of a leaf's live values and divide by their interquartile range.

    If the range is 0, all values become 0. Outliers matter less than in `min_max`.
    """
    known = jnp.where(live, values, jnp.nan)
    low, middle, high = jnp.nanquantile(known, jnp.array([0.25, 0.5, 0.75]))
    return _scale(values, live, middle, high - low)


def ranks(values: jax.Array, live: jax.Array) -> jax.Array:
    """Replace a leaf's live values by their ranks, from 0 to 1, so that all leaves prune alike.

    Of equal values the lower flat index ranks higher, as in `topk.top_k`.
    """
    flat = jnp.where(live, values, -jnp.inf).ravel()[::-1]
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    places = jnp.zeros(flat.shape, jnp.int32)
    places = places.at[order].set(jnp.arange(flat.size, dtype=jnp.int32))[::-1]
    num_live = jnp.sum(live, dtype=jnp.int32)
    above_dead = (places.reshape(live.shape) - (live.size - num_live)).astype(jnp.float32)
    share = above_dead / jnp.maximum(num_live - 1, 1).astype(jnp.float32)
    return jnp.where(live, share, jnp.zeros_like(share))


def plain(values: jax.Array, live: jax.Array) -> jax.Array:
    """Leave a leaf's live values as they are."""
    return jnp.where(live, values, jnp.zeros_like(values))


def votes(
    deviations: Params, masks: Masks, *, sparsity: float, scale: ScaleFn, prunable: PrunableFn
) -> Params:
    """Compute one client's votes: the live weights that it would keep by its own deviations.

    These are the highest-scoring share ``1 - sparsity`` of the live prunable weights of the whole
    model, after scaling each leaf: at most ``size - round(sparsity * size)`` of them. Weights that
    tie with the best one left out get no vote: otherwise clients would agree, by array index, on
    weights that none of them moved.

    Args:
      deviations: of one client.
      masks: live weights.
      sparsity: share of them that gets no vote, in [0, 1).
      scale: as in `by_movement`.
      prunable: which leaves are voted on; all others get every vote.

    Returns:
      1.0 for a vote, else 0.0: their mean over clients is the agreement.
    """
    flags = masks_lib.prunable_leaves(masks, prunable)
    leaves, structure = jax.tree.flatten(deviations)
    own = zip(leaves, jax.tree.leaves(masks), flags, strict=True)
    ranked = [jnp.where(live, scale(values, live), -jnp.inf) for values, live, flag in own if flag]
    num_live = sum((jnp.sum(leaf > -jnp.inf, dtype=jnp.int32) for leaf in ranked), jnp.int32(0))
    with jax.enable_x64(True):
        size = num_live.astype(jnp.float64)
        num_kept = (size - jnp.round(sparsity * size)).astype(jnp.int32)
    best = topk.tree_top_k(ranked, num_kept)
    order = [topk.order_keys(leaf) for leaf in ranked]
    left_out = jnp.uint32(0)  # below all that is live
    for keys, chosen in zip(order, best, strict=True):
        left_out = jnp.maximum(left_out, jnp.max(jnp.where(chosen, jnp.uint32(0), keys), initial=0))
    kept = (chosen & (keys > left_out) for keys, chosen in zip(order, best, strict=True))
    given = [
        next(kept).astype(jnp.float32) if flag else jnp.ones(leaf.shape, jnp.float32)
        for leaf, flag in zip(leaves, flags, strict=True)
    ]
    return jax.tree.unflatten(structure, given)


def by_movement(
    sparsity: float, *, scale: ScaleFn = min_max, agreement: Agreement = "none"
) -> Pruner:
    """Keep the weights of the highest guidance in the whole model, and at least one of every leaf.

    The guidance of a live weight is its scaled mean deviation. A pruned weight, which no client
    moves, keeps its last guidance, so that it returns when live weights fall below it. The number
    of live weights is exact: ``size - round(sparsity * size)``.

    Args:
      sparsity: pruned fraction in [0, 1).
      scale: makes leaves comparable: `min_max` (published), `ranks`, `robust` or `plain`.
      agreement: ``"scaled"`` multiplies the guidance by the agreement, the share of clients that
        vote for the weight; ``"majority"`` prunes weights with less than half of the votes, so that
        more may be pruned than `sparsity` says.

    Returns:
      A `Pruner` that reads ``inputs.statistics``: `deviations`, the mean over clients, and, with
      `agreement`, also `agreement`, the mean of `votes`. Its state is the guidance.

    Raises:
      ValueError: if an option is out of range; while tracing, if a statistic is missing.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}.")
    if agreement not in ("none", "scaled", "majority"):
        raise ValueError(f"agreement must be 'none', 'scaled' or 'majority', got {agreement!r}.")
    if agreement == "scaled" and scale is robust:
        raise ValueError(
            "agreement must be 'none' or 'majority' with the scale `robust`, whose guidance may be "
            "negative and would rank lower the more clients agree, got 'scaled'."
        )
    weigh = {
        "scaled": jnp.multiply,
        "majority": lambda leaf, share: jnp.where(share >= 0.5, leaf, -jnp.inf),
    }
    needed = ("deviations",) if agreement == "none" else ("deviations", "agreement")
    best = pruners.prune_to(
        sparsity, score=scores.value, allocation=allocations.global_pool(least=1)
    )

    def init_fn(params):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)

    def update_fn(key, masks, state, inputs):
        missing = [name for name in needed if name not in dict(inputs.statistics)]
        if missing:
            raise ValueError(
                "movement.by_movement ranks weights by the clients' deviations, but "
                f"PrunerInputs.statistics lacks {', '.join(missing)}."
            )
        fresh = jax.tree.map(scale, inputs.statistics["deviations"], masks)
        if agreement != "none":
            fresh = jax.tree.map(weigh[agreement], fresh, inputs.statistics["agreement"])
        guide = jax.tree.map(jnp.where, masks, fresh, state)
        kept, _ = best.update(key, masks_lib.full(masks), (), inputs._replace(params=guide))
        if agreement == "majority":
            kept = jax.tree.map(_outvote, kept, guide)
        return kept, guide

    return Pruner(init=init_fn, update=update_fn)


def _scale(values: jax.Array, live: jax.Array, origin: jax.Array, width: jax.Array) -> jax.Array:
    """Measure live values from `origin` in units of `width`; all become 0 where that is 0."""
    divisor = jnp.where(width > 0, width, jnp.ones_like(width))
    return jnp.where(live & (width > 0), (values - origin) / divisor, jnp.zeros_like(values))


def _outvote(kept: jax.Array, guide: jax.Array) -> jax.Array:
    """Prune the weights without a majority, but keep one if the leaf would lose all."""
    wanted = kept & ~jnp.isneginf(guide)
    return jnp.where(jnp.any(wanted), wanted, kept & topk.top_k(guide, jnp.int32(1)))
