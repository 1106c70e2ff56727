"""SR-STE and Top-KAST: rounds by hand, what is deployed, what moves, what travels."""

import functools
import itertools

import numpy as np
import optax
import pytest

from fedjaxprune.costs import ledger
from fedjaxprune.experiment.run import round_costs
from fedjaxprune.methods import sr_ste, top_kast
from fedjaxprune.testing.scenario import SIZES
from tests import quadratic
from tests.playing import PEOPLE, setup, simulate

RATE, STEPS = 0.3, 3
STRONG = {"batcher": quadratic.full_batches(STEPS), "optimizer": optax.sgd(RATE)}


def flat(tree):
    return np.array(quadratic.flatten(tree))


def everybody(index):
    del index
    return list(range(6)), None


@functools.cache
def play(name, **options):
    """Run all rounds with all clients: the algorithm, states from the start on, and metrics."""
    method = {"sr_ste": sr_ste, "top_kast": top_kast}[name]
    settings = method.METHOD.settings(**{**method.METHOD.law_settings, **options})
    algorithm = method.build(settings, quadratic.task(setup(**STRONG)))
    states, _, history = simulate(algorithm, everybody)
    return algorithm, states, history[1:]  # the first is the server's choice


def by_hand(start, look):
    """Train all clients in a loop and average; `look` gives seen, moving and a term's gradient."""
    ends = []
    for client in range(6):
        weights = start
        for _ in range(STEPS):
            seen, moves, pull = look(weights)
            slope = np.where(seen, weights, 0.0) - quadratic.mean_point(PEOPLE, client) + pull
            weights = np.where(moves, weights - RATE * slope, weights)
        ends.append(weights)
    return np.average(ends, axis=0, weights=SIZES)


# ---- n of m


