"""Random masks: a control that runs FedAvg under one mask drawn at random.

The mask follows from the run's seed, so it does not travel. A method whose masks depend on data
has to do better than this one at the same sparsity and allocation.

Every layer keeps at least one weight, in the place of one of the largest layer, so that the total
is exact and nothing is cut off. ``least_per_layer: 0`` switches this guard off.
"""

from fedjaxprune.method import Method
from fedjaxprune.methods import _fixed_masks
from fedjaxprune.rounds.task import Task
from fedjaxprune.types import Algorithm


class RandomMasks(_fixed_masks.FixedMaskSettings):
    """Settings of random masks."""

    least_per_layer: int = _fixed_masks.least_setting(1)


def build(settings: RandomMasks, task: Task) -> Algorithm:
    """Draw one mask in a round of the server's own, and train under it."""
    return _fixed_masks.train_under(task, settings.sparsity, _fixed_masks.draw(settings, task))


METHOD = Method(
    build=build,
    settings=RandomMasks,
    law_settings={"sparsity": 0.5},
    nothing_pruned={"sparsity": 0.0},
)
