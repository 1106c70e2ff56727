"""Local steps that see their weights through a view, which is computed anew inside a round."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import trees
from fedjaxprune.types import Broadcast, Params, Sight, WeightView


def of_broadcast() -> WeightView:
    """See the weights under the broadcast masks in all steps; all of them may move."""

    def init(broadcast):
        return Sight(broadcast.masks)

    return WeightView(init=init, update=lambda params, broadcast: init(broadcast), period=None)


def own_term(view: WeightView | None, sight: Sight) -> Callable[[Params], jax.Array] | None:
    """Give what a view adds to the loss, of the dense weights; None for nothing."""
    if view is None or view.penalty is None:
        return None
    penalty = view.penalty
    return lambda params: penalty(params, sight)


def in_steps(
    view: WeightView,
    broadcast: Broadcast,
    num_steps: jax.Array,
    step_fn: Callable[..., Any],
    progress: Any,
) -> Any:
    """Take all local steps, each through the view that is in force.

    A view that is computed every few steps is a loop of its own around the steps, since of clients
    side by side (``vmap``) a condition inside a step would be computed in every step.

    Args:
      view: what is seen.
      broadcast: what the client started from.
      num_steps: ``[]`` int32, of the client in this round.
      step_fn: ``(sight, step, progress) -> progress``.
      progress: has `local` with `params`.

    Raises:
      ValueError: while tracing, if the view's period is no positive number of steps.
    """
    period, zero = view.period, jnp.int32(0)
    if period is not None and period < 1:
        raise ValueError(f"the period of a view must be at least 1 step or None, got {period}.")
    if period is None:
        fixed = functools.partial(step_fn, view.init(broadcast))
        return jax.lax.fori_loop(zero, num_steps, fixed, progress)
    if period == 1:

        def anew(step, progress):
            return step_fn(view.update(progress.local.params, broadcast), step, progress)

        return jax.lax.fori_loop(zero, num_steps, anew, progress)

    def block_fn(block, carry):
        sight, progress = carry
        is_first = block == 0
        sight = trees.tree_where(is_first, sight, view.update(progress.local.params, broadcast))
        begin = jnp.where(is_first, zero, block * period - 1)
        end = jnp.minimum((block + 1) * period - 1, num_steps)
        body = functools.partial(step_fn, sight)
        return sight, jax.lax.fori_loop(begin, end, body, progress)

    num_blocks = num_steps // period + 1
    start = (view.init(broadcast), progress)
    return jax.lax.fori_loop(zero, num_blocks, block_fn, start)[1]
