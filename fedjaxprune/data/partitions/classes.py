"""Partitions in which a client holds so many classes, or so many shards."""

import heapq

import numpy as np

from fedjaxprune.data import splits
from fedjaxprune.data.partitions import _owners
from fedjaxprune.data.rows import Partition
from fedjaxprune.registry import Part
from fedjaxprune.settings import Count, Settings, setting


def shards(
    rng: np.random.Generator, labels: np.ndarray, *, num_clients: int, classes_per_client: int
) -> Partition:
    """Cut the classes into shards and give every client shards of so many different classes.

    The pathological split of FedAvg, made exact: each client gets `classes_per_client` shards of
    as many classes. A class is cut into more shards the larger it is, so that shards are as equal
    as the class sizes allow, and all examples are used.

    Args:
      rng: decides which classes meet at a client, and who gets what within a class.
      labels: ``[E]`` integers.
      num_clients: ``N``.
      classes_per_client: at most the number of classes.

    Raises:
      ValueError: if no such partition exists: more classes than shards, or too few examples or
        classes to fill the shards.

    References:
      McMahan et al., `Communication-Efficient Learning of Deep Networks from Decentralized Data
      <https://arxiv.org/abs/1602.05629>`_, 2017.
    """
    labels = _owners.check(labels, num_clients)
    classes = splits.by_class(labels)
    num_shards = num_clients * classes_per_client
    is_whole = isinstance(classes_per_client, int | np.integer)
    if not is_whole or not 1 <= classes_per_client <= len(classes):
        raise ValueError(
            f"classes_per_client must lie in [1, {len(classes)}], the number of classes, "
            f"got {classes_per_client}."
        )
    if num_shards < len(classes):
        raise ValueError(
            f"num_clients * classes_per_client = {num_shards} shards cannot hold {len(classes)} "
            "classes: some examples would belong to no client."
        )
    # A class can be cut into no more shards than it has examples, or than there are clients.
    limits = [min(rows.size, num_clients) for rows in classes]
    if sum(limits) < num_shards:
        raise ValueError(
            f"{num_clients} clients of {classes_per_client} classes each need {num_shards} shards, "
            f"but the classes can be cut into {sum(limits)} only; take fewer clients or classes."
        )
    counts = [1] * len(classes)
    heap = [(-float(rows.size), c) for c, rows in enumerate(classes) if limits[c] > 1]
    heapq.heapify(heap)
    for _ in range(num_shards - len(classes)):  # always cut the class of the largest shards
        _, c = heapq.heappop(heap)
        counts[c] += 1
        if counts[c] < limits[c]:
            heapq.heappush(heap, (-classes[c].size / counts[c], c))
    # Taking the clients with most classes left first always succeeds (Gale and Ryser).
    owners = np.empty(labels.size, np.int64)
    classes_left = np.full(num_clients, classes_per_client)
    for c in rng.permutation(len(classes)):
        takers = np.lexsort((rng.random(num_clients), -classes_left))[: counts[c]]
        classes_left[takers] -= 1
        mean, rest = divmod(classes[c].size, counts[c])
        sizes = mean + (np.arange(counts[c]) < rest)
        owners[rng.permutation(classes[c])] = np.repeat(takers, sizes)
    return _owners.of_owners(owners, num_clients)


def sorted_shards(
    rng: np.random.Generator, labels: np.ndarray, *, num_clients: int, shards_per_client: int
) -> Partition:
    """Sort the examples by label, cut them into equal shards, and deal these at random.

    The split of FedAvg as its text says: a client can get two shards of one class, a shard can hold
    two classes where classes do not end with it, and the last ``E mod shards`` examples belong to
    nobody. `shards` is the exact relative.

    Args:
      rng: decides which shards meet at a client.
      labels: ``[E]`` integers.
      num_clients: ``N``.
      shards_per_client: shards that every client gets.

    Raises:
      ValueError: if there are more shards than examples.

    References:
      McMahan et al., `Communication-Efficient Learning of Deep Networks from Decentralized Data
      <https://arxiv.org/abs/1602.05629>`_, 2017; the order within a class as FedLab's code.
    """
    labels = _owners.check(labels, num_clients)
    if not _owners.is_whole(shards_per_client) or shards_per_client < 1:
        raise ValueError(
            f"shards_per_client must be a whole number of at least 1, got {shards_per_client!r}."
        )
    num_shards = num_clients * shards_per_client
    size = labels.size // num_shards
    if size == 0:
        raise ValueError(
            f"num_clients * shards_per_client = {num_shards} shards need as many examples, but "
            f"there are {labels.size}."
        )
    dealt = rng.permutation(np.repeat(np.arange(num_clients), shards_per_client))
    owners = np.full(labels.size, -1)
    owners[np.argsort(labels, kind="stable")[: num_shards * size]] = np.repeat(dealt, size)
    return _owners.of_owners(owners, num_clients)


