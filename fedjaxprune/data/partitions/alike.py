"""Partitions whose clients are alike, and one that is like another partition."""

from typing import Any

import numpy as np

from fedjaxprune.data import rows, splits
from fedjaxprune.data.partitions import _owners
from fedjaxprune.data.rows import Partition
from fedjaxprune.registry import Part
from fedjaxprune.settings import Settings


def iid(rng: np.random.Generator, labels: np.ndarray, *, num_clients: int) -> Partition:
    """Deal shuffled examples, whatever their labels, so that sizes differ by at most one.

    Args:
      rng: decides who gets what.
      labels: ``[E]`` integers.
      num_clients: ``N``, at most ``E``.

    Raises:
      ValueError: if some client would go without examples.
    """
    labels = _owners.check(labels, num_clients)
    mean, rest = divmod(labels.size, num_clients)
    return rows.of_sizes(rng.permutation(labels.size), mean + (np.arange(num_clients) < rest))


def stratified(rng: np.random.Generator, labels: np.ndarray, *, num_clients: int) -> Partition:
    """Deal each class round-robin, so that every client has a miniature of the whole.

    Each class starts at the client where the one before stopped (FedDIP's code starts again at the
    first client), so sizes differ by at most one, as each class's counts do. Arguments
    and errors are those of `iid`.
    """
    labels = _owners.check(labels, num_clients)
    dealt = np.concatenate([rng.permutation(own) for own in splits.by_class(labels)])
    owners = np.empty(labels.size, np.int64)
    owners[dealt] = np.arange(labels.size) % num_clients
    return _owners.of_owners(owners, num_clients)


def like(rng: np.random.Generator, labels: np.ndarray, *, counts: np.ndarray) -> Partition:
    """Share out other examples, such as those for tests, as the classes of clients were shared out.

    A client's number of examples of a class is its share of that class by `counts`, times the
    class's examples here, rounded by largest remainders. Examples of a class that nobody holds by
    `counts` belong to nobody.

    Args:
      rng: decides who gets what within a class.
      labels: ``[E]`` classes of these examples.
      counts: ``[N, classes]`` of the clients' other examples (`histogram`).

    Raises:
      ValueError: if `counts` are not such numbers, or labels are no classes of theirs.
    """
    labels, counts = _owners.check(labels, 1), np.asarray(counts)
    if counts.ndim != 2 or counts.dtype.kind not in "iu" or counts.size == 0 or counts.min() < 0:
        raise ValueError(
            "counts must be numbers of examples of shape (clients, classes), got "
            f"{counts.dtype} of shape {counts.shape}."
        )
    if labels.min() < 0 or labels.max() >= counts.shape[1]:
        raise ValueError(
            f"labels must lie in [0, {counts.shape[1]}), the classes of counts, got "
            f"{labels.min()} to {labels.max()}."
        )
    owners = np.full(labels.size, -1)
    for own in splits.by_class(labels):
        held = counts[:, labels[own[0]]]
        if held.any():
            sizes = _largest_remainders(held, own.size)
            owners[rng.permutation(own)] = np.repeat(np.arange(len(held)), sizes)
    return _owners.of_owners(owners, len(counts))


def _largest_remainders(weights: np.ndarray, size: int) -> np.ndarray:
    """Split `size` in proportion to whole weights ``[N]``; of equal remainders the first wins."""
    products = weights.astype(np.int64) * size
    sizes, remainders = np.divmod(products, weights.sum(dtype=np.int64))
    sizes[np.argsort(-remainders, kind="stable")[: size - sizes.sum()]] += 1
    return sizes


def _iid(settings: Settings, rng: Any, labels: Any, *, num_clients: int, keys=None) -> Partition:
    return iid(rng, splits.classes_or_one(labels), num_clients=num_clients)


PARTS = {
    "iid": Part(build=_iid, summary="shuffled examples, sizes differ by at most one"),
    "stratified": Part(
        build=_owners.by_class(stratified), summary="every client has all classes alike"
    ),
}
