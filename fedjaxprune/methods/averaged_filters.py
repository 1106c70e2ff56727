"""Prune filters by the norms of averaged weights; a control of MPFL.

Weights travel whole in every exchange. Clients count equally, as in MPFL's public code; that code
ranks by weights of another model by mistake, and here it is the averaged ones. A robust aggregator
(`median`, for instance) takes the place of the mean. Each layer keeps as
many filters as MPFL's does under the consensus ``top_k``.

References:
  Gez and Cohen, `MPFL <https://arxiv.org/abs/2312.03889>`_, 2023, whose public code compares its
  mask with that of averaged weights.
"""

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune.federated import aggregators, early_stopping
from fedjaxprune.method import Method, Needs
from fedjaxprune.methods import _filter_rounds
from fedjaxprune.pruning.structured import filters
from fedjaxprune.rounds.protocol import FieldSpec
from fedjaxprune.rounds.task import Task
from fedjaxprune.types import Aggregator, Algorithm


class AveragedFilters(_filter_rounds.RankingSettings):
    """Settings of filters that averaged weights decide."""


def build(settings: AveragedFilters, task: Task) -> Algorithm:
    """Build the control.

    Raises:
      ValueError: the network has no filters.
    """
    plan, targets = _filter_rounds.plan_ranking(task, settings)
    is_plain = isinstance(task.protocol.aggregator, Aggregator | None)

    def server_update(key, state, fields):
        del key  # deterministic
        share = 1.0 / fields["num_messages"].astype(jnp.float32) if is_plain else jnp.float32(1.0)
        mean = jax.tree.map(
            lambda start, total: start + (share * total).astype(start.dtype),
            masks_lib.apply(state.masks, state.params),
            fields["trained"],
        )
        keep, step = state.method.keep, plan.first_step + state.round
        keep = filters.ranked(plan.layers, mean, keep, targets(step, keep))
        return _filter_rounds.apply_filters(plan, task.protocol, state, keep, step=step)

    average = _filter_rounds.exchange(
        task,
        settings,
        plan,
        name="average",
        client=early_stopping.report(
            _filter_rounds.trainer(task, settings),
            readings={"trained": lambda delta, masks: delta},
            keep=("metrics",),
        ),
        fields={"trained": FieldSpec(aggregators.unweighted_sum() if is_plain else None)},
        server_update=server_update,
    )
    return _filter_rounds.train_after(task, settings, plan, (average,))


METHOD = Method(
    build=build,
    settings=AveragedFilters,
    needs=Needs(convolutions=True),
    default_model="resnet8",
    law_settings={"num_prune_steps": 1, "vote_epochs": 3, "layers": "all"},
    nothing_pruned={"sparsity": 0.0},
)
