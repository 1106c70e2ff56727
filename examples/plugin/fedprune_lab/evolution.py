"""Sparse evolutionary training: the weakest weights give way to others, drawn at random.

A random mask is drawn at the end of the first round, which is dense. From then on, every
`prune_every` rounds each layer drops the share of its live weights that is smallest, and grows as
many at random. The sparsity is constant, and no gradient of a pruned weight is needed.

References:
  Mocanu et al., `Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity
  <https://arxiv.org/abs/1707.04780>`_, 2018, which trains on one machine.
"""

from fedjaxprune.method import Method, Paper
from fedjaxprune.pruning import allocation, pruners, schedules, scores
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import Fraction, Rounds, Settings, Sparsity, setting
from fedjaxprune.types import Algorithm


class SparseEvolution(Settings):
    """Settings of sparse evolutionary training."""

    sparsity: Sparsity = setting(0.8, "Pruned fraction, constant.", unit="fraction")
    drop_fraction: Fraction = setting(
        0.3, "Share of a layer's live weights that a revision replaces.", unit="fraction"
    )
    prune_every: Rounds = setting(5, "Rounds from one revision to the next.", unit="rounds")


def build(settings: SparseEvolution, task: Task) -> Algorithm:
    """Train under masks that change at random places."""
    share = allocation.erk()
    draw = pruners.prune_to(settings.sparsity, score=scores.random, allocation=share)
    revise = pruners.chain(
        pruners.drop(settings.drop_fraction),
        pruners.grow_to(settings.sparsity, score=scores.random, allocation=share),
    )
    due = schedules.every(settings.prune_every, start=settings.prune_every)
    return training(
        task.protocol,
        client=task.local_client(),
        pruner=pruners.chain(pruners.when(schedules.at(0), draw), pruners.when(due, revise)),
    )


METHOD = Method(
    build=build,
    settings=SparseEvolution,
    paper=Paper("Mocanu et al.", 2018, "Sparse evolutionary training", arxiv="1707.04780"),
    default_model="small_perceptron",
    law_settings={"sparsity": 0.5, "prune_every": 2},
)
