"""Laws of partitions: disjoint and complete; what each kind promises about sizes and classes."""

import functools
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import types
from fedjaxprune.data import partitions
from fedjaxprune.data.partitions import _owners, dirichlets
from fedjaxprune.federated import populations

BALANCED = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 60)).astype(np.int32)
SKEWED = np.random.default_rng(1).choice(7, 503, p=np.arange(1, 8) / 28).astype(np.int64)

PARTITIONS = {
    "iid": partitions.iid,
    "stratified": partitions.stratified,
    "shards": functools.partial(partitions.shards, classes_per_client=2),
    "dirichlet, even": functools.partial(partitions.dirichlet, alpha=100.0, min_size=1),
    "dirichlet, skewed": functools.partial(partitions.dirichlet, alpha=0.1, min_size=5),
    "dirichlet, topped up": functools.partial(partitions.dirichlet, alpha=0.001, min_size=20),
    "dirichlet, may be empty": functools.partial(partitions.dirichlet, alpha=0.001, min_size=0),
    "dirichlet_free": functools.partial(partitions.dirichlet_free, alpha=0.1, min_size=1),
    "balanced_dirichlet": functools.partial(partitions.balanced_dirichlet, alpha=0.1),
    "balanced_dirichlet, client": functools.partial(
        partitions.balanced_dirichlet, alpha=0.1, order="client"
    ),
    "balanced_dirichlet, log-normal": functools.partial(
        partitions.balanced_dirichlet, alpha=0.1, sigma=2.0
    ),
    "label_count": functools.partial(partitions.label_count, labels_per_client=2),
    "quantity": functools.partial(partitions.quantity, alpha=0.1, min_size=3),
    "quantity, may be empty": functools.partial(partitions.quantity, alpha=0.01, min_size=0),
}
CIFAR = np.random.default_rng(2).permutation(np.repeat(np.arange(10), 5000))


def rng(seed=0):
    return np.random.default_rng(seed)


def sizes(parts):
    return np.array([part.size for part in parts])


@pytest.mark.parametrize("labels", [BALANCED, SKEWED], ids=["balanced", "skewed"])
@pytest.mark.parametrize("num_clients", [5, 13, 20])
@pytest.mark.parametrize("name", sorted(PARTITIONS))
def test_a_partition_is_disjoint_and_complete(name, num_clients, labels):
    parts = PARTITIONS[name](rng(), labels, num_clients=num_clients)
    assert len(parts) == num_clients
    assert all(part.dtype == np.int32 for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(labels.size))


@pytest.mark.parametrize("name", sorted(PARTITIONS))
def test_a_partition_is_decided_by_its_generator(name):
    def make(seed):
        return PARTITIONS[name](rng(seed), BALANCED, num_clients=9)

    for first, second in zip(make(3), make(3), strict=True):
        np.testing.assert_array_equal(first, second)
    assert any(not np.array_equal(a, b) for a, b in zip(make(3), make(4), strict=True))


@pytest.mark.parametrize("make", [partitions.iid, partitions.stratified])
@pytest.mark.parametrize("num_clients", [1, 7, 503])
def test_even_partitions_differ_by_one_at_most(make, num_clients):
    held = sizes(make(rng(), SKEWED, num_clients=num_clients))
    assert held.max() - held.min() <= 1


def test_a_stratified_client_is_a_miniature_of_the_whole():
    parts = partitions.stratified(rng(), SKEWED, num_clients=11)
    counts = partitions.histogram(parts, SKEWED, num_classes=7)
    assert (counts.max(axis=0) - counts.min(axis=0) <= 1).all()


@pytest.mark.parametrize(
    ("labels", "num_clients", "classes_per_client"),
    [(BALANCED, 50, 2), (BALANCED, 5, 2), (BALANCED, 10, 1), (BALANCED, 3, 10), (SKEWED, 20, 3)],
)
def test_shards_hold_so_many_classes_exactly(labels, num_clients, classes_per_client):
    parts = partitions.shards(
        rng(), labels, num_clients=num_clients, classes_per_client=classes_per_client
    )
    counts = partitions.histogram(parts, labels, num_classes=10)
    assert ((counts > 0).sum(axis=1) == classes_per_client).all()


