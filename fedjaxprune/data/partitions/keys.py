"""One client for each value of a column: clients that the data set has by nature."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from fedjaxprune.data import checks, rows
from fedjaxprune.data.rows import Partition
from fedjaxprune.errors import ConfigError, DataError, near_miss
from fedjaxprune.registry import Part
from fedjaxprune.settings import Count, Settings, setting


def by_key(
    keys: np.ndarray | Sequence,
    *,
    min_size: int = 1,
    max_clients: int | None = None,
    rng: np.random.Generator | None = None,
) -> Partition:
    """Make one client of each distinct key (a writer, a device), in the order of the keys.

    Args:
      keys: ``[E]`` of anything that sorts.
      min_size: examples of a key with fewer are not used.
      max_clients: how many of these clients are used; None: all.
      rng: draws these clients; None takes the largest, of equal ones the first.

    Raises:
      ValueError: if there are no keys, none has so many examples, or there are fewer than
        `max_clients` such clients.
    """
    keys = np.asarray(keys)
    if keys.ndim != 1 or keys.size == 0:
        raise ValueError(f"keys must be a list of at least one key, got shape {keys.shape}.")
    checks.keys(keys, "keys", keys.size)
    try:
        _, inverse = np.unique(keys, return_inverse=True)
    except TypeError:
        raise DataError("keys must sort, but some are numbers and some are text.") from None
    sizes = np.bincount(inverse)
    kept = np.flatnonzero(sizes >= min_size)
    if not len(kept):
        raise ValueError(
            f"none of the {len(sizes)} clients has {min_size} examples; the largest has "
            f"{sizes.max()}."
        )
    if max_clients is None:
        return _of_clients(inverse, sizes, kept)
    if not 1 <= max_clients <= len(kept):
        raise ValueError(
            f"max_clients must lie in [1, {len(kept)}], the number of clients with at least "
            f"{min_size} example(s), got {max_clients}."
        )
    if rng is not None:
        chosen = rng.choice(len(kept), max_clients, replace=False)
    else:
        chosen = np.argsort(-sizes[kept], kind="stable")[:max_clients]
    return _of_clients(inverse, sizes, kept[np.sort(chosen)])


def _of_clients(numbers: np.ndarray, sizes: np.ndarray, chosen: np.ndarray) -> Partition:
    """Give each of the chosen clients its rows, by everybody's sizes and the clients ``[E]``."""
    is_chosen = np.zeros(len(sizes), np.bool_)
    is_chosen[chosen] = True
    order = np.argsort(numbers, kind="stable")
    return rows.of_sizes(order[is_chosen[numbers[order]]], sizes[chosen])


class ByKeySettings(Settings):
    """Which column of the data set names the clients."""

    key: str | None = setting(None, "Column with client ids.", unset="the only one")
    min_client_size: Count = setting(
        1, "A client with fewer examples is left out with them.", unit="examples"
    )
    max_clients: Count | None = setting(
        None, "How many of the clients are used.", unit="clients", unset="all"
    )
    choice: Literal["largest", "random"] = setting(
        "largest", "Which clients are used where max_clients is set."
    )


def _by_key(settings: ByKeySettings, rng: Any, labels: Any, *, num_clients=None, keys=None):
    """Make one client of each distinct id; `num_clients` is not read."""
    del labels, num_clients
    keys = keys or {}
    have = ", ".join(keys) or "none"
    name = next(iter(keys)) if settings.key is None and len(keys) == 1 else settings.key
    if name is None:
        raise ConfigError(f"key must name a column with client ids; the data set has {have}.")
    if name not in keys:
        raise ConfigError(
            f"key must be a column with client ids ({have}), got {name!r}{near_miss(name, keys)}"
        )
    return by_key(
        keys[name],
        min_size=settings.min_client_size,
        max_clients=settings.max_clients,
        rng=rng if settings.choice == "random" else None,
    )


PARTS = {
    "by_key": Part(
        build=_by_key, settings=ByKeySettings, summary="one client per value of a column"
    )
}
