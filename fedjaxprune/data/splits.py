"""Set examples aside, for tests or for the server, before the rest goes to clients."""

import numpy as np

from fedjaxprune.errors import DataError


def split_rows(
    labels: np.ndarray, *, test_fraction: float, by_class: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out some examples for tests, the same ones every time: ``(rows, held)``, ascending.

    Args:
      labels: ``[E]`` of anything that sorts.
      test_fraction: in (0, 1).
      by_class: the same share of each class; a class with one example is for training.

    Raises:
      DataError: a side would be empty.
    """
    labels = np.asarray(labels)
    if not 0.0 < test_fraction < 1.0:
        raise DataError(f"test_fraction must lie in (0, 1), got {test_fraction}.")
    rng = np.random.default_rng(0)
    groups = [np.arange(len(labels))]
    if by_class and labels.ndim == 1:
        classes = labels.astype(str) if labels.dtype.kind == "O" else labels
        order = np.argsort(classes, kind="stable")
        _, first = np.unique(classes[order], return_index=True)
        if len(first) <= max(20, len(labels) // 2):
            groups = np.split(order, first[1:])
    held = np.zeros(len(labels), bool)
    for rows in groups:
        held[rng.permutation(rows)[: round(test_fraction * len(rows))]] = True
    if not held.any():  # classes too small to share
        rows, last = rng.permutation(len(labels)), []
        if len(groups) > 1:  # one of each class is for training
            last = [group[np.argmax(np.argsort(rows)[group])] for group in groups]
        rows = rows[~np.isin(rows, last)]
        held[rows[: round(test_fraction * len(labels))]] = True
    if held.all() or not held.any():
        classes = f" of {len(groups)} classes" if len(groups) > 1 else ""
        raise DataError(
            f"{len(labels)} examples{classes} are too few to hold out a test_fraction of "
            f"{test_fraction} for tests: give more, or test examples of their own."
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


def hold_out(
    rng: np.random.Generator, labels: np.ndarray, *, share: float | None = None, num: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Set some examples of each class aside for the server, before the rest goes to clients.

    Args:
      rng: decides which.
      labels: classes ``[E]``; any others count as one class (`classes_or_one`).
      share: of each class's examples, rounded; None takes `num` of each class.
      num: examples of each class where no share is given.

    Returns:
      ``(held, rest)``, int32 rows in ascending order.

    Raises:
      ValueError: if a class is left without examples at the server or among the clients.
    """
    labels = classes_or_one(labels)
    if share is not None and not 0.0 < share < 1.0:
        raise ValueError(f"share must lie in (0, 1), got {share}.")
    held, rest = [], []
    for rows in by_class(labels):
        rows, count = rng.permutation(rows), num if share is None else round(share * rows.size)
        if not 0 < count < rows.size:
            where = "among the clients" if count > 0 else "at the server"
            number = f"{count} examples of each class"
            asked = number if share is None else f"a held-out share of {share}"
            raise ValueError(
                f"{asked} leaves class {labels[rows[0]]}, which has {rows.size} training "
                f"examples, without any {where}."
            )
        held.append(rows[:count])
        rest.append(rows[count:])
    return tuple(np.sort(np.concatenate(part)).astype(np.int32) for part in (held, rest))  # pyright: ignore[reportReturnType]


def classes_or_one(labels: np.ndarray) -> np.ndarray:
    """Give classes ``[E]`` as they are; any other labels as one class for all examples."""
    labels = np.asarray(labels)
    if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
        return labels
    return np.zeros(len(labels), np.int32)


def by_class(labels: np.ndarray) -> list[np.ndarray]:
    """List the rows of each label that occurs, in the order of the labels."""
    order = np.argsort(labels, kind="stable")
    _, first = np.unique(labels[order], return_index=True)
    return np.split(order, first[1:])