def test_shards_of_balanced_classes_are_equal():
    held = sizes(partitions.shards(rng(), BALANCED, num_clients=50, classes_per_client=2))
    assert (held == 12).all()


def test_shards_bring_different_classes_together():
    parts = partitions.shards(rng(), BALANCED, num_clients=50, classes_per_client=2)
    assert len({tuple(np.unique(BALANCED[part])) for part in parts}) > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clients": 5, "classes_per_client": 11}, r"must lie in \[1, 10\].* got 11"),
        ({"num_clients": 5, "classes_per_client": 0}, r"must lie in \[1, 10\].* got 0"),
        ({"num_clients": 4, "classes_per_client": 2}, "8 shards cannot hold 10 classes"),
        ({"num_clients": 500, "classes_per_client": 2}, "1000 shards, but .* into 600 only"),
    ],
)
def test_impossible_shards_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        partitions.shards(rng(), BALANCED, **options)


@pytest.mark.parametrize("alpha", [1e-4, 0.05, 0.5, 50.0])
@pytest.mark.parametrize("min_size", [1, 10, 30])
def test_dirichlet_gives_every_client_its_minimum(alpha, min_size):
    parts = partitions.dirichlet(rng(), BALANCED, num_clients=20, alpha=alpha, min_size=min_size)
    assert sizes(parts).min() >= min_size  # 20 * 30 is all there is


