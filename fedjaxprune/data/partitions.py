"""Who holds which examples: host-side partitions of a data set into clients.

A partition is a list of int32 index arrays, one per client. The arrays are disjoint, and together
they are the whole data set. Randomness comes from the given NumPy generator alone.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from fedjaxprune.data import checks, population_checks, splits
from fedjaxprune.errors import ConfigError, DataError, near_miss
from fedjaxprune.registry import Part
from fedjaxprune.settings import Count, Positive, Settings, setting
from fedjaxprune.types import Examples, Population

Partition = list[np.ndarray]

_NUM_TRIES = 100


def iid(rng: np.random.Generator, labels: np.ndarray, *, num_clients: int) -> Partition:
    """Deal shuffled examples, whatever their labels, so that sizes differ by at most one.

    Args:
      rng: decides who gets what.
      labels: ``[E]`` integers.
      num_clients: ``N``, at most ``E``.

    Raises:
      ValueError: if some client would go without examples.
    """
    labels = _check(labels, num_clients)
    shuffled = rng.permutation(labels.size).astype(np.int32)
    return np.array_split(shuffled, num_clients)


def stratified(rng: np.random.Generator, labels: np.ndarray, *, num_clients: int) -> Partition:
    """Deal each class round-robin, so that every client has a miniature of the whole.

    Each class starts at the client where the one before stopped (FedDIP's code starts again at the
    first client), so sizes differ by at most one, as each class's counts do. Arguments
    and errors are those of `iid`.
    """
    labels = _check(labels, num_clients)
    dealt = np.concatenate([rng.permutation(rows) for rows in splits.by_class(labels)])
    return [np.sort(dealt[client::num_clients]).astype(np.int32) for client in range(num_clients)]


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
    labels = _check(labels, num_clients)
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
    held: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    classes_left = np.full(num_clients, classes_per_client)
    for c in rng.permutation(len(classes)):
        takers = np.lexsort((rng.random(num_clients), -classes_left))[: counts[c]]
        classes_left[takers] -= 1
        pieces = np.array_split(rng.permutation(classes[c]), counts[c])
        for client, piece in zip(takers, pieces, strict=True):
            held[client].append(piece)
    return [np.sort(np.concatenate(pieces)).astype(np.int32) for pieces in held]


def dirichlet(
    rng: np.random.Generator, labels: np.ndarray, *, num_clients: int, alpha: float, min_size: int
) -> Partition:
    """Share out each class by a draw from a symmetric Dirichlet distribution over the clients.

    Clients that already hold ``E / N`` examples get nothing of the classes that follow. A draw that
    leaves some client below `min_size` is thrown away. After 100 such draws the last one is
    topped up: clients that lack examples get them, one by one, from the client that is largest at
    that moment, so this always ends.

    Args:
      rng: decides the shares, the order of the classes and who gets what within a class.
      labels: ``[E]`` integers.
      num_clients: ``N``.
      alpha: concentration; small is skewed, large is even.
      min_size: examples that every client gets at least, 0 or more.

    Raises:
      ValueError: if `alpha` is not positive, or there are not `min_size` examples for everybody.

    References:
      Hsu, Qi and Brown, `Measuring the Effects of Non-Identical Data Distribution for Federated
      Visual Classification <https://arxiv.org/abs/1909.06335>`_, 2019; the limit and the repetition
      as in Li et al., `Federated Learning on Non-IID Data Silos <https://arxiv.org/abs/2102.02079>`_,
      2022.
    """
    labels = _check(labels, num_clients, min_size=min_size)
    if not (np.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be a positive number, got {alpha}.")
    classes = [rng.permutation(rows) for rows in splits.by_class(labels)]
    counts = np.zeros((len(classes), num_clients), np.int64)
    for _ in range(_NUM_TRIES):
        counts = _dirichlet_counts(rng, [rows.size for rows in classes], num_clients, alpha)
        if counts.sum(axis=0).min() >= min_size:
            break
    cuts = np.cumsum(counts, axis=1)[:, :-1]
    pieces = map(np.split, classes, cuts)
    parts = [np.concatenate(held) for held in zip(*pieces, strict=True)]
    return [np.sort(part).astype(np.int32) for part in _top_up(rng, parts, min_size)]


def by_key(keys: np.ndarray | Sequence, *, min_size: int = 1) -> Partition:
    """Make one client of each distinct key (a writer, a device), in the order of the keys.

    Args:
      keys: ``[E]`` of anything that sorts.
      min_size: examples of a key with fewer are not used.

    Raises:
      ValueError: if there are no keys, or none has so many examples.
    """
    keys = np.asarray(keys)
    if keys.ndim != 1 or keys.size == 0:
        raise ValueError(f"keys must be a list of at least one key, got shape {keys.shape}.")
    checks.keys(keys, "keys", keys.size)
    try:
        _, inverse = np.unique(keys, return_inverse=True)
    except TypeError:
        raise DataError("keys must sort, but some are numbers and some are text.") from None
    parts = [rows.astype(np.int32) for rows in splits.by_class(inverse)]
    kept = [rows for rows in parts if rows.size >= min_size]
    if not kept:
        raise ValueError(
            f"none of the {len(parts)} clients has {min_size} examples; the largest has "
            f"{max(rows.size for rows in parts)}."
        )
    return kept


def population(
    examples: Examples, parts: Iterable[ArrayLike], *, num_classes: int | None = None
) -> Population:
    """Put examples on the device, once and as stored, with who holds which.

    Values are kept as JAX keeps them: 64 bits as 32, unless ``jax_enable_x64`` is set.

    Args:
      examples: tree of ``[E, ...]``, of finite real numbers. Those of `batching` are ``{"inputs":
        ..., "labels": ...}``: inputs may be a tree of arrays; so may the targets of a loss of one's
        own.
      parts: the clients' indices; they may overlap, leave examples out, repeat one, which then
        counts as often, or be empty.
      num_classes: labels must be less; None does not look, and the loss of an example with another
        label is NaN.

    Raises:
      DataError: a value cannot be used or does not fit its type, the leaves differ in `E`, or an
        index is no whole number in ``[0, E)``.
    """
    stored, num_examples = population_checks.examples(examples, num_classes=num_classes)
    order, offsets = population_checks.rows(parts, num_examples)
    return Population(
        examples=jax.tree.map(jnp.asarray, stored),
        order=jnp.asarray(order),
        offsets=jnp.asarray(offsets),
    )


def histogram(parts: Iterable[ArrayLike], labels: np.ndarray, *, num_classes: int) -> np.ndarray:
    """Count the labels of every client: ``[N, num_classes]`` int64.

    Raises:
      DataError: a label is no class, or a client's index no example.
    """
    stored, num_examples = population_checks.examples({"labels": labels}, num_classes=num_classes)
    order, offsets = population_checks.rows(parts, num_examples)
    own = np.split(np.asarray(stored["labels"])[order], offsets[1:-1])
    return np.stack([np.bincount(classes, minlength=num_classes) for classes in own])


def _dirichlet_counts(
    rng: np.random.Generator, sizes: list[int], num_clients: int, alpha: float
) -> np.ndarray:
    """Draw how many examples of each class go to each client: ``[classes, N]``."""
    held = np.zeros(num_clients, np.int64)
    counts = np.zeros((len(sizes), num_clients), np.int64)
    for c in rng.permutation(len(sizes)):
        open_ = held * num_clients < sum(sizes)
        # Gamma variates divided by their sum are Dirichlet ones, also among the clients left.
        shares = np.where(open_, rng.standard_gamma(alpha, num_clients), 0.0)
        if shares.sum() == 0.0:  # tiny alpha: all the variates underflowed; one client takes all
            shares[rng.choice(np.flatnonzero(open_))] = 1.0
        cuts = np.floor(np.cumsum(shares) / shares.sum() * sizes[c]).astype(np.int64)
        cuts[-1] = sizes[c]
        counts[c] = np.diff(np.minimum(cuts, sizes[c]), prepend=0)
        held += counts[c]
    return counts


def _top_up(rng: np.random.Generator, parts: list[np.ndarray], min_size: int) -> list[np.ndarray]:
    """Move random examples from the largest clients until each has `min_size`."""
    sizes = np.array([part.size for part in parts])
    if sizes.min() >= min_size:
        return parts
    parts = [rng.permutation(part) for part in parts]
    spare = [(-int(size), client) for client, size in enumerate(sizes)]
    heapq.heapify(spare)
    for client in np.flatnonzero(sizes < min_size):
        received = []
        for _ in range(min_size - sizes[client]):
            size, donor = spare[0]  # larger than min_size: else no client would lack examples
            received.append(parts[donor][-size - 1])
            heapq.heapreplace(spare, (size + 1, donor))
            sizes[donor] -= 1
        parts[client] = np.concatenate([parts[client], np.array(received, parts[client].dtype)])
        sizes[client] = min_size
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def _check(labels: np.ndarray, num_clients: int, *, min_size: int = 1) -> np.ndarray:
    """Refuse labels that are no classes, and populations with too few examples for everybody."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be one integer per example, got {labels.dtype} of shape {labels.shape}."
        )
    for name, value in (("num_clients", num_clients), ("min_size", min_size)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
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


class ShardsSettings(Settings):
    """How many classes a client holds."""

    classes_per_client: Count = setting(2, "Classes that every client holds.", unit="classes")


class DirichletSettings(Settings):
    """How unevenly the classes are spread."""

    alpha: Positive = setting(0.5, "Concentration: small is skewed, large is even.")
    min_client_size: Count = setting(
        10, "Examples that every client gets at least.", unit="examples"
    )


class ByKeySettings(Settings):
    """Which column of the data set names the clients."""

    key: str | None = setting(None, "Column with client ids.", unset="the only one")
    min_client_size: Count = setting(
        1, "A client with fewer examples is left out with them.", unit="examples"
    )


def _iid(settings: Settings, rng: Any, labels: Any, *, num_clients: int, keys=None) -> Partition:
    return iid(rng, splits.classes_or_one(labels), num_clients=num_clients)


def _by_class(partition: Callable[..., Partition], **options: str) -> Callable[..., Partition]:
    """Make the `build` of a partition by classes; `options` are settings by their argument."""

    def build(settings: Settings, rng: Any, labels: Any, *, num_clients: int, keys=None):
        classes = np.asarray(labels)
        if classes.ndim != 1 or not np.issubdtype(classes.dtype, np.integer):
            raise ConfigError(
                f"partition {partition.__name__} needs one class per example, but the labels are "
                f"{classes.dtype} of shape {classes.shape}; use iid or by_key."
            )
        given = {argument: getattr(settings, name) for argument, name in options.items()}
        return partition(rng, classes, num_clients=num_clients, **given)

    return build


def _by_key(settings: ByKeySettings, rng: Any, labels: Any, *, num_clients=None, keys=None):
    """Make one client of each distinct id; `num_clients` is not read."""
    del rng, labels, num_clients
    keys = keys or {}
    have = ", ".join(keys) or "none"
    name = next(iter(keys)) if settings.key is None and len(keys) == 1 else settings.key
    if name is None:
        raise ConfigError(f"key must name a column with client ids; the data set has {have}.")
    if name not in keys:
        raise ConfigError(
            f"key must be a column with client ids ({have}), got {name!r}{near_miss(name, keys)}"
        )
    return by_key(keys[name], min_size=settings.min_client_size)


PARTS = {
    "iid": Part(build=_iid, summary="shuffled examples, sizes differ by at most one"),
    "stratified": Part(build=_by_class(stratified), summary="every client has all classes alike"),
    "shards": Part(
        build=_by_class(shards, classes_per_client="classes_per_client"),
        settings=ShardsSettings,
        summary="a number of classes per client",
    ),
    "dirichlet": Part(
        build=_by_class(dirichlet, alpha="alpha", min_size="min_client_size"),
        settings=DirichletSettings,
        summary="Dirichlet shares of each class",
    ),
    "by_key": Part(
        build=_by_key, settings=ByKeySettings, summary="one client per value of a column"
    ),
}