def groups(weights):
    """Follow the rule of SR-STE: of each two inputs the larger is seen."""
    seen = np.ones(38, bool)
    for place, shape in ((slice(4, 28), (6, 4)), (slice(30, 38), (4, 2))):
        sizes = np.abs(weights[place].reshape(shape[0] // 2, 2, shape[1]))
        first = sizes[:, 0] >= sizes[:, 1]
        seen[place] = np.stack([first, ~first], axis=1).reshape(-1)
    return seen


def test_groups_are_trained_as_by_hand():
    _, states, _ = play("sr_ste")

    def look(weights):
        seen = groups(weights)
        return seen, True, 0.1 * np.where(seen, 0.0, weights)

    changed = 0
    for before, after in itertools.pairwise(states):
        np.testing.assert_allclose(
            flat(after.params), by_hand(flat(before.params), look), atol=1e-5
        )
        np.testing.assert_array_equal(flat(after.masks), groups(flat(after.params)))
        changed += (flat(after.masks) != flat(before.masks)).sum()
    assert changed > 0


def test_groups_are_deployed_and_dense_weights_travel_without_masks():
    algorithm, states, history = play("sr_ste")
    for before, after, metrics in zip(states, states[1:], history, strict=False):
        deployed = flat(algorithm.deployed_params(after))
        np.testing.assert_array_equal(deployed, np.where(groups(deployed), deployed, 0.0))
        assert np.any(flat(after.params)[~flat(after.masks)] != 0.0)
        traffic = ledger.account(metrics, before, algorithm)
        assert traffic.downlink.values == traffic.uplink.values == 6 * 32 * 38
        assert traffic.downlink.masks == traffic.uplink.masks == 0


def test_layers_without_whole_groups_stay_dense():
    task = quadratic.task(setup())
    algorithm = sr_ste.build(sr_ste.SRSTE(), task)  # 2 of 4; one layer has six inputs
    states, _, _ = simulate(algorithm, everybody, num_rounds=0)
    masks = states[-1].masks
    assert np.all(masks["dense"]["kernel"])
    assert np.sum(masks["head"]["kernel"], axis=0).tolist() == [2, 2]


def test_more_of_a_group_than_it_has_are_refused():
    with pytest.raises(ValueError, match=r"n must be at most m \(4\), got 5"):
        sr_ste.SRSTE(n=5)


# ---- two sets


def largest(weights, sparsity, among):
    """Mark the largest of each kernel among some entries."""
    chosen = np.ones(38, bool)
    for place in (slice(4, 28), slice(30, 38)):
        sizes = np.where(among[place], np.abs(weights[place]), -1.0)
        number = sizes.size - round(sparsity * sizes.size)
        best = np.argsort(-sizes, kind="stable")[:number]
        chosen[place] = np.isin(np.arange(sizes.size), best) & among[place]
    return chosen


ALL = np.ones(38, bool)
IS_KERNEL = np.isin(np.arange(38), [*range(4, 28), *range(30, 38)])


def test_sets_are_trained_as_by_hand_and_nothing_else_moves():
    _, states, _ = play("top_kast")
    changed = 0
    for before, after in itertools.pairwise(states):
        dense = flat(before.params)
        moves = largest(dense, 0.25, ALL)

        def look(weights, moves=moves):
            seen = largest(weights, 0.5, moves)
            scale = np.where(IS_KERNEL & moves, np.where(seen, 1.0, 1.0 / 0.5), 0.0)
            return seen, moves, 0.05 * scale * weights

        wanted = by_hand(np.where(moves, dense, 0.0), look)
        found = flat(after.params)
        np.testing.assert_allclose(found[moves], wanted[moves], atol=1e-5)
        np.testing.assert_array_equal(found[~moves], dense[~moves])
        np.testing.assert_array_equal(flat(after.masks), largest(found, 0.5, ALL))
        changed += (flat(after.masks) != flat(before.masks)).sum()
    assert changed > 0


def test_the_larger_set_travels_with_its_places_in_every_round():
    algorithm, states, history = play("top_kast")
    for before, metrics in zip(states, history, strict=False):
        traffic = ledger.account(metrics, before, algorithm)
        number = int(largest(flat(before.params), 0.25, ALL).sum())
        assert traffic.downlink.values == traffic.uplink.values == 6 * 32 * number
        assert 0 < traffic.downlink.indices <= 6 * 32  # a bit a weight, or less
        assert traffic.downlink.masks == traffic.uplink.masks == traffic.uplink.indices == 0
        assert int(metrics.sent.num_masks.sum()) == 0  # the smaller set follows from the values


@pytest.mark.parametrize(("name", "num_moved"), [("sr_ste", 32), ("top_kast", 18 + 6)])
def test_arithmetic_is_of_what_is_seen_and_of_what_moves(name, num_moved):
    _, _, history = play(name)
    num_examples = STEPS * sum(SIZES)
    for metrics in history:
        cost = round_costs.of_round(quadratic.profile(), metrics).training_flops
        assert cost is not None
        assert cost["forward"] == 2 * num_examples * 16
        assert cost["weight_gradient"] == 2 * num_examples * num_moved


def test_a_network_without_whole_groups_is_refused():
    with pytest.raises(ValueError, match=r"method.m must divide .* got 7, and none of the layers "):
        sr_ste.build(sr_ste.SRSTE(m=7), quadratic.task(setup()))


def test_a_sparsity_that_empties_a_layer_is_refused():
    with pytest.raises(ValueError, match=r"one of the 8 weights of 'head/kernel', .* got 0.95"):
        top_kast.build(top_kast.TopKAST(sparsity=0.95), quadratic.task(setup()))


@pytest.mark.slow
def test_nothing_else_moves_once_exploration_has_ended():
    _, states, _ = play("top_kast", explore_until=2)
    for before, after in itertools.pairwise(states[2:]):
        unseen = ~flat(before.masks)
        np.testing.assert_array_equal(flat(after.params)[unseen], flat(before.params)[unseen])
    early = ~flat(states[0].masks)
    assert np.any(flat(states[1].params)[early] != flat(states[0].params)[early])


def test_a_larger_set_that_is_smaller_is_refused():
    with pytest.raises(ValueError, match=r"backward_sparsity must be at most sparsity \(0.5\)"):
        top_kast.TopKAST(sparsity=0.5, backward_sparsity=0.6)
