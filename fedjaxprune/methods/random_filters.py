"""Train under filters drawn at random; a control of MPFL.

Each layer keeps exactly ``F - round(sparsity * F)`` filters, as MPFL's does under the consensus
``top_k``. So masks can be compared at equal sparsity, layer by layer. They follow from the run's
seed and do not travel.
"""

import jax
import jax.numpy as jnp

from fedjaxprune.method import Method, Needs
from fedjaxprune.methods import _filter_rounds
from fedjaxprune.pruning.structured import filters
from fedjaxprune.rounds.server_work import no_loss, server_round
from fedjaxprune.rounds.task import Task
from fedjaxprune.types import Algorithm


class RandomFilters(_filter_rounds.FilterSettings):
    """Settings of random filters."""


def build(settings: RandomFilters, task: Task) -> Algorithm:
    """Build the control.

    Raises:
      ValueError: the network has no filters.
    """
    plan = _filter_rounds.make_plan(task, settings, num_steps=1, stop=1.0)
    targets = filters.targets(plan.layers, filters.even_steps(settings.sparsity, 1))

    def work(key, state, population):
        del population  # no data decides
        last, keep = jnp.int32(1), state.method.keep
        drawn = tuple(
            filters.largest((jax.random.uniform(own, bits.shape),), bits, count)
            for own, bits, count in zip(
                jax.random.split(key, len(keep)), keep, targets(last, keep), strict=True
            )
        )
        state = _filter_rounds.apply_filters(plan, task.protocol, state, drawn, step=last)
        return state, no_loss()

    draw = server_round("draw", work, masks_known_to="everybody")
    return _filter_rounds.train_after(task, settings, plan, (draw,))


METHOD = Method(
    build=build,
    settings=RandomFilters,
    needs=Needs(convolutions=True),
    default_model="resnet8",
    law_settings={"layers": "all"},
    nothing_pruned={"sparsity": 0.0},
)
