"""One client's local work, written plainly: no client axis, no client index."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjaxprune import masks as masks_lib
from fedjaxprune import metrics, trees
from fedjaxprune.traffic import DENSE_GRADIENT
from fedjaxprune.types import (
    Batch,
    Batcher,
    Broadcast,
    Client,
    Key,
    Message,
    Metrics,
    Params,
    PrunableFn,
    Schedule,
    State,
)

LossFn = Callable[[Params, State, Batch, Key], tuple[jax.Array, tuple[State, Metrics]]]
StepPredicate = Callable[[jax.Array, jax.Array], jax.Array]  # (step [], steps []) -> [] bool
PenaltyFn = Callable[[Params, Broadcast], jax.Array]
"""``(local parameters, broadcast) -> [] `` added to the loss of every local step."""


def proximal(*, mu: float) -> PenaltyFn:
    """Pull local parameters towards the broadcast ones: ``mu / 2 * ||w - w_t||^2``.

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
    zero.
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


def last_step(step: jax.Array, num_steps: jax.Array) -> jax.Array:
    """Pick the last local step, ``([], []) -> []`` bool: the last batch of the last epoch."""
    return step == num_steps - 1


class Local(NamedTuple):
    """What a local step changes.

    Attributes:
      params: local parameters.
      optimizer: the optimizer's state.
      model_state: what is not trained.
    """

    params: Params
    optimizer: State
    model_state: State


class LocalStep(NamedTuple):
    """A local step that has been taken, for those who have a say in it.

    Attributes:
      before: what the step started from.
      after: where it led.
      metrics: the loss's, of the step's batch.
      step: ``[]`` int32.
      num_steps: ``[]`` int32, of the client in this round.
    """

    before: Local
    after: Local
    metrics: Metrics
    step: jax.Array
    num_steps: jax.Array


PostStepFn = Callable[[LocalStep], Local]  # decides what of a step holds


class _Progress(NamedTuple):
    """Where a client stands between two local steps."""

    params: Params
    optimizer: State
    model_state: State
    grads: Params
    num_reported: jax.Array
    local_grads: Params
    metrics: Metrics
    dense: Metrics


def local_sgd(
    loss: LossFn,
    *,
    batcher: Batcher,
    optimizer: optax.GradientTransformation,
    learning_rate_scale: Schedule | None = None,
    penalties: Sequence[PenaltyFn] = (),
    report_grads: Callable[[jax.Array], jax.Array] | None = None,
    report_steps: StepPredicate | None = None,
    post_step: PostStepFn | None = None,
) -> Client:
    """Train the live weights: gradients are masked, and pruned entries stay exact zeros.

    Args:
      loss: ``(params, model_state, batch, key) -> (loss, (model_state, metrics))``, as in a
        `Model`.
      batcher: how the client's examples become local steps.
      optimizer: any optax transformation; its state starts afresh every round. One that draws
        random numbers from a key of its own (``optax.add_noise``) therefore draws the same ones for
        every client and round: add noise in the loss instead.
      learning_rate_scale: factor on the optimizer's updates, by round (an optax schedule fits);
        constant inside a round. Without it updates are taken as they are.
      penalties: terms added to the loss of every step.
      report_grads: if given, the message carries `grads`, the mean over the local steps of the
        gradient with respect to *all* weights, pruned ones included, in the rounds for which this
        predicate holds (zeros in the others, and then at no cost). A pruner that grows by gradient
        must be due in these rounds only, else it ranks zeros.
      report_steps: of which local steps `grads` is the mean (`last_step`); all by default. The
        gradient is the one that the step is about to follow.
      post_step: decides after each step what of it holds (a part may be taken back, small weights
        become zero); the masks have the last word. All of it holds by default.

    Returns:
      A `Client` without state of its own. Its message has the fields `delta`, `model_state` (a
      delta too), `metrics` and, if asked for, `grads` (the metrics then say at how many examples
      they were taken: `traffic.DENSE_GRADIENT`); its weight is the number of examples. Where the
      broadcast has a `correction`, the steps follow the gradient plus the correction, and
      `local_grads` is the mean over all steps of the gradient without it.
    """
    reports = _Reports(report_grads, report_steps)
    return _client(
        loss,
        batcher,
        optimizer,
        learning_rate_scale,
        penalties,
        reports,
        post_step,
        dense_updates=False,
    )


def dense_feedback_sgd(
    loss: LossFn,
    *,
    batcher: Batcher,
    optimizer: optax.GradientTransformation,
    learning_rate_scale: Schedule | None = None,
    penalties: Sequence[PenaltyFn] = (),
    report_grads: Callable[[jax.Array], jax.Array] | None = None,
    report_steps: StepPredicate | None = None,
) -> Client:
    """Take gradients at the masked weights and apply them to the dense ones.

    So pruned weights keep receiving updates within the round, which is the error feedback of
    dynamic pruning (FedDIP, DPF); the delta is dense. Arguments and message as in `local_sgd`.

    References:
      Lin et al., `Dynamic Model Pruning with Feedback <https://arxiv.org/abs/2006.07253>`_, 2020.
    """
    reports = _Reports(report_grads, report_steps)
    return _client(
        loss, batcher, optimizer, learning_rate_scale, penalties, reports, None, dense_updates=True
    )


