"""Controls around any method: what do the places of its mask matter, and its weights?

The method runs until its masks are final: the stages before training, if these choose the masks for
good, else all of its rounds. A round of the server then replaces masks or weights, and plain
training under fixed masks follows, for as many rounds as the protocol has, with new optimizers,
residuals and control variates. So a method that revises masks in training takes twice its rounds.

References:
  Frankle et al., `Pruning neural networks at initialization: why are we missing the mark?
  <https://arxiv.org/abs/2009.08576>`_, 2021, for both controls.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import topk, trees
from fedjaxprune.federated import server_optimizers
from fedjaxprune.rounds import server_work, stages
from fedjaxprune.rounds.protocol import no_correction
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.types import Algorithm, Key, Masks, Params, PrunableFn, RoundState, Stage, State

StartFn = Callable[[], tuple[Params, State]]


def shuffled(algorithm: Algorithm, task: Task, *, initial: StartFn) -> Algorithm:
    """Put a method's live weights at random places: as many in every layer, from the same start.

    If the method does no better than this, the numbers of weights by layer are all that it finds.

    Args:
      algorithm: the method.
      task: that it was built for.
      initial: ``() -> (params, model_state)`` that the run starts from.
    """

    def replace(key, masks):
        return shuffle(key, masks, prunable=algorithm.prunable), *initial()

    return _controlled(algorithm, task, "shuffle", replace)


def reinitialized(algorithm: Algorithm, task: Task) -> Algorithm:
    """Keep a method's masks, and train new initial weights under them.

    If the method does no better than this, its masks do not depend on the weights they were made
    with.

    Args:
      algorithm: the method.
      task: that it was built for.
    """

    def replace(key, masks):
        return masks_lib.restrict(masks, algorithm.prunable), *task.model.init(key)

    return _controlled(algorithm, task, "reinitialize", replace)


def shuffle(key: Key, masks: Masks, *, prunable: PrunableFn) -> Masks:
    """Draw masks that keep as many entries of every prunable leaf, and all of the others."""
    leaves, structure = jax.tree.flatten(masks_lib.restrict(masks, prunable))
    keys = jax.random.split(key, len(leaves))

    def draw(key, mask):
        return topk.top_k(jax.random.uniform(key, mask.shape, jnp.float32), trees.count(mask))

    return jax.tree.unflatten(structure, list(map(draw, keys, leaves)))


def _controlled(
    algorithm: Algorithm,
    task: Task,
    name: str,
    replace: Callable[[Key, Masks], tuple[Masks, Params, State]],
) -> Algorithm:
    """Put a round that replaces masks and weights behind a method, and training behind that."""
    protocol = task.protocol
    is_first = algorithm.has_fixed_masks
    before = algorithm.stages[:-1] if is_first else algorithm.stages
    num_before = sum(stage.num_rounds for stage in before)
    correction = no_correction() if protocol.correction is None else protocol.correction
    server = server_optimizers.fedavg() if protocol.server is None else protocol.server
    restart = None if protocol.downlink is None else protocol.downlink.restart

    def work(key, state, population):
        del population  # no data decides
        masks, params, model_state = replace(key, state.masks)
        params = masks_lib.apply(masks, params)
        state = state._replace(
            masks=masks,
            downlink=state.downlink if restart is None else restart(state.downlink),
            params=params,
            model_state=model_state,
            server=server_optimizers.init(server, params),
            correction=correction.init(params),
        )
        return state, server_work.no_loss()

    control = server_work.server_round(name, work)
    if not is_first or any(stage.cohort == "sampled" for stage in before):  # clients have trained
        control = _forgetting(control, algorithm)
    plain = training(
        protocol,
        client=task.local_client(),
        prunable=algorithm.prunable,
        name="train" if is_first else "retrain",
    )

    def deployed_params(state: RoundState) -> Params:
        return trees.tree_where(
            state.round > num_before,
            masks_lib.apply(state.masks, state.params),
            algorithm.deployed_params(state),
        )

    after = (
        stages.shift_rounds(stage, num_before + i)
        for i, stage in enumerate((control, *plain.stages))
    )
    twice = f"the control {name!r} first runs the method for its {num_before} rounds"
    return algorithm._replace(
        stages=(*before, *after),
        deployed_params=deployed_params,
        published={},
        diagnostics=lambda metrics: {},
        notes=algorithm.notes if is_first else (*algorithm.notes, f"{twice}, then trains again."),
        has_fixed_masks=True,
    )


def _forgetting(stage: Stage, algorithm: Algorithm) -> Stage:
    """Let all clients forget what they remember but for the masks that they hold."""

    def round_fn(key, state, cohort, population):
        state, rows, metrics = stage.round(key, state, cohort, population)
        new = algorithm.init_client(state.params)

        def leaf(old: Any, fresh: Any) -> jax.Array:
            here = cohort.participated.reshape(-1, *[1] * (old.ndim - 1))
            return jnp.where(here, jnp.broadcast_to(fresh, old.shape), old)

        forgotten = jax.tree.map(leaf, rows, new)
        return state, forgotten._replace(masks_held=rows.masks_held), metrics

    return stage._replace(round=stages.mark_guarded(round_fn), cohort="population")
