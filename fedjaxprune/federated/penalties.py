"""Terms that are added to the loss of every local step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.types import Broadcast, Params, PrunableFn, Schedule

PenaltyFn = Callable[[Params, Broadcast], jax.Array]
"""``(local parameters, broadcast) -> [] `` added to the loss of every local step."""


def proximal(*, mu: float) -> PenaltyFn:
    """Pull local parameters towards the broadcast ones: ``mu / 2 * ||w - w_t||^2``.

    Raises:
      ValueError: `mu` is negative.

    References:
      Li et al., `FedProx <https://arxiv.org/abs/1812.06127>`_, 2020.
    """
    if mu < 0.0:
        raise ValueError(f"mu must not be negative, got {mu}.")

    def penalty(params, broadcast):
        start = masks_lib.apply(broadcast.masks, broadcast.params)
        squares = jax.tree.map(
            lambda here, there: jnp.sum(jnp.square(here - there), dtype=jnp.float32), params, start
        )
        return 0.5 * mu * trees.tree_sum(squares, dtype=jnp.float32)

    return penalty


def layer_norms(*, coefficient: Schedule, prunable: PrunableFn) -> PenaltyFn:
    """Add ``coefficient(round)`` times the sum of the layers' Euclidean norms (not squared).

    It is a group lasso with one group a layer. The gradient of an all-zero layer is defined as
    zero. Weights below 1e-19 count as zeros, as float32 has no squares of them.
    """

    def norm(path, leaf):
        if not prunable(path, leaf):
            return jnp.float32(0.0)
        square = jnp.sum(jnp.square(leaf), dtype=jnp.float32)
        positive = square > 0
        root = jnp.sqrt(jnp.where(positive, square, jnp.ones_like(square)))
        return jnp.where(positive, root, jnp.zeros_like(root))

    def penalty(params, broadcast):
        norms = trees.map_with_path(norm, params)
        factor = jnp.asarray(coefficient(broadcast.round), jnp.float32)
        return factor * trees.tree_sum(norms, dtype=jnp.float32)

    return penalty
