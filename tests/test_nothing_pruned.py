"""At sparsity 0 every method that has one trains as FedAvg does, to the bit."""

import functools

import chex
import jax
import numpy as np
import pytest

from fedjaxprune import masks
from fedjaxprune.methods import (
    averaged_filters,
    gradual_magnitude,
    magnitude_masks,
    mpfl,
    pooled_filters,
    random_filters,
    random_masks,
    snip,
)
from tests import quadratic
from tests.test_algorithms import by_law, dip, flip, setup, tiny
from tests.test_algorithms import plain as fedavg

KEY = jax.random.key(8)
PEOPLE = quadratic.population()
MODEL = quadratic.MODEL


METHODS = {
    "feddip_without_penalty": dip(sparsity=0.0, initial_sparsity=0.0, max_penalty=0.0),
    "gradual_magnitude": by_law(gradual_magnitude, sparsity=0.0),
    "random_masks": by_law(random_masks, sparsity=0.0),
    "magnitude_masks": by_law(magnitude_masks, sparsity=0.0),
    "one_client_masks": by_law(magnitude_masks, sparsity=0.0, examples="one_client", client_id=2),
    "pooled_masks": by_law(magnitude_masks, sparsity=0.0, examples="pooled"),
    "snip_masks": by_law(snip, sparsity=0.0, num_prune_steps=1),
    "snip_masks_of_clients": by_law(snip, sparsity=0.0, examples="clients", num_prune_steps=1),
    "autoflip": flip(sparsity=0.0),
    "fedtiny": tiny(sparsity=0.0, prune_every=1),
    "mpfl": by_law(mpfl, sparsity=0.0),
    "random_filters": by_law(random_filters, sparsity=0.0),
    "pooled_filters": by_law(pooled_filters, sparsity=0.0),
    "averaged_filters": by_law(averaged_filters, sparsity=0.0),
}
TRAINED = ("magnitude_masks", "fedtiny")  # that go on from weights trained at the server
SLOW = ("one_client_masks", "pooled_masks", "pooled_filters", "averaged_filters")  # share parts


@functools.cache
def plain(name):
    model = quadratic.NORMALIZED if name == "fedtiny" else MODEL
    algorithm = fedavg(model)(setup())
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
