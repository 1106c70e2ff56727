"""One client's local work, written plainly: no client axis, no client index."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjaxprune import live_weights, metrics
from fedjaxprune import masks as masks_lib
from fedjaxprune.federated import _steps, mask_revision, step_scales, weight_views
from fedjaxprune.federated.mask_revision import MaskRevision
from fedjaxprune.federated.penalties import PenaltyFn
from fedjaxprune.federated.step_scales import StepScale
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
    Schedule,
    Sight,
    State,
    WeightView,
)

LossFn = Callable[[Params, State, Batch, Key], tuple[jax.Array, tuple[State, Metrics]]]
StepPredicate = Callable[[jax.Array, jax.Array], jax.Array]  # (step [], steps []) -> [] bool


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

    local: Local
    grads: Params
    num_reported: jax.Array
    local_grads: Params
    metrics: Metrics
    dense: Metrics
    extra: Any = ()


def local_sgd(
    loss: LossFn,
    *,
    batcher: Batcher,
    optimizer: optax.GradientTransformation,
    learning_rate_scale: Schedule | StepScale | None = None,
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
        every client and round: add noise in the loss instead. One that asks for it gets `value`,
        `grad` and `value_fn` of the step's batch (``optax.lbfgs``, ``optax.polyak_sgd``,
        ``optax.contrib.reduce_on_plateau``). Refused are those that ask for more, and those that
        train other parameters than they are given (``optax.lookahead``, schedule-free ones).
      learning_rate_scale: factor on the optimizer's updates, by round (an optax schedule fits);
        constant inside a round, unless it is a `StepScale`. Without it updates are taken as they
        are.
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
    objective = functools.partial(_objective, loss, penalties)
    rules = _Rules(optimizer, learning_rate_scale, report_grads, report_steps, post_step)
    return _client(objective, batcher, rules)


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
    return viewed_sgd(
        loss,
        batcher=batcher,
        optimizer=optimizer,
        view=weight_views.of_broadcast(),
        learning_rate_scale=learning_rate_scale,
        penalties=penalties,
        report_grads=report_grads,
        report_steps=report_steps,
    )


def viewed_sgd(
    loss: LossFn,
    *,
    batcher: Batcher,
    optimizer: optax.GradientTransformation,
    view: WeightView,
    learning_rate_scale: Schedule | StepScale | None = None,
    penalties: Sequence[PenaltyFn] = (),
    report_grads: Callable[[jax.Array], jax.Array] | None = None,
    report_steps: StepPredicate | None = None,
) -> Client:
    """Train dense weights of which the loss sees a part, chosen anew inside the round.

    The gradient at the weights that are seen acts on the dense ones (straight-through), where the
    view lets them move; all others keep their value, whatever the optimizer would do with them.
    `penalties` see what the loss sees, the view's own penalty all weights. The delta is dense.
    Other arguments and the message are as in `local_sgd`.

    Args:
      loss: as in `local_sgd`, and so are the others.
      view: what is seen (`pruning.views`, or of your own).
    """
    objective = functools.partial(_objective, loss, penalties)
    rules = _Rules(optimizer, learning_rate_scale, report_grads, report_steps, None, view=view)
    return _client(objective, batcher, rules)


def mask_revising_sgd(
    loss: LossFn,
    *,
    batcher: Batcher,
    optimizer: optax.GradientTransformation,
    revision: MaskRevision,
    learning_rate_scale: Schedule | None = None,
    penalties: Sequence[PenaltyFn] = (),
) -> Client:
    """Train as `local_sgd` does, and revise the client's own masks once inside the round.

    At the revision, dropped weights become exact zeros in the parameters and in the optimizer's
    memory, and grown ones start from zero; the remaining steps train under the new masks. Other
    arguments are those of `local_sgd`. A `correction` acts on the weights alone that were live in
    the broadcast, as a client receives no other entry of it. Penalties are no part of the gradient
    or the scores that the revision sees. A client without examples keeps the masks that it has.

    Returns:
      A `Client` whose message also has the field `masks`, its own at the end of the round. Its
      `delta` is zero outside these: a weight that it dropped is left out, not sent as a change. The
      metrics say of how many examples the revision took a gradient (`traffic.EXTRA_GRADIENT`).
      With a judgement, the message has its field `scores`, zeros in rounds that are not due, and
      the metrics say at how many examples scores were taken (`traffic.DENSE_GRADIENT`).
    """
    objective = functools.partial(_objective, loss, penalties)
    rules = _Rules(
        optimizer, learning_rate_scale, None, None, None, (revision, loss), penalties=penalties
    )
    return _client(objective, batcher, rules)


class _Rules(NamedTuple):
    """What a local step does with a gradient; see `local_sgd`."""

    optimizer: optax.GradientTransformation
    scale: Schedule | StepScale | None
    report_grads: Callable[[jax.Array], jax.Array] | None
    report_steps: StepPredicate | None
    post_step: PostStepFn | None
    revision: tuple[MaskRevision, LossFn] | None = None  # with the loss without penalties
    view: WeightView | None = None
    penalties: Sequence[PenaltyFn] = ()  # where masks are revised

    def judge(self, broadcast: Broadcast) -> mask_revision.JudgeFn | None:
        """Find the judge of a revision, whose gradient is that of all terms of the loss."""
        if self.revision is None or self.revision[0].judgement is None:
            return None
        judge = self.revision[0].judgement.judge
        return mask_revision.with_penalties(judge, self.penalties, broadcast)


def _objective(loss, penalties, broadcast):
    """Add penalties to a loss."""

    def objective(params, model_state, batch, key):
        value, aux = loss(params, model_state, batch, key)
        for penalty in penalties:
            value = value.astype(jnp.float32) + penalty(params, broadcast)
        return value, aux

    return objective


def _client(objective_of, batcher, rules: _Rules) -> Client:
    view = rules.view
    draw = jax.jit(batcher.batch, inline=True)  # traced once, for the shapes and for the steps

    def update_fn(key, broadcast, state, data):
        batch_key, step_key = jax.random.split(key)
        masks = broadcast.masks
        start = broadcast.params if view is not None else masks_lib.apply(masks, broadcast.params)
        num_steps = batcher.num_steps(data)
        is_corrected = bool(jax.tree.leaves(broadcast.correction))
        objective = objective_of(broadcast)

        judge = rules.judge(broadcast)
        correction = broadcast.correction
        if is_corrected and rules.revision is not None:
            correction = masks_lib.apply(masks, correction)

        def step_fn(sight, step, progress, is_judged=None):
            before = progress.local
            batch = draw(batch_key, data, step)
            seen = masks_lib.apply(sight.seen, before.params) if view is not None else before.params
            told = live_weights.with_masks(before.model_state, sight.seen)
            given = told, batch, jax.random.fold_in(step_key, step)
            if judge is None or is_judged is None:
                found = jax.value_and_grad(objective, has_aux=True)(seen, *given)
            else:
                found, scored = mask_revision.differentiate(
                    objective, judge, is_judged, progress.extra, (seen, *given)
                )
                progress = progress._replace(extra=scored)
            (value, (model_state, step_metrics)), dense_grads = found
            grads, own = dense_grads, weight_views.own_term(view, sight)
            if own is not None:
                grads = jax.tree.map(jnp.add, grads, jax.grad(own)(before.params))
            if is_corrected:
                grads = jax.tree.map(jnp.add, grads, correction)
            if sight.may_move is not None:
                grads = masks_lib.apply(sight.may_move, grads)
            updates, optimizer_state = _steps.optimizer_step(
                rules.optimizer,
                grads,
                before.optimizer,
                before.params,
                loss=_steps.followed(
                    objective, (correction, sight.seen, own), start, before.params, value, given
                ),
                factor=step_scales.factor(rules.scale, broadcast, before.params, (step, num_steps)),
            )
            now = Local(optax.apply_updates(before.params, updates), optimizer_state, model_state)
            if rules.post_step is not None:
                now = rules.post_step(LocalStep(before, now, step_metrics, step, num_steps))
            if view is None:
                now = now._replace(params=masks_lib.apply(sight.seen, now.params))
            elif sight.may_move is not None:
                moved = jax.tree.map(jnp.where, sight.may_move, now.params, before.params)
                now = now._replace(params=moved)
            if rules.report_grads is not None:
                due = rules.report_grads(broadcast.round)
                if rules.report_steps is not None:
                    due = due & rules.report_steps(step, num_steps)
                progress = _steps.report(progress, dense_grads, due, jnp.sum(batch.weights))
            if is_corrected:
                local_grads = jax.tree.map(jnp.add, progress.local_grads, dense_grads)
                progress = progress._replace(local_grads=local_grads)
            merged = metrics.merge(progress.metrics, step_metrics)
            return progress._replace(local=now, metrics=merged)

        first = jax.eval_shape(draw, batch_key, data, jnp.int32(0))
        progress = _Progress(
            local=Local(
                start, _steps.optimizer_init(rules.optimizer, start), broadcast.model_state
            ),
            grads=() if rules.report_grads is None else jax.tree.map(jnp.zeros_like, start),
            num_reported=jnp.int32(0),
            local_grads=jax.tree.map(jnp.zeros_like, start) if is_corrected else (),
            metrics=_steps.zero_metrics(step_key, objective, broadcast, first),
            dense=() if rules.report_grads is None else metrics.zero(),
            extra=mask_revision.nothing_seen(
                rules.revision, judge, start, broadcast.model_state, first, step_key
            ),
        )
        if view is not None:
            progress = weight_views.in_steps(view, broadcast, num_steps, step_fn, progress)
        elif rules.revision is None:
            under_masks = functools.partial(step_fn, Sight(masks, masks))
            progress = jax.lax.fori_loop(jnp.int32(0), num_steps, under_masks, progress)
        else:
            revision, loss = rules.revision
            batch_at = functools.partial(draw, batch_key, data)
            work = mask_revision.Work(loss, rules.optimizer, broadcast, batch_at, num_steps)
            masks, progress = mask_revision.in_phases(
                step_key,
                revision,
                work,
                lambda masks, *at, **judged: step_fn(Sight(masks, masks), *at, **judged),
                progress,
            )
        end = progress.local
        fields = _steps.changes(end.params, start, end.model_state, broadcast.model_state)
        fields["metrics"] = progress.metrics
        if rules.revision is not None:
            fields["delta"] = masks_lib.apply(masks, fields["delta"])
            fields |= mask_revision.reported(rules.revision[0], progress, broadcast.masks, masks)
        if rules.report_grads is not None:
            fields["metrics"] = {**fields["metrics"], DENSE_GRADIENT: progress.dense}
            fields["grads"] = _steps.divide(progress.grads, progress.num_reported)
        if is_corrected:
            fields["local_grads"] = _steps.divide(progress.local_grads, num_steps)
        return Message(fields=fields, weight=data.size.astype(jnp.float32)), state

    return Client(init=lambda params: (), update=update_fn)
