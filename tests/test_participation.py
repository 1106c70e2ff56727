"""Laws of who takes part."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune.federated import _races, sampling

KEY = jax.random.key(0)
WEIGHTS = [1.0, 2.0, 0.0, 4.0, 3.0, 0.5]
CHOOSERS = {
    "uniform": (lambda: sampling.uniform(num_clients=6, cohort_size=3), 3),
    "weighted": (lambda: sampling.weighted(WEIGHTS, cohort_size=3), 3),
    "everyone": (lambda: sampling.all_clients(6), 6),
    "drop_out": (
        lambda: sampling.with_dropout(
            sampling.uniform(num_clients=6, cohort_size=3), probability=0.4
        ),
        3,
    ),
}
NUM_DRAWS = 4000


@pytest.fixture(params=["few", "many"])
def either(request, monkeypatch):
    """Draw in the way for few clients, and in that for many."""
    if request.param == "many":
        monkeypatch.setattr(sampling, "_FEW", 0)
    return request.param


def draw(choose, num_draws=NUM_DRAWS):
    keys = jax.random.split(KEY, num_draws)
    client_ids, present = jax.jit(lambda keys: jax.lax.map(choose, keys))(keys)
    return np.asarray(client_ids), np.asarray(present)


def rates(client_ids, num_clients):
    return np.bincount(client_ids.ravel(), minlength=num_clients) / len(client_ids)


def within(observed, expected, num_draws=NUM_DRAWS):
    expected = np.asarray(expected)
    bound = 5.0 * np.sqrt(expected * (1.0 - expected) / num_draws)
    return np.all(np.abs(observed - expected) <= bound)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("name", sorted(CHOOSERS))
def test_a_cohort_is_of_distinct_clients_in_ascending_order(name):
    make, size = CHOOSERS[name]
    client_ids, present = draw(make(), 200)
    assert client_ids.shape == present.shape == (200, size)
    assert client_ids.dtype == np.int32
    assert present.dtype == np.bool_
    assert np.all(np.diff(client_ids, axis=1) > 0)
    assert client_ids.min() >= 0
    assert client_ids.max() < 6
    assert name == "drop_out" or np.all(present)


@pytest.mark.parametrize("name", sorted(CHOOSERS))
def test_the_key_decides(name):
    choose = CHOOSERS[name][0]()
    first, again = choose(KEY), jax.jit(choose)(KEY)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    if name != "everyone":
        assert len(np.unique(draw(choose, 50)[0], axis=0)) > 1


@pytest.mark.usefixtures("either")
def test_uniform_chooses_all_clients_and_all_pairs_equally_often():
    choose = sampling.uniform(num_clients=6, cohort_size=2)
    client_ids, _ = draw(choose)
    assert within(rates(client_ids, 6), np.full(6, 2 / 6))
    pairs = rates(client_ids[:, :1] * 6 + client_ids[:, 1:], 36)
    assert within(pairs[pairs > 0], 1 / 15)
    assert np.sum(pairs > 0) == 15


def test_weighted_chooses_one_client_in_proportion():
    client_ids, _ = draw(sampling.weighted(WEIGHTS, cohort_size=1))
    assert within(rates(client_ids, 6), np.array(WEIGHTS) / np.sum(WEIGHTS))


def test_weighted_draws_without_replacement_one_after_the_other():
    weights = np.array([1.0, 2.0, 5.0])
    client_ids, _ = draw(sampling.weighted(weights, cohort_size=2))
    p = weights / weights.sum()
    missing = [  # the third is left over if the other two come first, in either order
        p[j] * p[k] / (1 - p[j]) + p[k] * p[j] / (1 - p[k]) for j, k in ((1, 2), (0, 2), (0, 1))
    ]
    assert within(rates(client_ids, 3), 1.0 - np.array(missing))


@pytest.mark.parametrize("room", ["few", "many", "no room"])
@pytest.mark.parametrize("size", [2, 4])
def test_weighted_draws_each_cohort_as_often_as_one_after_the_other(size, room, monkeypatch):
    """Of heavy and light clients and one of weight 0; without room there are several passes."""
    if room != "few":
        monkeypatch.setattr(sampling, "_FEW", 0)
    weights = [60.0, 7.0, 3.0, 1.0, 1.0, 0.01, 0.0]
    if room == "no room":
        monkeypatch.setattr(_races, "_with_room", np.ones_like)
    expected: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(6), size):
        left, probability = sum(weights), 1.0
        for client in order:
            probability *= weights[client] / left
            left -= weights[client]
        cohort = tuple(sorted(order))
        expected[cohort] = expected.get(cohort, 0.0) + probability
    client_ids, _ = draw(sampling.weighted(weights, cohort_size=size))
    drawn = collections.Counter(map(tuple, client_ids.tolist()))
    assert set(drawn) <= set(expected)
    observed = np.array([drawn[cohort] for cohort in expected]) / NUM_DRAWS
    often = np.array(list(expected.values())) > 0.002
    assert within(observed[often], np.array(list(expected.values()))[often])


@pytest.mark.usefixtures("either")
def test_a_draw_of_everybody_and_of_many_is_whole():
    for weights, size in ((np.arange(1.0, 101.0), 100), (np.geomspace(1e-300, 1e300, 100), 99)):
        client_ids, _ = sampling.weighted(weights, cohort_size=size)(KEY)
        assert len(np.unique(client_ids)) == size
    np.testing.assert_array_equal(client_ids, np.arange(1, 100))  # the lightest one is left


def test_equal_weights_of_any_size_are_uniform():
    client_ids, _ = draw(sampling.weighted(np.full(4, 1e30), cohort_size=2))
    assert within(rates(client_ids, 4), np.full(4, 0.5))


def test_everyone_is_everyone():
    client_ids, present = sampling.all_clients(5)(KEY)
    np.testing.assert_array_equal(client_ids, np.arange(5))
    np.testing.assert_array_equal(present, np.ones(5, bool))


def test_drop_outs_are_independent_and_as_frequent_as_said():
    _, present = draw(sampling.with_dropout(sampling.all_clients(3), probability=0.3))
    assert within(present.mean(axis=0), np.full(3, 0.7))
    both = (present[:, 0] & present[:, 1]).mean()
    assert within(both, 0.49)


def test_drop_outs_add_up():
    once = sampling.with_dropout(sampling.all_clients(3), probability=0.5)
    _, present = draw(sampling.with_dropout(once, probability=0.5))
    assert within(present.mean(axis=0), np.full(3, 0.25))


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_nobody_or_everybody_can_drop_out(probability):
    choose = sampling.with_dropout(sampling.all_clients(4), probability=probability)
    assert np.all(choose(KEY)[1] == (probability == 0.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: sampling.uniform(num_clients=5, cohort_size=6),
            "cohort_size=6 and 5 clients in the population",
        ),
        (lambda: sampling.uniform(num_clients=5, cohort_size=0), "at least 1, got 0"),
        (
            lambda: sampling.weighted(WEIGHTS, cohort_size=6),
            "cohort_size=6 and 5 clients with a positive weight",
        ),
        (lambda: sampling.weighted([1.0, -2.0], cohort_size=1), "got -2.0 for client 1 of 2"),
        (lambda: sampling.weighted([1.0, np.nan], cohort_size=1), "got nan for client 1"),
        (
            lambda: sampling.weighted(jnp.ones((2, 2)), cohort_size=1),
            r"got the shape \(2, 2\)",
        ),
        (lambda: sampling.all_clients(0), "at least 1, got 0"),
        (
            lambda: sampling.with_dropout(sampling.all_clients(2), probability=1.5),
            r"\[0, 1\], got 1.5",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
