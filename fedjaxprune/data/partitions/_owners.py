"""What partitions share: checks, cut points, clients' least sizes and the grouping by owner."""

import heapq
from collections.abc import Callable
from typing import Any

import numpy as np

from fedjaxprune.data import rows
from fedjaxprune.data.rows import Partition
from fedjaxprune.errors import ConfigError
from fedjaxprune.settings import Settings

NUM_TRIES = 100  # draws that are thrown away at most


def check(labels: np.ndarray, num_clients: int, *, min_size: int = 1) -> np.ndarray:
    """Refuse labels that are no classes, and populations with too few examples for everybody."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be one integer per example, got {labels.dtype} of shape {labels.shape}."
        )
    for name, value in (("num_clients", num_clients), ("min_size", min_size)):
        if not is_whole(value):
            raise ValueError(f"{name} must be a whole number, got {value!r}.")
    if num_clients < 1:
        raise ValueError(f"num_clients must be at least 1, got {num_clients}.")
    if min_size < 0:
        raise ValueError(f"min_size must not be negative, got {min_size}.")
    if num_clients * min_size > labels.size:
        raise ValueError(
            f"num_clients = {num_clients} with at least {min_size} example(s) each need "
            f"{num_clients * min_size} examples, but there are {labels.size}."
        )
    if labels.size == 0:
        raise ValueError("labels must have at least one example, got none.")
    return labels


def is_whole(value: Any) -> bool:
    """Tell whether an argument is a whole number."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_positive(name: str, value: float) -> None:
    """Refuse a concentration that is not a positive number."""
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value}.")


def cut(shares: np.ndarray, size: int) -> np.ndarray:
    """Count who gets how many of `size` examples, by cut points at the rounded down sums of shares.

    Args:
      shares: ``[N]``, not negative, with a positive sum, by which they are divided.
      size: number of examples.

    Returns:
      ``[N]`` int64, of sum `size`.
    """
    cuts = np.floor(np.cumsum(shares) / shares.sum() * size).astype(np.int64)
    cuts[-1] = size
    return np.diff(np.minimum(cuts, size), prepend=0)


def shares(rng: np.random.Generator, alpha: float, num_clients: int) -> np.ndarray:
    """Draw ``[N]`` shares from a symmetric Dirichlet distribution, not divided by their sum."""
    drawn = rng.standard_gamma(alpha, num_clients)
    if drawn.sum() == 0.0:  # tiny alpha: all the variates underflowed; one client takes all
        drawn[rng.integers(num_clients)] = 1.0
    return drawn


def raised(sizes: np.ndarray, min_size: int) -> np.ndarray:
    """Raise sizes ``[N]`` to `min_size`, one by one from the size that is largest at that moment.

    Their sum must be at least ``N * min_size``, and stays.
    """
    if sizes.min() >= min_size:
        return sizes
    sizes = sizes.copy()
    donors = [(-int(size), client) for client, size in enumerate(sizes)]
    heapq.heapify(donors)
    for client in np.flatnonzero(sizes < min_size):
        for _ in range(min_size - sizes[client]):
            size, donor = donors[0]  # larger than min_size: else no client would lack examples
            heapq.heapreplace(donors, (size + 1, donor))
            sizes[donor] -= 1
        sizes[client] = min_size
    return sizes


def of_owners(owners: np.ndarray, num_clients: int) -> Partition:
    """Give every client its rows, ascending, by the owner ``[E]`` of each row; -1 is nobody."""
    order = np.argsort(owners, kind="stable")
    counts = np.bincount(owners + 1, minlength=num_clients + 1)
    return rows.of_sizes(order[counts[0] :], counts[1:])


def by_class(partition: Callable[..., Partition], **options: str) -> Callable[..., Partition]:
    """Make the `build` of a partition by classes; `options` are settings by their argument."""

    def build(settings: Settings, rng: Any, labels: Any, *, num_clients: int, keys=None):
        del keys
        classes = np.asarray(labels)
        if classes.ndim != 1 or not np.issubdtype(classes.dtype, np.integer):
            raise ConfigError(
                f"partition {partition.__name__} needs one class per example, but the labels are "
                f"{classes.dtype} of shape {classes.shape}; use iid or by_key."
            )
        given = {argument: getattr(settings, name) for argument, name in options.items()}
        return partition(rng, classes, num_clients=num_clients, **given)

    build.__doc__ = partition.__doc__  # for those who ask what the part is
    return build
