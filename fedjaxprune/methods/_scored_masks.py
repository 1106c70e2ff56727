"""What methods share that choose masks at the start by derivatives of the loss, step by step.

At the server all steps are one round of its own. Over clients every step is an exchange: the model
under the masks of the step before goes down, derivatives come up, and the masks become tighter. A
step in which no client answers is not counted, so that the next one prunes to its sparsity; what is
missing after the last exchange is pruned by magnitude. The initial weights are kept until then.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune.federated import derivatives
from fedjaxprune.federated.derivatives import Given
from fedjaxprune.methods import _fixed_masks
from fedjaxprune.pruning import schedules, scores
from fedjaxprune.rounds import reporting, server_work
from fedjaxprune.rounds.protocol import FieldSpec, broadcast_of
from fedjaxprune.rounds.task import Task
from fedjaxprune.settings import Count, setting
from fedjaxprune.traffic import BACKPROPAGATED
from fedjaxprune.types import (
    Algorithm,
    Batcher,
    Client,
    Key,
    Masks,
    Params,
    PrunerInputs,
    RoundState,
    Stage,
)

# (key, masks, params, field of the clients' message, step []) -> masks
TightenFn = Callable[[Key, Masks, Params, Any, jax.Array], Masks]
Steps = Literal["linear", "exponential"]


class ScoredSettings(_fixed_masks.FixedMaskSettings):
    """Settings of masks that derivatives of the loss decide at the start."""

    allocation: _fixed_masks.Allocation = _fixed_masks.allocation_setting("global")
    examples: Literal["server", "pooled", "clients"] = setting(
        "server",
        "Examples that derivatives are taken on: the server's own, those of all clients together, "
        "or each client's at that client.",
    )
    num_batches: Count | None = setting(
        None,
        "Batches of each pass over these examples.",
        unit="batches",
        unset="all of a pass",
    )


def steps_setting(default: Steps) -> Any:
    """Declare how the sparsity grows, with the method's own default."""
    return setting(
        default,
        "How the sparsity grows over the steps: by equal numbers of weights, or by an equal share "
        "of what is left.",
    )


def sparsities(sparsity: float, num_steps: int, steps: Steps) -> tuple[float, ...]:
    """List the sparsity after each step."""
    make = {"linear": schedules.linear_steps, "exponential": schedules.exponential_steps}
    return make[steps](sparsity, num_steps)


def batches(settings: ScoredSettings, task: Task) -> Batcher:
    """Make the batches that derivatives are taken on."""
    return derivatives.first_batches(task.batches(), settings.num_batches)


def source(settings: ScoredSettings, task: Task) -> server_work.SourceFn:
    """Say whose examples the server works on."""
    return server_work.all_examples() if settings.examples == "pooled" else task.server_source()


def tighten(
    settings: _fixed_masks.FixedMaskSettings,
    task: Task,
    score: scores.ScoreFn,
    *,
    reads: Literal["grads", "curvature", "scores"] = "grads",
    after_steps: tuple[float, ...] | None = None,
    candidates: Literal["live", "all"] = "live",
) -> TightenFn:
    """Make the function that prunes to the sparsity of a step.

    Args:
      settings: say how layers share the live weights.
      task: knows the layers.
      score: what a weight is worth.
      reads: what the field is to the score: gradients, the statistic ``"curvature"``, or the scores
        themselves.
      after_steps: the sparsity after each step; None: there is one step.
      candidates: whether only live weights compete, or pruned ones, too.
    """
    schedule = schedules.listed(after_steps or (settings.sparsity,))
    pruner = _fixed_masks.pruner(schedule, _fixed_masks.share_out(settings, task), score)

    def tighten_fn(key, masks, params, field, step):
        before = masks_lib.full(params) if candidates == "all" else masks
        seen = PrunerInputs(
            params=field if reads == "scores" else params,
            grads=field if reads == "grads" else None,
            round=step,
            statistics={"curvature": field} if reads == "curvature" else (),
        )
        return pruner.update(key, before, pruner.init(params), seen)[0]

    return tighten_fn


