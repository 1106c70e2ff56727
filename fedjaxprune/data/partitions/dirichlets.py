"""Label skew by Dirichlet draws: the procedures that share this name in the field."""

import heapq
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from fedjaxprune.data import splits
from fedjaxprune.data.partitions import _owners
from fedjaxprune.data.rows import Partition
from fedjaxprune.registry import Part
from fedjaxprune.settings import Count, NonNegative, Positive, Settings, setting

Order = Literal["random", "client"]

_BLOCK = 2**14  # slots whose classes are drawn at once


def dirichlet(
    rng: np.random.Generator, labels: np.ndarray, *, num_clients: int, alpha: float, min_size: int
) -> Partition:
    """Share out each class by a draw from a symmetric Dirichlet distribution over the clients.

    Clients that already hold ``E / N`` examples get nothing of the classes that follow. A draw that
    leaves some client below `min_size` is thrown away. After 100 such draws the last one is
    topped up: clients that lack examples get them, one by one, from the client that is largest at
    that moment, so this always ends. Classes come in random order; public codes take them in the
    order of their numbers, and repeat without end.

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
    options = {"num_clients": num_clients, "alpha": alpha, "min_size": min_size}
    return _by_shares(rng, labels, cap=True, num_tries=_owners.NUM_TRIES, **options)


def dirichlet_free(
    rng: np.random.Generator, labels: np.ndarray, *, num_clients: int, alpha: float, min_size: int
) -> Partition:
    """Share out each class as `dirichlet` does, but without its limit and its repetition.

    A client may get any part of any class, so sizes vary most here. Clients below `min_size` are
    topped up at once. Public codes leave clients without examples out instead. Arguments and errors
    are those of `dirichlet`.

    References:
      Hsu, Qi and Brown, `Measuring the Effects of Non-Identical Data Distribution for Federated
      Visual Classification <https://arxiv.org/abs/1909.06335>`_, 2019, class by class; Bibikar et
      al., `FedDST <https://arxiv.org/abs/2112.09824>`_, 2022, and its public code.
    """
    options = {"num_clients": num_clients, "alpha": alpha, "min_size": min_size}
    return _by_shares(rng, labels, cap=False, num_tries=1, **options)


def balanced_dirichlet(
    rng: np.random.Generator,
    labels: np.ndarray,
    *,
    num_clients: int,
    alpha: float,
    sigma: float = 0.0,
    order: Order = "random",
) -> Partition:
    """Draw each client's shares of the classes, and fill clients of given sizes by them.

    Sizes differ by at most one, or are log-normal. Each client draws its shares of the classes from
    a symmetric Dirichlet distribution, and each of its examples is of a class drawn by them among
    the classes that have examples left. Shares are kept by their logarithms, so that those of the
    classes left always have a sum (codes that draw again until a class fits may never end).

    Args:
      rng: decides sizes, shares, who is next and who gets what within a class.
      labels: ``[E]`` integers.
      num_clients: ``N``.
      alpha: concentration of one class; small is skewed, large is even. The text of Hsu et al. has
        the concentration of all classes together, which is the number of classes times this.
      sigma: of the logarithm of the sizes; 0 makes them equal. Sizes are drawn, scaled, rounded
        down, and what is missing goes to the first client; nobody stays without examples.
      order: ``"random"`` gives the next example to a client that is not full, uniformly;
        ``"client"`` fills client after client, so that the last ones get the classes that are left.

    Raises:
      ValueError: if `alpha` is not positive, `sigma` is negative, `order` is neither, or some
        client would go without examples.

    References:
      Acar et al., `FedDyn <https://arxiv.org/abs/2111.04263>`_, 2021 (``"random"``), and its public
      code; Hsu, Qi and Brown, `<https://arxiv.org/abs/1909.06335>`_, 2019 (``"client"``), as the
      code of Flower's baselines.
    """
    labels = _owners.check(labels, num_clients)
    _owners.check_positive("alpha", alpha)
    if not (np.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be a number of at least 0, got {sigma}.")
    if order not in ("random", "client"):
        raise ValueError(f'order must be "random" or "client", got {order!r}.')
    classes = [rng.permutation(rows) for rows in splits.by_class(labels)]
    sizes = _sizes(rng, labels.size, num_clients, sigma)
    slots = np.repeat(np.arange(num_clients), sizes)
    if order == "random":
        slots = in_turns(rng, slots, sizes)
    chosen = _classes_of_slots(
        rng.random(labels.size),
        slots,
        _log_shares(rng, alpha, (num_clients, len(classes))),
        np.array([rows.size for rows in classes]),
    )
    owners = np.empty(labels.size, np.int64)
    for c, rows in enumerate(classes):
        owners[rows] = slots[chosen == c]
    return _owners.of_owners(owners, num_clients)


def in_turns(rng: np.random.Generator, slots: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Order slots so that the next one is always of a client that is not full, uniformly.

    Each client's slots arrive after exponential times, all of one rate: of the clients that have
    slots left each is as likely to be next.

    Args:
      rng: decides the times.
      slots: ``[E]`` clients, ascending.
      sizes: ``[N]`` positive numbers of slots.
    """
    times = np.cumsum(rng.standard_exponential(len(slots)))
    begins = np.append(0.0, times)[np.cumsum(sizes) - sizes]
    return slots[np.argsort(times - np.repeat(begins, sizes))]