def test_dirichlet_is_more_skewed_the_smaller_alpha():
    def largest_share(alpha):
        parts = partitions.dirichlet(rng(), BALANCED, num_clients=10, alpha=alpha, min_size=10)
        counts = partitions.histogram(parts, BALANCED, num_classes=10)
        return (counts.max(axis=1) / counts.sum(axis=1)).mean()

    shares = [largest_share(alpha) for alpha in (0.05, 0.5, 5.0, 500.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.5
    assert shares[-1] < 0.2


def test_dirichlet_shares_have_the_moments_of_the_distribution():
    # One class, so that nobody is ever full: mean 1 / N, variance (N - 1) / (N^2 (N alpha + 1)).
    num_clients, alpha, num_draws = 4, 0.5, 4_000
    generator = rng()
    shares = np.stack(
        [
            sizes(
                partitions.dirichlet(
                    generator, np.zeros(1000, int), num_clients=num_clients, alpha=alpha, min_size=0
                )
            )
            / 1000
            for _ in range(num_draws)
        ]
    )
    variance = (num_clients - 1) / (num_clients**2 * (num_clients * alpha + 1))
    error = 5 * np.sqrt(variance / num_draws)
    np.testing.assert_allclose(shares.mean(axis=0), 1 / num_clients, atol=error + 1e-3)
    np.testing.assert_allclose(shares.var(axis=0), variance, rtol=0.15)


def test_a_full_client_gets_nothing_of_later_classes():
    # A class as large as everyone's fair share together fills somebody; nobody exceeds the fair
    # share by more than one class.
    parts = partitions.dirichlet(rng(), BALANCED, num_clients=20, alpha=0.01, min_size=0)
    assert sizes(parts).max() < BALANCED.size / 20 + 60


def test_too_many_examples_are_asked_for():
    with pytest.raises(ValueError, match=r"= 20 with at least 31 .* 620 .* there are 600"):
        partitions.dirichlet(rng(), BALANCED, num_clients=20, alpha=1.0, min_size=31)
    for make in (partitions.iid, partitions.stratified):
        with pytest.raises(ValueError, match=r"num_clients = 601 .* there are 600"):
            make(rng(), BALANCED, num_clients=601)


@pytest.mark.parametrize("name", sorted(PARTITIONS))
def test_senseless_options_are_refused(name):
    with pytest.raises(ValueError, match="num_clients must be at least 1, got 0"):
        PARTITIONS[name](rng(), BALANCED, num_clients=0)
    with pytest.raises(ValueError, match="labels must be one integer per example"):
        PARTITIONS[name](rng(), BALANCED[:, None], num_clients=2)
    with pytest.raises(ValueError, match="labels must be one integer per example"):
        PARTITIONS[name](rng(), BALANCED / 2, num_clients=2)


@pytest.mark.parametrize("alpha", [0.0, -1.0, np.nan, np.inf])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(ValueError, match="alpha must be a positive number"):
        partitions.dirichlet(rng(), BALANCED, num_clients=2, alpha=alpha, min_size=1)
    with pytest.raises(ValueError, match="min_size must not be negative, got -1"):
        partitions.dirichlet(rng(), BALANCED, num_clients=2, alpha=1.0, min_size=-1)


def largest_shares(parts, labels, num_classes=10):
    counts = partitions.histogram(parts, labels, num_classes=num_classes)
    return counts.max(axis=1) / counts.sum(axis=1)


def test_shares_become_counts_at_cut_points_and_full_clients_are_closed():
    shares = np.array([[0.47, 0.33, 0.12, 0.08], [0.41, 0.29, 0.18, 0.12]])
    counts = dirichlets.counts_from_shares(rng(), shares, [22, 18], cap=True)
    np.testing.assert_array_equal(counts, [[10, 7, 3, 2], [0, 8, 6, 4]])
    free = dirichlets.counts_from_shares(rng(), shares, [22, 18], cap=False)
    np.testing.assert_array_equal(free, [[10, 7, 3, 2], [7, 5, 3, 3]])
    none = dirichlets.counts_from_shares(rng(), np.zeros((2, 4)), [22, 18], cap=True)
    assert ((none > 0).sum(axis=1) == 1).all()
    assert not (none > 0).all(axis=0).any()  # who took the first class is full
    np.testing.assert_array_equal(
        _owners.cut(np.array([0.3052, 0.2054, 0.1842, 0.3052]), 100), [30, 21, 18, 31]
    )


def test_the_dirichlet_of_before_is_unchanged():
    parts = partitions.dirichlet(rng(5), SKEWED, num_clients=4, alpha=0.5, min_size=10)
    assert sizes(parts).tolist() == [53, 105, 215, 130]
    assert [int(part.sum()) for part in parts] == [12855, 27903, 52810, 32685]


def test_the_limit_of_a_dirichlet_keeps_sizes_together():
    def deviation(make, **options):
        parts = make(rng(), CIFAR, num_clients=100, alpha=0.5, **options)
        assert sizes(parts).sum() == 50_000
        return sizes(parts).std()

    assert deviation(partitions.dirichlet, min_size=10) < 185  # 153 where classes come in order
    assert 180 < deviation(partitions.dirichlet_free, min_size=1) < 245  # 211
    topped = partitions.dirichlet_free(rng(), BALANCED, num_clients=20, alpha=1e-3, min_size=7)
    assert sizes(topped).min() == 7


@pytest.mark.parametrize("order", ["random", "client"])
def test_a_balanced_dirichlet_has_equal_sizes_and_multinomial_classes(order):
    make = functools.partial(partitions.balanced_dirichlet, num_clients=7, order=order)
    held = sizes(make(rng(), SKEWED, alpha=0.5))
    assert held.tolist() == [72] * 6 + [71]
    labels = CIFAR[:20_000]
    counts = partitions.histogram(
        make(rng(), labels, alpha=1e6, num_clients=100), labels, num_classes=10
    )
    if order == "client":
        counts = counts[:80]  # the last ones get what is left
    assert (abs(counts - 20) <= 5 * np.sqrt(200 * 0.1 * 0.9)).all()
    parts = make(rng(), CIFAR, alpha=1e-6, num_clients=100)
    assert largest_shares(parts, CIFAR).mean() > 0.8


def test_a_balanced_dirichlet_is_as_skewed_as_its_public_codes():
    for alpha, client, random in ((0.1, 0.685, 0.600), (0.5, 0.400, 0.355), (1.0, 0.302, 0.300)):
        options = {"num_clients": 100, "alpha": alpha}
        for parts, expected in (
            (partitions.balanced_dirichlet(rng(1), CIFAR, order="client", **options), client),
            (partitions.balanced_dirichlet(rng(1), CIFAR, order="random", **options), random),
        ):
            assert abs(largest_shares(parts, CIFAR).mean() - expected) < 0.04


def test_whoever_fills_up_last_gets_the_classes_that_are_left():
    parts = partitions.balanced_dirichlet(rng(), CIFAR, num_clients=100, alpha=0.1, order="client")
    shares = largest_shares(parts, CIFAR)
    counts = partitions.histogram(parts, CIFAR, num_classes=10)
    assert (counts[-5:] > 0).sum() < (counts[:5] > 0).sum()
    assert shares[-10:].mean() > shares[:10].mean()


def test_the_next_client_is_one_that_is_not_full_uniformly():
    # Two clients of 1 and 3 slots: the small one is full after one draw with probability 1/2, and
    # by a shuffle of all slots after one with 1/4. Classes of one row show who came first.
    labels, generator, first = np.array([0, 1, 1, 1]), rng(), 0
    for _ in range(400):
        slots = np.repeat([0, 1], [1, 3])
        first += dirichlets.in_turns(generator, slots, np.array([1, 3]))[0] == 0
    assert abs(first - 200) < 5 * np.sqrt(100)
    assert len(partitions.balanced_dirichlet(generator, labels, num_clients=4, alpha=1.0)) == 4


def test_log_normal_sizes_vary_as_they_should_and_nobody_is_empty():
    parts = partitions.balanced_dirichlet(rng(), CIFAR, num_clients=500, alpha=1.0, sigma=0.5)
    held = sizes(parts)[1:]  # the first gets what rounding left
    assert abs(np.log(held).std() - 0.5) < 5 * 0.5 / np.sqrt(2 * 500)
    few = partitions.balanced_dirichlet(rng(), SKEWED, num_clients=400, alpha=1.0, sigma=4.0)
    assert sizes(few).min() == 1


@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_quantity_varies_as_its_formula_says(alpha):
    generator, num_clients = rng(), 100
    shares = [
        sizes(
            partitions.quantity(generator, CIFAR, num_clients=num_clients, alpha=alpha, min_size=0)
        )
        / 500
        for _ in range(200)
    ]
    expected = np.sqrt((num_clients - 1) / (alpha * num_clients + 1))
    np.testing.assert_allclose(np.sqrt(np.var(shares)), expected, rtol=0.05)
    np.testing.assert_allclose(np.mean(shares), 1.0)
    extremes = np.min(shares, axis=1).mean(), np.max(shares, axis=1).mean()
    if alpha == 5.0:
        np.testing.assert_allclose(extremes, (0.233, 2.485), rtol=0.05)
    parts = partitions.quantity(rng(), BALANCED, num_clients=20, alpha=0.05, min_size=10)
    assert sizes(parts).min() == 10


@pytest.mark.parametrize("labels_per_client", [1, 3, 10])
def test_label_count_is_exact(labels_per_client):
    make = functools.partial(partitions.label_count, labels_per_client=labels_per_client)
    counts = partitions.histogram(make(rng(), BALANCED, num_clients=30), BALANCED, num_classes=10)
    assert ((counts > 0).sum(axis=1) == labels_per_client).all()
    assert (counts[np.arange(30), np.arange(30) % 10] > 0).all()
    for of_class in counts.T:
        held = of_class[of_class > 0]
        assert held.max() - held.min() <= 1
    if labels_per_client > 1:
        few = make(rng(), BALANCED, num_clients=10 // labels_per_client + 1)
        assert sizes(few).sum() == BALANCED.size


def test_sorted_shards_are_equal_and_may_be_of_one_class():
    generator, means = rng(), []
    labels = np.repeat(np.arange(10), 200)
    for _ in range(200):
        parts = partitions.sorted_shards(generator, labels, num_clients=100, shards_per_client=2)
        assert (sizes(parts) == 20).all()
        means.append(np.mean([len(np.unique(labels[part])) for part in parts]))
    assert abs(np.mean(means) - 1.905) < 0.02
    parts = partitions.sorted_shards(rng(), SKEWED, num_clients=20, shards_per_client=2)
    assert (sizes(parts) == 24).all()  # 503 // 40 each, 23 examples left out
    assert len(np.unique(np.concatenate(parts))) == 480


def test_other_examples_are_shared_out_like_those_of_a_partition():
    train = partitions.dirichlet(rng(), BALANCED, num_clients=9, alpha=0.3, min_size=5)
    counts = partitions.histogram(train, BALANCED, num_classes=10)
    test_labels = np.repeat(np.arange(10), np.arange(10, 20))
    parts = partitions.like(rng(), test_labels, counts=counts)
    found = partitions.histogram(parts, test_labels, num_classes=10)
    exact = counts / 60 * np.arange(10, 20)
    assert (abs(found - exact) < 1).all()
    np.testing.assert_array_equal(found.sum(axis=0), np.arange(10, 20))
    nobody = partitions.like(rng(), np.array([0, 1, 1]), counts=np.array([[3, 0], [1, 0]]))
    assert [part.tolist() for part in nobody] == [[0], []]
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\), .* got 0 to 5"):
        partitions.like(rng(), np.array([0, 5]), counts=np.array([[3, 0], [1, 0]]))
    with pytest.raises(ValueError, match=r"counts must be .* got float64 of shape \(2,\)"):
        partitions.like(rng(), np.array([0, 5]), counts=np.ones(2))


@pytest.mark.parametrize("name", [name for name in sorted(PARTITIONS) if "shards" not in name])
def test_one_client_holds_everything_and_as_many_as_examples_hold_one_each(name):
    options: dict[str, Any] = {"label_count": {"labels_per_client": 7}}.get(name, {})
    (whole,) = PARTITIONS[name](rng(), SKEWED, num_clients=1, **options)
    np.testing.assert_array_equal(np.sort(whole), np.arange(SKEWED.size))
    if name in ("iid", "stratified", "dirichlet_free") or "balanced" in name:
        assert (sizes(PARTITIONS[name](rng(), SKEWED, num_clients=SKEWED.size)) == 1).all()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (partitions.sorted_shards, {"shards_per_client": 0}, "at least 1, got 0"),
        (partitions.sorted_shards, {"shards_per_client": 201}, "603 shards .* there are 600"),
        (partitions.label_count, {"labels_per_client": 11}, r"in \[1, 10\], .* got 11"),
        (partitions.label_count, {"labels_per_client": 2.0}, r"in \[1, 10\], .* got 2.0"),
        (partitions.label_count, {"labels_per_client": 3}, "= 9 cannot hold 10 classes"),
        (partitions.quantity, {"alpha": 0.0, "min_size": 1}, "alpha must be a positive number"),
        (partitions.dirichlet_free, {"alpha": -1.0, "min_size": 1}, "alpha must be a positive"),
        (partitions.balanced_dirichlet, {"alpha": np.inf}, "alpha must be a positive number"),
        (partitions.balanced_dirichlet, {"alpha": 1.0, "sigma": -1.0}, "sigma must be .* got -1"),
        (
            partitions.balanced_dirichlet,
            {"alpha": 1.0, "order": "class"},
            'order must be "random" or "client", got \'class\'',
        ),
    ],
)
def test_senseless_options_of_a_partition_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(rng(), BALANCED, num_clients=3, **options)


