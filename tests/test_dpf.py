"""DPF: what it is in its degenerate settings, what clients see, and what travels."""

import functools
import itertools

import chex
import numpy as np
import optax
import pytest

from fedjaxprune import masks
from fedjaxprune.costs import ledger
from fedjaxprune.methods import dpf
from fedjaxprune.testing.scenario import SIZES
from fedjaxprune.types import RoundState
from tests import quadratic
from tests.playing import PEOPLE, ROUNDS, dip, setup, simulate, some

STRONG = {"batcher": quadratic.full_batches(4), "optimizer": optax.sgd(0.3)}
MODES = ("dense", "masked", "regrow")
IS_KERNEL = np.concatenate(
    [np.zeros(4, bool), np.ones(24, bool), np.zeros(2, bool), np.ones(8, bool)]
)


def make(protocol, **options):
    settings = dpf.DPF(**{**dpf.METHOD.law_settings, **options})
    return dpf.build(settings, quadratic.task(protocol))


def everybody(index):
    del index
    return list(range(6)), None


@functools.cache
def play(mode, period=3, end_round=6):
    """Run all rounds with all clients: the algorithm, states and metrics."""
    algorithm = make(
        setup(**STRONG), mode=mode, steps_between=period, end_round=end_round, sparsity=0.6
    )
    states, _, history = simulate(algorithm, everybody)
    return algorithm, states, history


@pytest.mark.parametrize("mode", ["dense", pytest.param("regrow", marks=pytest.mark.slow)])
def test_with_the_servers_masks_alone_it_is_feddip_without_a_penalty_to_the_bit(mode):
    own = {"initial_sparsity": 0.0, "mode": mode}
    one = make(setup(), end_round=ROUNDS, steps_between=None, **own)
    two = dip(max_penalty=0.0, prune_shortcuts=True, **own)(setup())
    expected, found = (simulate(algorithm, some)[0] for algorithm in (two, one))
    for before, after in zip(expected, found, strict=True):
        chex.assert_trees_all_equal(before.params, after.params)
        chex.assert_trees_all_equal(before.masks, after.masks)
    assert int(masks.num_kept(found[-1].masks).sum()) < quadratic.NUM_WEIGHTS


def by_hand(state: RoundState, *, period, num_steps=4, rate=0.3):
    """Train all six clients from dense weights in a loop, and average."""
    start, in_force = (np.array(quadratic.flatten(each)) for each in (state.params, state.masks))
    number = int((in_force & IS_KERNEL).sum())
    ends = []
    for client in range(6):
        weights, seen = start, in_force
        for step in range(num_steps):
            if (step + 1) % period == 0:
                sizes = np.where(IS_KERNEL, np.abs(weights), -1.0)
                best = np.argsort(-sizes, kind="stable")[:number]
                seen = ~IS_KERNEL | np.isin(np.arange(weights.size), best)
            slope = np.where(seen, weights, 0.0) - quadratic.mean_point(PEOPLE, client)
            weights = weights - rate * slope
        ends.append(weights)
    return np.average(ends, axis=0, weights=SIZES)


@pytest.mark.parametrize("period", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_clients_follow_the_rule_from_dense_weights(period):
    _, states, _ = play("dense_both_ways", period)
    for before, after in itertools.pairwise(states):
        found = quadratic.flatten(after.params)
        np.testing.assert_allclose(found, by_hand(before, period=period), atol=1e-5)
        never = by_hand(before, period=99)
        assert np.abs(never - np.array(found)).max() > 1e-3  # the choice inside a round matters


def test_weights_return():
    _, states, _ = play("dense_both_ways")
    flat = [np.array(quadratic.flatten(state.masks)) for state in states]
    returned = [bool(np.any(after & ~before)) for before, after in itertools.pairwise(flat)]
    assert returned == [False, True, False, True, False]  # revised after rounds 0, 2 and 4


@pytest.mark.slow
def test_masks_are_fixed_in_the_end():
    _, states, _ = play("dense", end_round=1)
    assert [int(state.masks_id) for state in states] == [1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    "mode", ["dense_both_ways", *(pytest.param(m, marks=pytest.mark.slow) for m in MODES)]
)
def test_dense_weights_travel_where_the_mode_says(mode):
    algorithm, states, history = play(mode)
    traffic = ledger.account(history[-1], states[-2], algorithm)
    dense = 6 * 32 * quadratic.NUM_WEIGHTS
    sparse = 6 * 32 * int(masks.num_kept(states[-2].masks).sum())
    assert sparse < dense
    assert traffic.downlink.values == (dense if mode == "dense_both_ways" else sparse)
    assert traffic.uplink.values == (sparse if mode in ("masked", "regrow") else dense)


@pytest.mark.slow
def test_the_curve_arrives_at_three_quarters_of_a_run():
    algorithm = dpf.build(dpf.DPF(), quadratic.task(setup()))
    states, _, _ = simulate(algorithm, some)
    live = [int((np.array(quadratic.flatten(s.masks)) & IS_KERNEL).sum()) for s in states]
    expected = [32 - round(0.9 * (1 - (1 - min(t / 4, 1)) ** 3) * 32) for t in range(6)]
    assert live == expected
    assert expected[4] == expected[5] == 32 - round(0.9 * 32)
