"""At sparsity 0 every method that has one trains as FedAvg does, to the bit."""

import functools
from typing import Literal

import chex
import jax
import numpy as np
import pytest

from fedjaxprune import masks
from fedjaxprune.experiment import methods
from fedjaxprune.methods import (
    averaged_filters,
    fedavg,
    fixed_masks,
    gradual_magnitude,
    mpfl,
    pooled_filters,
    random_filters,
)
from fedjaxprune.rounds import server_work
from tests import quadratic
from tests.test_algorithms import by_law, dip, flip, setup, tiny

KEY = jax.random.key(8)
PEOPLE = quadratic.population()
MODEL, ONE = quadratic.MODEL, quadratic.full_batches(1)
SERVER = server_work.server_examples([0, 1, 2])


def magnitude(source, weights: Literal["trained", "initial"] = "initial"):
    return lambda s: fixed_masks.magnitude_masks(
        MODEL, s, sparsity=0.0, source=source, pretraining=ONE, weights=weights
    )


METHODS = {
    "feddip_without_penalty": dip(final_sparsity=0.0, initial_sparsity=0.0, max_penalty=0.0),
    "gradual_magnitude": lambda s: gradual_magnitude.gradual_magnitude(
        MODEL, s, final_sparsity=0.0, period=1, end_round=2
    ),
    "random_masks": lambda s: fixed_masks.random_masks(MODEL, s, sparsity=0.0),
    "magnitude_masks": magnitude(SERVER, weights="trained"),
    "one_client_masks": magnitude(server_work.examples_of(2)),
    "pooled_masks": magnitude(server_work.all_examples()),
    "snip_masks": lambda s: fixed_masks.snip_masks(
        MODEL, s, sparsity=0.0, source=SERVER, batcher=ONE
    ),
    "snip_masks_of_clients": lambda s: fixed_masks.snip_masks_of_clients(
        MODEL, s, sparsity=0.0, batcher=ONE
    ),
    "autoflip": flip(sparsity=0.0),
    "fedtiny": tiny(sparsity=0.0, prune_every=1),
    "mpfl": by_law(mpfl, sparsity=0.0),
    "random_filters": by_law(random_filters, sparsity=0.0),
    "pooled_filters": by_law(pooled_filters, sparsity=0.0),
    "averaged_filters": by_law(averaged_filters, sparsity=0.0),
}
TRAINED = ("magnitude_masks", "fedtiny")  # that go on from weights trained at the server
SLOW = ("one_client_masks", "pooled_masks", "pooled_filters", "averaged_filters")  # share parts


def test_every_method_with_a_sparsity_is_here():
    assert set(METHODS) == set(methods.PRUNING) - {"feddip"}  # which has its penalty left


@functools.cache
def plain(name):
    model = quadratic.NORMALIZED if name == "fedtiny" else MODEL
    algorithm = fedavg.fedavg(model, setup())
    return algorithm, jax.jit(algorithm.stages[0].round)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in sorted(METHODS)
    ],
)
def test_nothing_pruned_is_fedavg_to_the_bit(name):
    algorithm = METHODS[name](setup())
    untrained = quadratic.NORMALIZED_STATE if name == "fedtiny" else {}
    state = algorithm.init(quadratic.PARAMS, untrained)
    members = quadratic.cohort(algorithm, range(6))

    def step(run, state, members):
        key = jax.random.fold_in(KEY, state.round)
        state, rows, _ = run(key, state, members, PEOPLE)
        return state, members._replace(states=rows)

    for stage in algorithm.stages[:-1]:
        run = jax.jit(stage.round)
        for _ in range(stage.num_rounds):
            state, members = step(run, state, members)
    if name not in TRAINED:
        chex.assert_trees_all_equal(state.params, quadratic.PARAMS)

    reference, reference_run = plain(name)
    expected = reference.init(state.params, state.model_state)._replace(round=state.round)
    others = quadratic.cohort(reference, range(6))
    run = jax.jit(algorithm.stages[-1].round)
    for _ in range(2):
        state, members = step(run, state, members)
        expected, others = step(reference_run, expected, others)
        chex.assert_trees_all_equal(state.params, expected.params)
        chex.assert_trees_all_equal(state.model_state, expected.model_state)
        assert int(np.sum(masks.num_kept(state.masks))) == quadratic.NUM_WEIGHTS