def counts_from_shares(
    rng: np.random.Generator, shares: Iterable[np.ndarray], sizes: Sequence[int], *, cap: bool
) -> np.ndarray:
    """Count who gets how many examples of each class, class after class.

    Args:
      rng: decides who takes all of a class of which every open client's share is 0.
      shares: for each class ``[N]``, not negative, in any scale.
      sizes: examples of each class.
      cap: clients that hold ``sum(sizes) / N`` or more get nothing of the classes that follow.

    Returns:
      ``[classes, N]`` int64.
    """
    counts = []
    held: np.ndarray | int = 0
    for own, size in zip(shares, sizes, strict=True):
        open_ = np.broadcast_to(held * len(own) < sum(sizes) if cap else True, own.shape)
        own = np.where(open_, own, 0.0)
        if own.sum() == 0.0:  # tiny alpha: all the variates underflowed; one client takes all
            own[rng.choice(np.flatnonzero(open_))] = 1.0
        counts.append(_owners.cut(own, size))
        held = held + counts[-1]
    return np.stack(counts)


def _by_shares(
    rng: np.random.Generator,
    labels: np.ndarray,
    *,
    num_clients: int,
    alpha: float,
    min_size: int,
    cap: bool,
    num_tries: int,
) -> Partition:
    labels = _owners.check(labels, num_clients, min_size=min_size)
    _owners.check_positive("alpha", alpha)
    classes = [rng.permutation(rows) for rows in splits.by_class(labels)]
    counts = np.zeros((len(classes), num_clients), np.int64)
    for _ in range(num_tries):
        order = rng.permutation(len(classes))
        # Gamma variates divided by their sum are Dirichlet ones, also among the clients left.
        shares = (rng.standard_gamma(alpha, num_clients) for _ in classes)
        counts[order] = counts_from_shares(rng, shares, [classes[c].size for c in order], cap=cap)
        if counts.sum(axis=0).min() >= min_size:
            break
    rows, clients = np.concatenate(classes), np.arange(num_clients)
    owners = np.concatenate([np.repeat(clients, own) for own in counts])
    held = counts.sum(axis=0)
    if held.min() < min_size:
        rows, owners = rows[np.argsort(owners, kind="stable")], np.repeat(clients, held)
        _top_up(rng, rows, owners, held, min_size)
    by_row = np.empty(labels.size, np.int64)
    by_row[rows] = owners
    return _owners.of_owners(by_row, num_clients)


def _top_up(
    rng: np.random.Generator,
    rows: np.ndarray,
    owners: np.ndarray,
    held: np.ndarray,
    min_size: int,
) -> None:
    """Move random examples from the largest clients until each has `min_size`.

    The rows ``[E]``, grouped by client, are shuffled within each, and the owners of those that move
    are changed, both in place. A client gives its last rows.
    """
    ends = np.cumsum(held)
    begins, sizes = (ends - held).tolist(), held.tolist()
    for begin, end in zip(begins, ends.tolist(), strict=True):
        rng.shuffle(rows[begin:end])
    spare = [(-size, client) for client, size in enumerate(sizes)]
    heapq.heapify(spare)
    for client in np.flatnonzero(held < min_size).tolist():
        for _ in range(min_size - sizes[client]):
            size, donor = spare[0]  # larger than min_size: else no client would lack examples
            owners[begins[donor] - size - 1] = client
            heapq.heapreplace(spare, (size + 1, donor))