def label_count(
    rng: np.random.Generator, labels: np.ndarray, *, num_clients: int, labels_per_client: int
) -> Partition:
    """Give client `i` the class ``i mod K`` and others at random, and split classes among holders.

    Each class is split as evenly as it can be, so sizes differ with how many clients hold a class.
    Where there are fewer clients than the `K` classes, those that no client has yet come first
    among the others, so that all examples are used.

    Args:
      rng: decides the other classes, and who gets what within a class.
      labels: ``[E]`` integers.
      num_clients: ``N``.
      labels_per_client: classes of every client, at most `K`. A client holds fewer where a class
        has fewer examples than holders.

    Raises:
      ValueError: if some examples would belong to no client, or some client would go without.

    References:
      Li et al., `Federated Learning on Non-IID Data Silos <https://arxiv.org/abs/2102.02079>`_,
      2022 (``#label``), and its public code, which has ten classes.
    """
    labels = _owners.check(labels, num_clients)
    classes = splits.by_class(labels)
    number = len(classes)
    if not _owners.is_whole(labels_per_client) or not 1 <= labels_per_client <= number:
        raise ValueError(
            f"labels_per_client must be a whole number in [1, {number}], the number of classes, "
            f"got {labels_per_client!r}."
        )
    if num_clients * labels_per_client < number:
        raise ValueError(
            f"num_clients * labels_per_client = {num_clients * labels_per_client} cannot hold "
            f"{number} classes: some examples would belong to no client."
        )
    clients = np.arange(num_clients)
    ranks = rng.random((num_clients, number))  # a client holds the classes of its smallest ranks
    ranks[clients, clients % number] = -1.0
    if num_clients < number:
        spare = rng.permutation(np.arange(num_clients, number))
        ranks[np.arange(len(spare)) % num_clients, spare] -= 1.0
    held = np.argsort(ranks, axis=1)[:, :labels_per_client]
    owners = np.empty(labels.size, np.int64)
    for c, rows in enumerate(classes):
        holders = np.flatnonzero((held == c).any(axis=1))
        quotient, rest = divmod(rows.size, len(holders))
        sizes = quotient + (np.arange(len(holders)) < rest)
        owners[rng.permutation(rows)] = np.repeat(holders, sizes)
    parts = _owners.of_owners(owners, num_clients)
    if without := int(np.sum(parts.sizes == 0)):
        raise ValueError(
            f"{without} of {num_clients} clients would go without examples, as their classes have "
            "fewer examples than holders; take fewer clients or classes."
        )
    return parts


class ShardsSettings(Settings):
    """How many classes a client holds."""

    classes_per_client: Count = setting(2, "Classes that every client holds.", unit="classes")


class SortedShardsSettings(Settings):
    """How many shards a client holds."""

    shards_per_client: Count = setting(2, "Shards that every client holds.", unit="shards")


class LabelCountSettings(Settings):
    """How many classes a client holds."""

    labels_per_client: Count = setting(2, "Classes that every client holds.", unit="classes")


PARTS = {
    "shards": Part(
        build=_owners.by_class(shards, classes_per_client="classes_per_client"),
        settings=ShardsSettings,
        summary="a number of classes per client, near equal sizes",
    ),
    "sorted_shards": Part(
        build=_owners.by_class(sorted_shards, shards_per_client="shards_per_client"),
        settings=SortedShardsSettings,
        summary="equal shards of the examples sorted by class (FedAvg's text)",
    ),
    "label_count": Part(
        build=_owners.by_class(label_count, labels_per_client="labels_per_client"),
        settings=LabelCountSettings,
        summary="a number of classes per client, each split among its holders",
    ),
}
