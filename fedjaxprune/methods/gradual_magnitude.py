"""Gradual magnitude pruning: a control that prunes along a cubic curve while it trains.

One global mask tightens along a cubic curve by magnitude, clients train the live weights, and
pruned weights do not return. FedDIP without its penalty is close to it, but starts from random
masks, and its clients keep applying gradients to pruned weights within a round.

References:
  Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_, 2017.
"""

from typing import Literal

from fedjaxprune import masks as masks_lib
from fedjaxprune.method import Method, Paper
from fedjaxprune.methods import _gradual
from fedjaxprune.pruning import allocation, pruners
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import Rounds, setting
from fedjaxprune.types import Algorithm

ALLOCATIONS = {
    "global": allocation.global_pool,
    "uniform": allocation.uniform,
    "erk": allocation.erk,
}


class GradualMagnitude(_gradual.GradualSettings):
    """Settings of gradual magnitude pruning."""

    end_round: Rounds | None = setting(
        None,
        "Round at whose end the curve arrives at the sparsity, counted from 0.",
        unit="round",
        unset="the number of rounds of the run",
    )
    allocation: Literal["global", "uniform", "erk"] = setting(
        "global",
        "How layers share the live weights: one pool, the same share of each, or a larger share of "
        "small ones.",
    )


def build(settings: GradualMagnitude, task: Task) -> Algorithm:
    """Prune the smallest weights of the global model, ever more of them."""
    end_round = settings.end_round or task.protocol.num_rounds
    curve = _gradual.plan(settings, task, end_round=end_round, prunable=masks_lib.is_kernel)
    revise = pruners.prune_to(curve.sparsity, allocation=ALLOCATIONS[settings.allocation]())
    algorithm = training(
        task.protocol, client=task.local_client(), pruner=pruners.when(curve.due, revise)
    )
    return algorithm._replace(notes=curve.notes)


METHOD = Method(
    build=build,
    settings=GradualMagnitude,
    paper=Paper("Zhu and Gupta", 2017, "To prune, or not to prune", arxiv="1710.01878"),
    law_settings={"sparsity": 0.75, "initial_sparsity": 0.0, "prune_every": 2},
    nothing_pruned={"sparsity": 0.0},
)
