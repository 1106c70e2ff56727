"""How a client revises its own masks, once inside a round, between two of its local steps."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjaxprune import masks as masks_lib
from fedjaxprune import metrics, trees
from fedjaxprune.federated import _optax
from fedjaxprune.types import Batch, Broadcast, Key, Masks, Params

# (key, masks, local parameters, gradient of all weights, broadcast) -> masks
RevisionFn = Callable[[Key, Masks, Params, Params, Broadcast], Masks]

_NO_STEP = 2**32 - 1  # folded into the steps' key in the place of a number, which is below 2^31


class MaskRevision(NamedTuple):
    """How a client revises its own masks, once inside a round.

    Attributes:
      masks: ``(key, masks, params, grads, broadcast) -> masks``; `params` are the local ones at
        this time, `grads` the gradient of the loss (without penalties) with respect to *all*
        weights, pruned ones included, at these parameters and on the batch of the last step.
      is_due: ``round [] -> [] bool``, the rounds in which masks are revised.
      num_steps_before: ``[] -> []`` int32, of a client's local steps those before the revision.
    """

    masks: RevisionFn
    is_due: Callable[[jax.Array], jax.Array]
    num_steps_before: Callable[[jax.Array], jax.Array]


class Work(NamedTuple):
    """What of a client's local work a revision asks for.

    Attributes:
      loss: ``(params, model_state, batch, key) -> (loss, aux)``, without penalties.
      optimizer: the local one, whose memory of dropped weights is forgotten.
      broadcast: what the client started from.
      batch_at: ``step [] -> Batch``.
      num_steps: ``[]`` int32, of the client in this round.
    """

    loss: Callable[..., tuple[jax.Array, Any]]
    optimizer: optax.GradientTransformation
    broadcast: Broadcast
    batch_at: Callable[[jax.Array], Batch]
    num_steps: jax.Array


def after_epochs(num_before: int, *, num_epochs: int) -> Callable[[jax.Array], jax.Array]:
    """Count the local steps of the first `num_before` of `num_epochs` passes: ``[] -> []`` int32.

    Args:
      num_before: passes before the revision; 0 revises before the first step.
      num_epochs: passes that a client makes in a round, all of the same number of steps.

    Raises:
      ValueError: if there are fewer passes than that.
    """
    if not 0 <= num_before <= num_epochs:
        raise ValueError(
            f"num_before must lie between 0 and num_epochs ({num_epochs}), got {num_before}."
        )
    return lambda num_steps: num_steps // num_epochs * num_before


def in_two_phases(
    key: Key, revision: MaskRevision, work: Work, step_fn: Callable[..., Any], progress: Any
) -> tuple[Masks, Any]:
    """Take the steps before the revision, revise the masks if that is due, take the other steps.

    Both phases are one loop's, so that a step is compiled once. The revision stands outside the
    loop over steps, since of clients side by side (``vmap``) each has its own number of them: a
    condition inside it would be computed in every step.

    Args:
      key: of the local steps.
      revision: when and how.
      work: of the client.
      step_fn: ``(masks, step, progress) -> progress``.
      progress: has `local` with `params`, `optimizer` and `model_state`, and the accumulator
        `extra` of the examples of which the revision takes a gradient.

    Returns:
      The masks at the end, and the progress. Without steps the masks do not change.
    """
    num_before = jnp.minimum(revision.num_steps_before(work.num_steps), work.num_steps)
    loss_key, masks_key = jax.random.split(jax.random.fold_in(key, _NO_STEP))

    def revise(masks, progress):
        local = progress.local
        batch = work.batch_at(jnp.maximum(num_before - 1, 0))
        grads = jax.grad(lambda params: work.loss(params, local.model_state, batch, loss_key)[0])(
            local.params
        )
        revised = revision.masks(masks_key, masks, local.params, grads, work.broadcast)
        masks = trees.tree_where(work.num_steps > 0, revised, masks)
        local = local._replace(
            params=masks_lib.apply(masks, local.params),
            optimizer=_optax.zero_pruned(work.optimizer, local.optimizer, masks),
        )
        seen = metrics.Mean(total=jnp.sum(batch.weights), weight=jnp.float32(1.0))
        return masks, progress._replace(local=local, extra=seen)

    def phase_fn(phase, carry):
        masks, progress = carry
        is_first = phase == 0
        begin = jnp.where(is_first, jnp.int32(0), num_before)
        end = jnp.where(is_first, num_before, work.num_steps)
        progress = jax.lax.fori_loop(begin, end, functools.partial(step_fn, masks), progress)
        is_due = is_first & revision.is_due(work.broadcast.round)
        return jax.lax.cond(is_due, revise, lambda *same: same, masks, progress)

    return jax.lax.fori_loop(0, 2, phase_fn, (work.broadcast.masks, progress))
