"""What methods share whose server keeps dense weights, of which the largest are seen."""

import jax.numpy as jnp

from fedjaxprune.pruning import allocation, pruners, scores, selection
from fedjaxprune.rounds import server_work
from fedjaxprune.rounds.protocol import Hooks, Masking, MaskTransport
from fedjaxprune.rounds.stages import in_order
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.types import Algorithm, PrunableFn, Pruner, PrunerInputs, Stage, WeightView


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
      hooks: as in `training`.
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
        hooks=hooks,
    )
    return in_order(rounds, (_choose(pruners.exempt(revise, prunable)),), sparsity=sparsity)


def _choose(pruner: Pruner) -> Stage:
    """Choose the first masks by the initial weights, which stay dense."""

    def work(key, state, population):
        del population  # no data decides
        inputs = PrunerInputs(params=state.params, grads=None, round=state.round)
        masks, _ = pruner.update(key, state.masks, pruner.init(state.params), inputs)
        return state._replace(masks=masks), server_work.no_loss()

    return server_work.server_round("choose", work, masks_known_to="everybody")
