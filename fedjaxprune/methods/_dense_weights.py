"""What methods share whose server keeps dense weights, of which the largest are seen."""

import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune.pruning import allocation, pruners, scores, selection
from fedjaxprune.rounds import server_work
from fedjaxprune.rounds.protocol import Hooks, Masking, MaskTransport, add_reports
from fedjaxprune.rounds.stages import in_order
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.traffic import SEEN
from fedjaxprune.types import (
    Algorithm,
    PrunableFn,
    Pruner,
    PrunerInputs,
    RoundMetrics,
    RoundState,
    Stage,
    WeightView,
)


def train(
    task: Task,
    view: WeightView,
    *,
    sparsity: float,
    prunable: PrunableFn,
    masking: Masking,
    select: selection.SelectionFn = selection.top_k,
    hooks: Hooks | None = None,
) -> Algorithm:
    """Train dense weights through a view; the masks in force are chosen anew after every round.

    They are the largest weights of each leaf. Clients choose by the values that they receive, so
    masks do not travel.

    Args:
      task: what the method is built for.
      view: of the clients.
      sparsity: of the masks in force.
      prunable: which leaves have masks.
      masking: what clients receive and send.
      select: which weights of a leaf are kept.
      hooks: as in `training`, without `after_round`.
    """
    revise = pruners.chain(
        pruners.grow_to(0.0, score=scores.magnitude),  # forget the old masks
        pruners.prune_to(sparsity, allocation=allocation.uniform(), selection=select),
    )
    nothing_to_say = MaskTransport(is_needed=lambda state: jnp.bool_(False))
    rounds = training(
        task.protocol,
        client=task.viewed_client(view),
        pruner=revise,
        prunable=prunable,
        masking=masking._replace(server_is_dense=True, transport=nothing_to_say),
        hooks=(hooks or Hooks())._replace(after_round=note_seen),
    )
    return in_order(rounds, (_choose(pruners.exempt(revise, prunable)),), sparsity=sparsity)


def note_seen(
    before: RoundState, after: RoundState, metrics: RoundMetrics
) -> tuple[RoundState, RoundMetrics]:
    """Report that the loss saw as many weights as are live, though clients received more."""
    return after, add_reports(metrics, {SEEN: masks_lib.num_kept(before.masks)})


def _choose(pruner: Pruner) -> Stage:
    """Choose the first masks by the initial weights, which stay dense."""

    def work(key, state, population):
        del population  # no data decides
        inputs = PrunerInputs(params=state.params, grads=None, round=state.round)
        masks, _ = pruner.update(key, state.masks, pruner.init(state.params), inputs)
        return state._replace(masks=masks), server_work.no_loss()

    return server_work.server_round("choose", work, masks_known_to="everybody")
