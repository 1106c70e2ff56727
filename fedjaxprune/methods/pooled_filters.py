"""Prune filters on the data of all clients, which nobody has: a control of MPFL.

It bounds what a vote can find. One model is trained on the pooled data, loses the filters of
smallest norm and is rewound, as often as MPFL exchanges votes: iterative magnitude pruning. Nothing
travels. Each layer keeps as many filters as MPFL's does under the consensus ``top_k``.

References:
  Gez and Cohen, `MPFL <https://arxiv.org/abs/2312.03889>`_, 2023, whose public code compares its
  mask with that of pooled data. Frankle and Carbin, `The Lottery Ticket Hypothesis
  <https://arxiv.org/abs/1803.03635>`_, 2019.
"""

from fedjaxprune import trees
from fedjaxprune.method import Method, Needs
from fedjaxprune.methods import _filter_rounds
from fedjaxprune.pruning.structured import filters
from fedjaxprune.rounds.server_work import all_examples, server_round, train_at
from fedjaxprune.rounds.task import Task
from fedjaxprune.types import Algorithm


class PooledFilters(_filter_rounds.RankingSettings):
    """Settings of filters that pooled data decide."""


def build(settings: PooledFilters, task: Task) -> Algorithm:
    """Build the control.

    Raises:
      ValueError: the network has no filters.
    """
    plan, targets = _filter_rounds.plan_ranking(task, settings)
    source = all_examples()
    train = train_at(_filter_rounds.trainer(task, settings), source)

    def work(key, state, population):
        trained, metrics = train(key, state, population)
        before, step = state.method.keep, plan.first_step + state.round
        keep = trees.tree_where(
            _filter_rounds.is_over(plan, before),
            before,
            filters.ranked(plan.layers, trained.params, before, targets(step, before)),
        )
        state = _filter_rounds.apply_filters(plan, task.protocol, state, keep, step=step)
        return state, metrics

    prepare = server_round("prepare", work, num_rounds=plan.num_exchanges, reads=source.reads)
    return _filter_rounds.train_after(task, settings, plan, (prepare,))


METHOD = Method(
    build=build,
    settings=PooledFilters,
    needs=Needs(convolutions=True),
    default_model="resnet8",
    law_settings={"num_prune_steps": 1, "vote_epochs": 3, "layers": "all"},
    nothing_pruned={"sparsity": 0.0},
)
