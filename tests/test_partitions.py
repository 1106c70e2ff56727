"""Laws of partitions: disjoint and complete; what each kind promises about sizes and classes."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import types
from fedjaxprune.data import partitions

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
}


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


def test_every_key_is_a_client():
    keys = np.array(["eve", "adam", "eve", "bob", "adam", "eve"])
    parts = partitions.by_key(keys)
    assert [part.tolist() for part in parts] == [[1, 4], [3], [0, 2, 5]]
    assert all(part.dtype == np.int32 for part in parts)
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
