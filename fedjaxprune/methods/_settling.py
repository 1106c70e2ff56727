"""A stage in which one client prunes alone, until the number of live weights settles."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import metrics as metrics_lib
from fedjaxprune import trees
from fedjaxprune.federated import local_training, server_optimizers
from fedjaxprune.rounds import server_work
from fedjaxprune.rounds.protocol import broadcast_of
from fedjaxprune.rounds.task import Task
from fedjaxprune.types import Batcher, Masks, Metrics, RoundState, Stage

# (masks, state, squares) -> masks, from squared gradients like the parameters
ReviseFn = Callable[[Masks, RoundState, Any], Masks]

CHECK_EVERY = 10  # passes from one look at the accuracy to the next
SETTLED = 5  # revisions in a row that change little
LITTLE = 0.1  # relative change of the number of live weights


class Plan(NamedTuple):
    """How the client prunes.

    Attributes:
      client_id: which one it is.
      num_examples: its first examples, on which it trains.
      num_passes: over these, at most.
      prune_every: passes from one revision to the next.
      accuracy: of a pass, from which on masks are revised.
    """

    client_id: int
    num_examples: int
    num_passes: int
    prune_every: int
    accuracy: float


class _Progress(NamedTuple):
    """Where the client stands between two passes."""

    state: RoundState
    squares: Any  # sums of squared gradients since the last revision
    num_passes: jax.Array  # [] int32, those done
    first: jax.Array  # [] int32, the pass of the first revision, or -1
    num_settled: jax.Array  # [] int32, revisions in a row that changed little
    metrics: Metrics


def most_revisions(plan: Plan) -> int:
    """Count the revisions that a client makes at most, if its first pass is accurate enough."""
    first = min(CHECK_EVERY, plan.prune_every) - 1
    return max(0, -(-(plan.num_passes - first) // plan.prune_every))


def prune_alone(task: Task, plan: Plan, revise: ReviseFn) -> Stage:
    """Let one client train and prune on its own, and everybody start from what it found.

    A pass is one step on each batch of the client's first examples. Squared gradients of single
    batches are added up. Every `CHECK_EVERY` passes the accuracy in the pass is looked at; a
    network that reports none counts as good enough. Once it suffices, masks are revised in that
    pass and every `prune_every` from there. The stage ends when `SETTLED` revisions in a row
    changed the number of live weights by at most a tenth. The weights stay where they are. A client
    without examples changes nothing.

    The client receives the dense model, and sends masks and live weights.
    """
    source = server_work.examples_of(plan.client_id)
    epoch = task.batches()

    def work(key, state, population):
        data = source(population)
        data = data._replace(size=jnp.minimum(data.size, plan.num_examples))

        def one_pass(progress):
            pass_key = jax.random.fold_in(key, progress.num_passes)
            start = progress._replace(metrics=jax.tree.map(jnp.zeros_like, progress.metrics))

            def step_fn(step, progress):
                return _step(task, epoch, (pass_key, data, step), progress)

            after = jax.lax.fori_loop(jnp.int32(0), epoch.num_steps(data), step_fn, start)
            revised = _revise(plan, revise, after)
            total = metrics_lib.merge(progress.metrics, after.metrics)
            return revised._replace(metrics=total, num_passes=progress.num_passes + 1)

        def is_open(progress):
            is_early = (progress.num_passes < plan.num_passes) & (progress.num_settled < SETTLED)
            return is_early & (data.size > 0)

        squares = jax.tree.map(jnp.zeros_like, state.params)
        shapes = jax.eval_shape(
            lambda: _train(task, epoch, (key, data, jnp.int32(0)), state)[0].fields["metrics"]
        )
        start = _Progress(
            state=state,
            squares=squares,
            num_passes=jnp.int32(0),
            first=jnp.int32(-1),
            num_settled=jnp.int32(0),
            metrics=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
        )
        end = jax.lax.while_loop(is_open, one_pass, start)
        return end.state, end.metrics

    return server_work.server_round(
        "prune_alone",
        work,
        working_clients=(plan.client_id,),
        clients_send="model",
        reads=server_work.reads_of(source),
    )


def _train(task: Task, epoch: Batcher, at: tuple[Any, Any, Any], state: RoundState):
    """Take one step on one batch of a pass; the message has the gradient of all weights."""
    key, data, step = at
    one = Batcher(
        num_steps=lambda data: jnp.int32(1),
        batch=lambda _, data, first: epoch.batch(key, data, step),
    )
    client = local_training.local_sgd(
        task.model.loss,
        batcher=one,
        optimizer=task.protocol.optimizer,
        report_grads=lambda round_index: round_index >= 0,
    )
    step_key = jax.random.fold_in(key, step)
    return client.update(step_key, broadcast_of(state), client.init(state.params), data)


def _step(task: Task, epoch: Batcher, at: tuple[Any, Any, Any], progress: _Progress) -> _Progress:
    message, _ = _train(task, epoch, at, progress.state)
    fields, state = message.fields, progress.state
    return progress._replace(
        state=state._replace(
            params=jax.tree.map(jnp.add, state.params, fields["delta"]),
            model_state=server_optimizers.shift(state.model_state, fields["model_state"]),
        ),
        squares=jax.tree.map(lambda sums, g: sums + g * g, progress.squares, fields["grads"]),
        metrics=metrics_lib.merge(progress.metrics, fields["metrics"]),
    )


def _revise(plan: Plan, revise: ReviseFn, progress: _Progress) -> _Progress:
    """Revise the masks after a pass, if it is time."""
    index, check_every = progress.num_passes, min(CHECK_EVERY, plan.prune_every)
    is_checked = (index + 1) % check_every == 0
    is_good = is_checked & (progress.first < 0) & _is_accurate(plan, progress.metrics)
    first = jnp.where(is_good, index, progress.first)
    due = (first >= 0) & ((index - first) % plan.prune_every == 0)

    def revised(progress):
        before = progress.state
        masks = revise(before.masks, before, progress.squares)
        then, now = (_num_live(each) for each in (before.masks, masks))
        is_settled = jnp.abs(now - then) <= LITTLE * then
        return progress._replace(
            state=before._replace(masks=masks, params=masks_lib.apply(masks, before.params)),
            squares=jax.tree.map(jnp.zeros_like, progress.squares),
            num_settled=jnp.where(is_settled, progress.num_settled + 1, 0),
        )

    return jax.lax.cond(due, revised, lambda one: one, progress._replace(first=first))


def _is_accurate(plan: Plan, metrics: Metrics) -> jax.Array:
    if "accuracy" not in metrics:
        return jnp.bool_(True)
    return metrics["accuracy"].total >= plan.accuracy * metrics["accuracy"].weight


def _num_live(masks: Masks) -> jax.Array:
    """Count the live weights, as float32."""
    counts = [count.astype(jnp.float32) for count in masks_lib.num_kept(masks)]
    return trees.tree_sum(counts, dtype=jnp.float32)
