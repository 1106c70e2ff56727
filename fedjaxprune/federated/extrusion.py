"""Press weights that are to go towards zero, so that others take over what they know.

A client marks them once a round, in the broadcast (``step_scales.deriving(client, MARKED, ...)``).

References:
  Huang et al., `FedMef: Towards Memory-efficient Federated Dynamic Pruning
  <https://arxiv.org/abs/2403.14737>`_, 2024.
"""

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.federated.penalties import PenaltyFn
from fedjaxprune.federated.step_scales import StepScale
from fedjaxprune.topk import top_k
from fedjaxprune.types import Broadcast, Masks, Params, Schedule

MARKED = "marked"  # what a client derives: masks of the weights that are to go


def marked(params: Params, masks: Masks, counts: Params) -> Masks:
    """Mark the smallest live weights of each leaf; `counts` says how many, ``[]`` int32 a leaf."""

    def leaf(values, mask, count):
        sizes = jnp.where(mask, jnp.abs(values.astype(jnp.float32)), -jnp.inf)
        return mask & ~top_k(sizes, jnp.sum(mask, dtype=jnp.int32) - count)

    return jax.tree.map(leaf, params, masks, counts)


def penalty(coefficient: float) -> PenaltyFn:
    """Add ``coefficient`` times the sum of squares of the marked weights to the loss."""

    def penalty_fn(params, broadcast):
        return jnp.float32(coefficient) * _square(params, broadcast)

    return penalty_fn


def held_up(schedule: Schedule) -> StepScale:
    """Make the factor on a step's updates: the scheduled one, or what extrusion asks for."""

    def compute(params, broadcast, step, num_steps):
        rate = extruding_rate(jnp.sqrt(_square(params, broadcast)), step, num_steps)
        return jnp.maximum(jnp.asarray(schedule(broadcast.round), jnp.float32), rate)

    return StepScale(compute)


def extruding_rate(norm: jax.Array, step: jax.Array, num_steps: jax.Array) -> jax.Array:
    """Compute the least factor on the first rate, ``[]`` in [0, 1): it falls as the round passes.

    Args:
      norm: ``[]``, Euclidean norm of the marked weights.
      step: ``[]`` int32, from 0.
      num_steps: ``[]`` int32, of the round.
    """
    left = 2.0 * (num_steps - step).astype(jnp.float32)
    budget = left / (2 * num_steps - step).astype(jnp.float32)
    return budget * jnp.tanh(0.5 * norm)  # 2 sigmoid(norm) - 1


def _square(params: Params, broadcast: Broadcast) -> jax.Array:
    """Add up the squares of the marked weights."""
    own = masks_lib.apply(broadcast.announced[MARKED], params)
    squares = jax.tree.map(lambda leaf: jnp.sum(jnp.square(leaf), dtype=jnp.float32), own)
    return trees.tree_sum(squares, dtype=jnp.float32)
