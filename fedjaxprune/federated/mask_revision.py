"""How a client revises its own masks, once inside a round, between two of its local steps."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjaxprune import masks as masks_lib
from fedjaxprune import metrics, trees
from fedjaxprune.federated import _optax
from fedjaxprune.traffic import DENSE_GRADIENT, EXTRA_GRADIENT
from fedjaxprune.types import Batch, Broadcast, Key, Masks, Params, State

# (key, masks, local parameters, gradient of all weights or scores, broadcast) -> masks
RevisionFn = Callable[[Key, Masks, Params, Any, Broadcast], Masks]
LossFn = Callable[[Params, State, Batch, Key], tuple[jax.Array, Any]]
# (params, model_state, batch, key) -> ((loss, (model_state, metrics)), gradient, scores)
JudgeFn = Callable[[Params, State, Batch, Key], tuple[Any, Params, Any]]

_NO_STEP = 2**32 - 1  # folded into the steps' key in the place of a number, which is below 2^31


class Judgement(NamedTuple):
    """What weights are worth, measured in the local steps themselves.

    Attributes:
      judge: ``(params, model_state, batch, key) -> ((loss, aux), gradient, scores)``, in the place
        of the loss and its gradient, without penalties; scores are any tree of float32.
      report: ``(scores, masks before, masks after) -> tree of the parameters``, the field `scores`
        of the message.
      num_steps_before: ``[] -> []`` int32, of a client's local steps those before the scores are
        measured anew, under the revised masks: these are reported. None reports those by which the
        masks were revised.
    """

    judge: JudgeFn
    report: Callable[[Any, Masks, Masks], Params]
    num_steps_before: Callable[[jax.Array], jax.Array] | None = None


class MaskRevision(NamedTuple):
    """How a client revises its own masks, once inside a round.

    Attributes:
      masks: ``(key, masks, params, grads, broadcast) -> masks``; `params` are the local ones at
        this time, `grads` the gradient of the loss (without penalties) with respect to *all*
        weights, pruned ones included, at these parameters and on the batch of the last step.
      is_due: ``round [] -> [] bool``, the rounds in which masks are revised.
      num_steps_before: ``[] -> []`` int32, of a client's local steps those before the revision.
      judgement: if given, `masks` receives in the place of the gradient the mean scores of all
        steps before the revision, and no further batch is looked at.
    """

    masks: RevisionFn
    is_due: Callable[[jax.Array], jax.Array]
    num_steps_before: Callable[[jax.Array], jax.Array]
    judgement: Judgement | None = None


class Scored(NamedTuple):
    """Scores in the making.

    Attributes:
      sums: tree of scores, added up over steps.
      num_steps: ``[]`` int32, so many.
      dense: accumulator of the share of examples of which scores were taken.
    """

    sums: Any
    num_steps: jax.Array
    dense: metrics.Mean

    def mean(self) -> Any:
        """Average over the steps; zeros without any."""
        count = jnp.maximum(self.num_steps, 1).astype(jnp.float32)
        return jax.tree.map(lambda leaf: leaf / count, self.sums)


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


def with_penalties(
    judge: JudgeFn,
    penalties: Sequence[Callable[[Params, Broadcast], jax.Array]],
    broadcast: Broadcast,
) -> JudgeFn:
    """Add penalties to the loss and the gradient that a judge gives, and not to its scores."""
    if not penalties:
        return judge

    def penalty(params: Params) -> jax.Array:
        terms = [one(params, broadcast).astype(jnp.float32) for one in penalties]
        return functools.reduce(jnp.add, terms)

    def judge_fn(params: Params, *given: Any) -> tuple[Any, Params, Any]:
        (value, aux), grads, scores = judge(params, *given)
        more, slopes = jax.value_and_grad(penalty)(params)
        grads = jax.tree.map(jnp.add, grads, slopes)
        return (value.astype(jnp.float32) + more, aux), grads, scores

    return judge_fn


def nothing_seen(revision: Any, judge: JudgeFn | None, *given: Any) -> Any:
    """Make what a client notes for its revision, if it has one, before the first step.

    It is `Scored` with a judge, of whose arguments shapes will do, else an accumulator.
    """
    if revision is None:
        return ()
    if judge is None:
        return metrics.zero()
    shapes = jax.eval_shape(judge, *given)[2]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return Scored(zeros, jnp.int32(0), metrics.zero())


def differentiate(
    objective: Callable[..., Any],
    judge: JudgeFn,
    is_judged: jax.Array,
    scored: Scored,
    given: tuple[Params, State, Batch, Key],
) -> tuple[tuple[Any, Params], Scored]:
    """Take the gradient of a step; where it is judged, its scores as well, and add them up.

    Args:
      objective: ``(params, model_state, batch, key) -> (loss, aux)``.
      judge: of the same loss.
      is_judged: ``[]`` bool, the same for clients side by side, else both forms are computed.
      scored: sums before the step.
      given: what both functions take.
    """

    def look(sums: Any, *given: Any) -> Any:
        found, grads, scores = judge(*given)
        return (found, grads), jax.tree.map(jnp.add, sums, scores)

    def pass_by(sums: Any, *given: Any) -> Any:
        return jax.value_and_grad(objective, has_aux=True)(*given), sums

    found, sums = jax.lax.cond(is_judged, look, pass_by, scored.sums, *given)
    size = jnp.sum(given[2].weights)
    seen = metrics.Mean(total=jnp.where(is_judged, size, jnp.zeros_like(size)), weight=size)
    num_steps = scored.num_steps + is_judged.astype(jnp.int32)
    return found, Scored(sums, num_steps, metrics.merge(scored.dense, seen))


def in_phases(
    key: Key, revision: MaskRevision, work: Work, step_fn: Callable[..., Any], progress: Any
) -> tuple[Masks, Any]:
    """Take the steps before the revision, revise the masks if that is due, take the other steps.

    All phases are one loop's, so that a step is compiled once. The revision stands outside the
    loop over steps, since of clients side by side (``vmap``) each has its own number of them: a
    condition inside it would be computed in every step.

    Args:
      key: of the local steps.
      revision: when and how.
      work: of the client.
      step_fn: ``(masks, step, progress) -> progress``; with a judgement it also takes `is_judged`.
      progress: has `local` with `params`, `optimizer` and `model_state`, and `extra`: the
        accumulator of the examples of which the revision takes a gradient, or `Scored`.

    Returns:
      The masks at the end, and the progress. Without steps the masks do not change.
    """
    judgement = revision.judgement
    num_before = jnp.minimum(revision.num_steps_before(work.num_steps), work.num_steps)
    loss_key, masks_key = jax.random.split(jax.random.fold_in(key, _NO_STEP))

    def gradient(local):
        batch = work.batch_at(jnp.maximum(num_before - 1, 0))
        grads = jax.grad(lambda params: work.loss(params, local.model_state, batch, loss_key)[0])(
            local.params
        )
        return grads, metrics.Mean(total=jnp.sum(batch.weights), weight=jnp.float32(1.0))

    def revise(masks, progress):
        local = progress.local
        if judgement is None:
            evidence, extra = gradient(local)
        else:
            evidence, extra = progress.extra.mean(), _anew(progress.extra, judgement)
        revised = revision.masks(masks_key, masks, local.params, evidence, work.broadcast)
        masks = trees.tree_where(work.num_steps > 0, revised, masks)
        local = local._replace(
            params=masks_lib.apply(masks, local.params),
            optimizer=_optax.zero_pruned(work.optimizer, local.optimizer, masks),
        )
        return masks, progress._replace(local=local, extra=extra)

    before_again = None if judgement is None else judgement.num_steps_before

    def bounds(phase, is_first):
        if before_again is None:
            begin = jnp.where(is_first, jnp.int32(0), num_before)
            return begin, jnp.where(is_first, num_before, work.num_steps)
        again = jnp.clip(before_again(work.num_steps), num_before, work.num_steps)
        ends = jnp.stack([jnp.int32(0), num_before, again, work.num_steps])
        return ends[phase], ends[phase + 1]

    def phase_fn(phase, carry):
        masks, progress = carry
        is_first = phase == 0
        begin, end = bounds(phase, is_first)
        options = {}
        if judgement is not None:
            is_looked_at = is_first | (phase == 2)
            options = {"is_judged": is_looked_at & revision.is_due(work.broadcast.round)}
        take = functools.partial(step_fn, masks, **options)
        progress = jax.lax.fori_loop(begin, end, take, progress)
        is_due = is_first & revision.is_due(work.broadcast.round)
        return jax.lax.cond(is_due, revise, lambda *same: same, masks, progress)

    num_phases = 2 if before_again is None else 3
    return jax.lax.fori_loop(0, num_phases, phase_fn, (work.broadcast.masks, progress))


def reported(revision: MaskRevision, progress: Any, before: Masks, after: Masks) -> dict[str, Any]:
    """List the fields of the message that tell of a revision, its part of the metrics included."""
    if revision.judgement is None:
        seen = {**progress.metrics, EXTRA_GRADIENT: progress.extra}
        return {"metrics": seen, "masks": after}
    return {
        "metrics": {**progress.metrics, DENSE_GRADIENT: progress.extra.dense},
        "masks": after,
        "scores": revision.judgement.report(progress.extra.mean(), before, after),
    }


def _anew(scored: Scored, judgement: Judgement) -> Scored:
    """Forget the scores by which masks were revised, if others are to be reported."""
    if judgement.num_steps_before is None:
        return scored
    sums = jax.tree.map(jnp.zeros_like, scored.sums)
    return scored._replace(sums=sums, num_steps=jnp.zeros_like(scored.num_steps))