class _Reports(NamedTuple):
    """In which rounds and of which steps gradients are reported."""

    rounds: Callable[[jax.Array], jax.Array] | None
    steps: StepPredicate | None


def _client(
    loss, batcher, optimizer, scale, penalties, reports, post_step, *, dense_updates
) -> Client:
    def objective(params, broadcast, model_state, batch, key):
        value, aux = loss(params, model_state, batch, key)
        for penalty in penalties:
            value = value.astype(jnp.float32) + penalty(params, broadcast)
        return value, aux

    def optimizer_step(grads, state, params, round_index):
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes dtypes
            updates, state = optimizer.update(grads, state, params)
            if scale is not None:
                factor = scale(round_index)
                updates = jax.tree.map(lambda u: (u * factor).astype(u.dtype), updates)
        return updates, state

    def update_fn(key, broadcast, state, data):
        masks = broadcast.masks
        batch_key, step_key = jax.random.split(key)
        start = broadcast.params if dense_updates else masks_lib.apply(masks, broadcast.params)
        num_steps = batcher.num_steps(data)
        is_corrected = bool(jax.tree.leaves(broadcast.correction))

        def report(progress, dense_grads, step, size):
            """Add a gradient to the sums that are reported, where it is due."""
            reported, num_reported = progress.grads, progress.num_reported
            dense = progress.dense
            if reports.rounds is not None:
                due = reports.rounds(broadcast.round)
                due = due if reports.steps is None else due & reports.steps(step, num_steps)
                reported = jax.lax.cond(
                    due,
                    lambda sums, new: jax.tree.map(jnp.add, sums, new),
                    lambda sums, new: sums,
                    reported,
                    dense_grads,
                )
                num_reported = num_reported + due.astype(jnp.int32)
                seen = metrics.Mean(total=jnp.where(due, size, jnp.zeros_like(size)), weight=size)
                dense = metrics.merge(dense, seen)
            local = progress.local_grads
            if is_corrected:
                local = jax.tree.map(jnp.add, local, dense_grads)
            return {
                "grads": reported,
                "num_reported": num_reported,
                "local_grads": local,
                "dense": dense,
            }

        def step_fn(step, progress):
            batch = batcher.batch(batch_key, data, step)
            seen = masks_lib.apply(masks, progress.params) if dense_updates else progress.params
            (_, (model_state, step_metrics)), dense_grads = jax.value_and_grad(
                objective, has_aux=True
            )(seen, broadcast, progress.model_state, batch, jax.random.fold_in(step_key, step))
            grads = dense_grads
            if is_corrected:
                grads = jax.tree.map(jnp.add, grads, broadcast.correction)
            grads = grads if dense_updates else masks_lib.apply(masks, grads)
            updates, optimizer_state = optimizer_step(
                grads, progress.optimizer, progress.params, broadcast.round
            )
            now = Local(
                params=optax.apply_updates(progress.params, updates),
                optimizer=optimizer_state,
                model_state=model_state,
            )
            if post_step is not None:
                before = Local(progress.params, progress.optimizer, progress.model_state)
                now = post_step(LocalStep(before, now, step_metrics, step, num_steps))
            params = now.params if dense_updates else masks_lib.apply(masks, now.params)
            return _Progress(
                params=params,
                optimizer=now.optimizer,
                model_state=now.model_state,
                metrics=metrics.merge(progress.metrics, step_metrics),
                **report(progress, dense_grads, step, jnp.sum(batch.weights)),
            )

        shapes = jax.eval_shape(
            lambda: loss(
                start, broadcast.model_state, batcher.batch(batch_key, data, jnp.int32(0)), step_key
            )
        )
        progress = _Progress(
            params=start,
            optimizer=optimizer.init(start),
            model_state=broadcast.model_state,
            grads=() if reports.rounds is None else jax.tree.map(jnp.zeros_like, start),
            num_reported=jnp.int32(0),
            local_grads=jax.tree.map(jnp.zeros_like, start) if is_corrected else (),
            metrics=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1][1]),
            dense=() if reports.rounds is None else metrics.zero(),
        )
        progress = jax.lax.fori_loop(jnp.int32(0), num_steps, step_fn, progress)
        fields = {
            "delta": jax.tree.map(jnp.subtract, progress.params, start),
            "model_state": jax.tree.map(
                lambda after, before: (after - before).astype(jnp.float32),
                progress.model_state,
                broadcast.model_state,
            ),
            "metrics": progress.metrics,
        }
        if reports.rounds is not None:
            fields["metrics"] = {**progress.metrics, DENSE_GRADIENT: progress.dense}
            fields["grads"] = _divide(progress.grads, progress.num_reported)
        if is_corrected:
            fields["local_grads"] = _divide(progress.local_grads, num_steps)
        return Message(fields=fields, weight=data.size.astype(jnp.float32)), state

    return Client(init=lambda params: (), update=update_fn)


def _divide(sums: Params, count: jax.Array) -> Params:
    """Make a mean of sums, zero where nothing was counted."""
    count = jnp.maximum(count, 1).astype(jnp.float32)
    return jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), sums)