def test_clients_whose_classes_have_too_few_examples_are_refused():
    with pytest.raises(ValueError, match="2 of 5 clients would go without examples"):
        partitions.label_count(rng(), np.array([0, 1, 1, 1, 1]), num_clients=5, labels_per_client=1)


@pytest.mark.slow
def test_partitions_of_many_clients_take_seconds():
    labels = rng().integers(0, 62, 1_000_000)
    for name, make in PARTITIONS.items():
        if name.split(",")[0] != "dirichlet":
            start = time.process_time()
            assert len(make(rng(), labels, num_clients=100_000)) == 100_000
            assert time.process_time() - start < 60, name


def test_every_key_is_a_client():
    keys = np.array(["eve", "adam", "eve", "bob", "adam", "eve"])
    parts = partitions.by_key(keys)
    assert [part.tolist() for part in parts] == [[1, 4], [3], [0, 2, 5]]
    assert all(part.dtype == np.int32 for part in parts)
    largest = partitions.by_key(keys, max_clients=2)
    assert [part.tolist() for part in largest] == [[1, 4], [0, 2, 5]]
    drawn = {
        tuple(part.size for part in partitions.by_key(keys, min_size=2, max_clients=1, rng=rng(i)))
        for i in range(20)
    }
    assert drawn == {(2,), (3,)}
    with pytest.raises(ValueError, match=r"max_clients must lie in \[1, 2\], .* 2 .* got 3"):
        partitions.by_key(keys, min_size=2, max_clients=3)
    with pytest.raises(ValueError, match="at least one key"):
        partitions.by_key([])


