"""Views: which of its dense weights a client sees in a local step, and which the step may move.

A view works on the prunable leaves; all others are seen and move. For `federated.local_training`'s
`viewed_sgd`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import topk, trees
from fedjaxprune.pruning import selection
from fedjaxprune.types import Broadcast, Masks, Params, PrunableFn, Sight, WeightView


def largest(
    *,
    period: int | None = 1,
    revises: Callable[[jax.Array], jax.Array] | None = None,
    prunable: PrunableFn = masks_lib.is_kernel,
) -> WeightView:
    """See the weights of largest magnitude, as many as the broadcast masks keep, in one pool.

    All weights move. Until the first computation the broadcast masks are in force.

    Args:
      period: local steps from one computation to the next (`WeightView`); None keeps the broadcast
        masks all round.
      revises: ``round [] -> [] bool``, the rounds that do not keep the broadcast masks; None: all.
      prunable: leaves that are ranked.

    References:
      Lin et al., `Dynamic Model Pruning with Feedback <https://arxiv.org/abs/2006.07253>`_, 2020;
      Bengio et al., `Estimating or Propagating Gradients
      <https://arxiv.org/abs/1308.3432>`_, 2013, with a period of 1 step.
    """

    def update(params: Params, broadcast: Broadcast) -> Sight:
        live = _only(broadcast.masks, prunable)
        num_live = sum((trees.count(leaf) for leaf in jax.tree.leaves(live)), start=jnp.int32(0))
        seen = _fill(topk.tree_top_k(_sizes(params, prunable), num_live), params)
        if revises is not None:
            seen = trees.tree_where(revises(broadcast.round), seen, broadcast.masks)
        return Sight(seen)

    return WeightView(init=_broadcast_masks, update=update, period=period)


def best_of_groups(
    *,
    n: int,
    m: int,
    decay: float,
    prunable: PrunableFn = masks_lib.is_kernel,
) -> WeightView:
    """See the `n` largest of every `m` consecutive inputs, and pull the others towards zero.

    All weights move. A weight that is not seen has ``decay * weight`` added to its gradient, so
    that it does not grow unseen. Groups are those of `selection.n_of_m` along axis -2, and are
    chosen before every step.

    Args:
      n: weights seen of every group.
      m: weights in a group.
      decay: of the unseen weights; 0 is plain straight-through.
      prunable: leaves with groups; their axis -2 must be a multiple of `m`.

    Raises:
      ValueError: if a number is out of range; while tracing, as `selection.n_of_m` does.

    References:
      Zhou et al., `Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch
      <https://arxiv.org/abs/2102.04010>`_, 2021.
    """
    if decay < 0.0:
        raise ValueError(f"decay must not be negative, got {decay}.")
    choose = selection.n_of_m(n=n, m=m)

    def update(params: Params, broadcast: Broadcast) -> Sight:
        del broadcast  # the pattern says how many
        chosen = jax.tree.map(lambda size: choose(size, jnp.int32(0)), _sizes(params, prunable))
        return Sight(_fill(chosen, params))

    def penalty(params: Params, sight: Sight) -> jax.Array:
        unseen = jax.tree.map(jnp.logical_not, sight.seen)
        return jnp.float32(decay) * _half_squares(unseen, params)

    return WeightView(_broadcast_masks, update, penalty=penalty if decay else None)


def two_sets(
    *,
    sparsity: float,
    backward_sparsity: float,
    coefficient: float = 0.0,
    explores: Callable[[jax.Array], jax.Array] | None = None,
    prunable: PrunableFn = masks_lib.is_kernel,
    period: int = 1,
) -> WeightView:
    """See the largest weights of every leaf, and move these and some more, the next largest.

    Weights outside the larger set keep their value, and can enter it as others shrink. Both sets
    are chosen among the weights that are live in the broadcast masks.

    Args:
      sparsity: fraction of a leaf that is not seen.
      backward_sparsity: fraction of a leaf that does not move; at most `sparsity`.
      coefficient: of the penalty ``half the sum of squares of the seen weights, and of those that
        move unseen divided by (1 - sparsity)``, which makes it costly to be explored.
      explores: ``round [] -> [] bool``, the rounds in which unseen weights move; None: all.
      prunable: leaves that are ranked.
      period: local steps from one computation to the next (`WeightView`).

    Raises:
      ValueError: if a number is out of range.

    References:
      Jayakumar et al., `Top-KAST <https://arxiv.org/abs/2106.03517>`_, 2021 (the penalty's form and
      the half are inferred).
    """
    if not 0.0 <= backward_sparsity <= sparsity < 1.0:
        raise ValueError(
            "backward_sparsity must lie in [0, sparsity], and sparsity in [0, 1), got "
            f"{backward_sparsity} and {sparsity}."
        )
    if coefficient < 0.0:
        raise ValueError(f"coefficient must not be negative, got {coefficient}.")

    def update(params: Params, broadcast: Broadcast) -> Sight:
        live = _only(broadcast.masks, prunable)
        seen = _largest_by_leaf(_sizes(params, prunable), live, sparsity)
        moves = _largest_by_leaf(_sizes(params, prunable), live, backward_sparsity)
        if explores is not None:
            moves = trees.tree_where(explores(broadcast.round), moves, seen)
        return Sight(_fill(seen, params), _fill(moves, params))

    def penalty(params: Params, sight: Sight) -> jax.Array:
        seen, moves = _only(sight.seen, prunable), _only(sight.may_move, prunable)
        unseen = jax.tree.map(lambda move, see: move & ~see, moves, seen)
        own = _only(params, prunable)
        total = _half_squares(seen, own) + _half_squares(unseen, own) / jnp.float32(1.0 - sparsity)
        return jnp.float32(coefficient) * total

    def init(broadcast: Broadcast) -> Sight:
        return update(broadcast.params, broadcast)

    return WeightView(init, update, period=period, penalty=penalty if coefficient else None)


def _broadcast_masks(broadcast: Broadcast) -> Sight:
    return Sight(broadcast.masks)


def _largest_by_leaf(sizes: Any, live: Masks, sparsity: float) -> Masks:
    """Mark the largest live entries of every leaf, all if there are fewer."""

    def leaf(values: jax.Array, mask: jax.Array) -> jax.Array:
        number = jnp.int32(values.size - round(sparsity * values.size))
        return mask & topk.top_k(jnp.where(mask, values, -jnp.inf), number)

    return jax.tree.map(leaf, sizes, live)


def _half_squares(masks: Masks, params: Params) -> jax.Array:
    squares = jax.tree.map(
        lambda leaf: jnp.sum(jnp.square(leaf), dtype=jnp.float32), masks_lib.apply(masks, params)
    )
    return 0.5 * trees.tree_sum(squares, dtype=jnp.float32)


def _sizes(params: Params, prunable: PrunableFn) -> Any:
    own = _only(params, prunable)
    return jax.tree.map(lambda leaf: jnp.abs(leaf.astype(jnp.float32)), own)


def _only(tree: Any, prunable: PrunableFn) -> Any:
    """Put None in the place of leaves that are not prunable."""
    return trees.map_with_path(lambda path, leaf: leaf if prunable(path, leaf) else None, tree)


def _fill(masks: Any, params: Params) -> Masks:
    """Put masks that keep everything in the place of None."""
    return jax.tree.map(
        lambda mask, leaf: jnp.ones(leaf.shape, jnp.bool_) if mask is None else mask,
        masks,
        params,
        is_leaf=lambda node: node is None,
    )