def _sizes(rng: np.random.Generator, total: int, num_clients: int, sigma: float) -> np.ndarray:
    """Choose the clients' sizes ``[N]``, all positive: near equal, or log-normal."""
    mean, rest = divmod(total, num_clients)
    if sigma == 0.0:
        return mean + (np.arange(num_clients) < rest)
    logs = sigma * rng.standard_normal(num_clients)  # the mean does not matter, as they are scaled
    drawn = np.exp(logs - logs.max())
    sizes = np.floor(drawn / drawn.sum() * total).astype(np.int64)
    sizes[0] += total - sizes.sum()
    return _owners.raised(sizes, 1)


def _log_shares(rng: np.random.Generator, alpha: float, shape: tuple[int, int]) -> np.ndarray:
    """Draw logarithms of gamma variates, which for a small alpha are too small for numbers."""
    logs = np.log(rng.standard_gamma(alpha + 1.0, shape))
    with np.errstate(over="ignore"):
        return np.maximum(logs - rng.standard_exponential(shape) / alpha, -1e300)


def _classes_of_slots(
    uniform: np.ndarray, slots: np.ndarray, log_shares: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Draw for each slot a class by its client's shares, among the classes that have rows left.

    Slots are drawn a block at a time. A block ends with the slot that takes the last row of a
    class, after which the shares are those of fewer classes.

    Args:
      uniform: ``[E]`` in [0, 1), one draw a slot.
      slots: ``[E]`` clients, in the order in which they draw.
      log_shares: ``[N, classes]`` logarithms, in any scale.
      sizes: ``[classes]`` rows of each class, of sum `E`.

    Returns:
      ``[E]`` the number of a class.
    """
    left, chosen, begin = sizes.copy(), np.empty(len(slots), np.int64), 0
    while begin < len(slots):
        block = slice(begin, begin + _BLOCK)
        open_ = np.flatnonzero(left)
        logs = log_shares[slots[block]][:, open_]
        shares = np.exp(logs - logs.max(axis=1, keepdims=True))
        sums = np.cumsum(shares, axis=1)
        points = uniform[block, None] * sums[:, -1:]
        drawn = open_[np.minimum((sums <= points).sum(axis=1), len(open_) - 1)]
        lasts = [np.flatnonzero(drawn == c)[left[c] - 1 : left[c]] for c in open_]
        ends = np.concatenate(lasts)
        end = ends.min() + 1 if ends.size else len(drawn)
        chosen[begin : begin + end] = drawn[:end]
        left -= np.bincount(drawn[:end], minlength=len(left))
        begin += end
    return chosen


class DirichletSettings(Settings):
    """How unevenly the classes are spread."""

    alpha: Positive = setting(0.5, "Concentration: small is skewed, large is even.")
    min_client_size: Count = setting(
        10, "Examples that every client gets at least.", unit="examples"
    )


class FreeDirichletSettings(DirichletSettings):
    """How unevenly classes and sizes are spread."""

    min_client_size: Count = setting(
        1, "Examples that every client gets at least.", unit="examples"
    )


class BalancedDirichletSettings(Settings):
    """How unevenly the classes are spread over clients of given sizes."""

    alpha: Positive = setting(0.5, "Concentration: small is skewed, large is even.")
    sigma: NonNegative = setting(
        0.0, "Deviation of the logarithm of the clients' sizes; 0 makes sizes equal."
    )
    order: Order = setting(
        "random",
        "Who draws the next example: a client at random, or client after client, where the last "
        "ones get the classes that are left.",
    )


PARTS = {
    "dirichlet": Part(
        build=_owners.by_class(dirichlet, alpha="alpha", min_size="min_client_size"),
        settings=DirichletSettings,
        summary="Dirichlet shares of each class, sizes limited",
    ),
    "dirichlet_free": Part(
        build=_owners.by_class(dirichlet_free, alpha="alpha", min_size="min_client_size"),
        settings=FreeDirichletSettings,
        summary="Dirichlet shares of each class, sizes not limited",
    ),
    "balanced_dirichlet": Part(
        build=_owners.by_class(balanced_dirichlet, alpha="alpha", sigma="sigma", order="order"),
        settings=BalancedDirichletSettings,
        summary="Dirichlet shares of each client, sizes equal or log-normal",
    ),
}