def test_a_population_keeps_examples_as_stored_and_clients_apart():
    examples = {"inputs": np.arange(24, dtype=np.uint8).reshape(6, 4), "labels": np.arange(6)}
    examples["labels"] = examples["labels"].astype(np.int32)
    parts = [np.array([4, 1]), np.array([], np.int32), np.array([0, 5, 3], np.int64)]
    population = partitions.population(examples, parts)
    assert population.examples["inputs"].dtype == jnp.uint8
    assert population.order.dtype == population.offsets.dtype == jnp.int32
    for client, part in enumerate(parts):
        data = types.client_data(population, jnp.int32(client))
        assert int(data.size) == part.size
        held = data.order[int(data.start) : int(data.start) + int(data.size)]
        np.testing.assert_array_equal(held, part)


def test_a_partition_of_two_arrays_is_the_sequence_of_its_clients_rows():
    labels = np.array([1, 0, 2, 1, 0, 2])
    whole = partitions.Partition(np.array([4, 1, 0, 5, 3], np.int32), np.array([0, 2, 2, 5]))
    each = [[4, 1], [], [0, 5, 3]]
    assert [part.tolist() for part in whole] == each
    assert [whole[client].tolist() for client in range(-3, 0)] == each
    assert [part.tolist() for part in whole[1:]] == each[1:]
    assert whole.sizes.tolist() == [2, 0, 3]
    with pytest.raises(IndexError):
        whole[3]
    one, other = (
        partitions.population({"labels": labels}, parts, num_classes=3) for parts in (whole, each)
    )
    np.testing.assert_array_equal(one.order, other.order)
    np.testing.assert_array_equal(one.offsets, other.offsets)
    counts = partitions.histogram(whole, labels, num_classes=3)
    np.testing.assert_array_equal(counts, [[2, 0, 0], [0, 0, 0], [0, 2, 1]])


