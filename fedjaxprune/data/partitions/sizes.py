"""Clients that differ in how many examples they hold, and in nothing else."""

from typing import Any

import numpy as np

from fedjaxprune.data import splits
from fedjaxprune.data.partitions import _owners
from fedjaxprune.data.rows import Partition
from fedjaxprune.registry import Part
from fedjaxprune.settings import Count, Positive, Settings, setting


def quantity(
    rng: np.random.Generator, labels: np.ndarray, *, num_clients: int, alpha: float, min_size: int
) -> Partition:
    """Deal shuffled examples in sizes drawn from a symmetric Dirichlet distribution.

    Sizes are differences of the cut points ``floor(E * sum of shares)``. Before the minimum, their
    coefficient of variation is about ``sqrt((N - 1) / (alpha N + 1))``: 0.44 for `alpha` 5 and 100
    clients, 1.39 for 0.5. A draw that leaves some client below `min_size` is thrown away; after 100
    of them the last one's small clients get what they lack, one by one from the client that is
    largest at that moment.

    Args:
      rng: decides the sizes, and who gets what.
      labels: ``[E]`` integers, whose values do not matter.
      num_clients: ``N``.
      alpha: concentration; small is skewed, large is even.
      min_size: examples that every client gets at least, 0 or more.

    Raises:
      ValueError: if `alpha` is not positive, or there are not `min_size` examples for everybody.

    References:
      Li et al., `Federated Learning on Non-IID Data Silos <https://arxiv.org/abs/2102.02079>`_,
      2022 (quantity skew), and its public code.
    """
    labels = _owners.check(labels, num_clients, min_size=min_size)
    _owners.check_positive("alpha", alpha)
    sizes = np.zeros(num_clients, np.int64)
    for _ in range(_owners.NUM_TRIES):
        sizes = _owners.cut(_owners.shares(rng, alpha, num_clients), labels.size)
        if sizes.min() >= min_size:
            break
    owners = np.repeat(np.arange(num_clients), _owners.raised(sizes, min_size))
    return _owners.of_owners(rng.permutation(owners), num_clients)


class QuantitySettings(Settings):
    """How unevenly examples are spread."""

    alpha: Positive = setting(0.5, "Concentration: small is skewed, large is even.")
    min_client_size: Count = setting(
        10, "Examples that every client gets at least.", unit="examples"
    )


def _quantity(
    settings: QuantitySettings, rng: Any, labels: Any, *, num_clients: int, keys=None
) -> Partition:
    del keys
    given = {"alpha": settings.alpha, "min_size": settings.min_client_size}
    return quantity(rng, splits.classes_or_one(labels), num_clients=num_clients, **given)


PARTS = {
    "quantity": Part(
        build=_quantity,
        settings=QuantitySettings,
        summary="shuffled examples, Dirichlet sizes (quantity skew)",
    )
}