def at_server(
    look: Callable[[Key, RoundState, Any], tuple[Any, Any]],
    source: server_work.SourceFn,
    tighten: TightenFn,
    *,
    num_steps: int = 1,
) -> Stage:
    """Take all steps at the server: one round, however many steps.

    Args:
      look: ``(key, state, examples) -> (derivatives, metrics)`` under the masks of the state.
      source: whose examples.
      tighten: makes the masks of a step.
      num_steps: how many.
    """

    def work(key, state, population):
        data = source(population)

        def take(masks, step):
            look_key, choose_key = jax.random.split(jax.random.fold_in(key, step))
            found, metrics = look(look_key, state._replace(masks=masks), data)
            return tighten(choose_key, masks, state.params, found, step), metrics

        masks, metrics = jax.lax.scan(take, state.masks, jnp.arange(num_steps, dtype=jnp.int32))
        last = jax.tree.map(lambda leaf: leaf[-1], metrics)
        return state._replace(masks=masks, params=masks_lib.apply(masks, state.params)), last

    return server_work.server_round("prepare", work, reads=server_work.reads_of(source))


def exchange(
    task: Task,
    client: Client,
    tighten: TightenFn,
    *,
    field: str,
    send: Literal["whole", "masked"],
    num_steps: int = 1,
) -> Stage:
    """Ask clients for derivatives, once a step; `RoundState.method` counts the steps taken."""

    def server_update(key, state, fields):
        masks = tighten(key, state.masks, state.params, fields[field], state.method)
        return state._replace(masks=masks, method=state.method + 1)

    return reporting.reporting_round(
        task.protocol,
        name="score",
        client=client,
        fields={field: FieldSpec(send=send)},
        server_update=server_update,
        broadcast=lambda state: Given(broadcast_of(state)),
        download=reporting.live_download,
        exchange=reporting.Exchange(
            num_rounds=num_steps,
            compute=lambda state: {BACKPROPAGATED: masks_lib.num_kept(state.masks)[None]},
        ),
    )


def settle(settings: _fixed_masks.FixedMaskSettings, task: Task) -> Stage:
    """Prune by magnitude what the exchanges have left to prune, and drop the pruned weights."""
    choose = _fixed_masks.chooser(settings, task, scores.magnitude)

    def work(key, state, population):
        del population  # no data decides
        return choose(key, state, state.params, None), server_work.no_loss()

    return server_work.server_round("settle", work)


def by_gradients(
    settings: ScoredSettings,
    task: Task,
    tighten: TightenFn,
    *,
    after_steps: tuple[float, ...],
    send: Literal["whole", "masked"] = "masked",
) -> Algorithm:
    """Choose masks by mean gradients, at the server or over clients, and train under them."""
    client = derivatives.report(
        task.model.loss,
        batcher=batches(settings, task),
        name="grads",
        derivative=derivatives.gradient(),
    )
    number = len(after_steps)
    if settings.examples == "clients":
        score = exchange(task, client, tighten, field="grads", send=send, num_steps=number)
        return train_under(
            settings, task, score, settle(settings, task), method=lambda params: jnp.int32(0)
        )

    def look(key, state, data):
        given: Any = Given(broadcast_of(state))
        message, _ = client.update(key, given, (), data)
        return message.fields["grads"], message.fields["metrics"]

    stage = at_server(look, source(settings, task), tighten, num_steps=number)
    return train_under(settings, task, stage)


def train_under(
    settings: _fixed_masks.FixedMaskSettings, task: Task, *before: Stage, method: Any = None
) -> Algorithm:
    """Let plain training follow the stages that choose masks; where nothing is pruned, none do.

    Args:
      settings: with the sparsity.
      task: of the run.
      *before: the stages that choose masks.
      method: ``params -> RoundState.method`` that the first of them finds; None: they need none.
    """
    if settings.sparsity == 0.0:
        return _fixed_masks.train_under(task, 0.0)
    if method is None:
        return _fixed_masks.train_under(task, settings.sparsity, *before)
    return _fixed_masks.train_under(
        task,
        settings.sparsity,
        *before,
        init=lambda state: state._replace(method=method(state.params)),
    )