@pytest.mark.parametrize(
    ("order", "offsets", "message"),
    [
        ([0, 1], [0, 2, 1], "must not fall, from 0 to the 2 entries"),
        ([0, 1], [0, 1], "got 0 to 1"),
        ([0, 1], [], "got 0 to 0"),
        ([0.0, 1.0], [0, 2], "order of a partition must be a vector of integers, got float64"),
        ([0, 9], [0, 2], r"indices in \[0, 6\), got 0 to 9"),
        ([], [0], "at least one client"),
    ],
)
def test_a_partition_of_arrays_that_do_not_fit_is_refused(order, offsets, message):
    parts = partitions.Partition(np.array(order), np.array(offsets, int))
    if not order:
        parts = partitions.Partition(np.zeros(0, int), np.array(offsets, int))
    with pytest.raises(ValueError, match=message):
        partitions.population({"labels": np.zeros(6, int)}, parts)


def test_more_examples_than_int32_counts_are_refused():
    labels = np.broadcast_to(np.int32(0), 2**31)
    arrays: Any = (labels, np.zeros(2, np.int32))
    population = types.Population({"labels": labels[:4]}, *arrays)
    with pytest.raises(ValueError, match="order must have at most 2147483647 entries"):
        populations.check_shapes(population)
    with pytest.raises(ValueError, match="number from 1 to 2147483647, got 2147483648"):
        partitions.population({"labels": labels}, [[0]])


def test_a_population_refuses_what_does_not_fit():
    examples = {"inputs": np.zeros((6, 2)), "labels": np.zeros(6, int)}
    with pytest.raises(ValueError, match=r"indices in \[0, 6\), got 2 to 6"):
        partitions.population(examples, [np.array([2, 6])])
    with pytest.raises(ValueError, match=r"indices in \[0, 6\), got -1 to 3"):
        partitions.population(examples, [np.array([3, -1])])
    with pytest.raises(ValueError, match="at least one client"):
        partitions.population(examples, [])
    with pytest.raises(ValueError, match="must hold integers"):
        partitions.population(examples, [np.array([0.5])])
    with pytest.raises(ValueError, match=r"agree in their first axis, got sizes \[5, 6\]"):
        partitions.population({**examples, "labels": np.zeros(5, int)}, [np.array([0])])
