"""Rounds over a population's rows: the same by loop, by scan and for many seeds at once."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune.federated import sampling, uplinks
from fedjaxprune.rounds import simulation
from tests import quadratic
from tests.playing import STATE, dip, setup

KEY = jax.random.key(11)
PEOPLE = quadratic.population()
SAMPLE = sampling.with_dropout(
    sampling.weighted(jnp.arange(1.0, 7.0), cohort_size=3), probability=0.3
)
WIRE = uplinks.error_feedback(uplinks.top_k(fraction=0.5))


@pytest.fixture(scope="module")
def parts():
    algorithm = dip()(setup(uplink=WIRE))
    advance = simulation.advance(algorithm.stages[0], SAMPLE)
    return algorithm, advance


def start(algorithm, params=quadratic.PARAMS):
    return simulation.start(algorithm, params, STATE, num_clients=6)


def loop(advance, run, num_rounds, key=KEY):
    for _ in range(num_rounds):
        run, _ = advance(key, run, PEOPLE)
    return run


def test_rounds_are_traced_once_even_from_weak_types_and_may_be_donated(parts):
    algorithm, advance = parts
    chex.clear_trace_counter()
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), quadratic.PARAMS)
    play = jax.jit(chex.assert_max_traces(advance, n=1), donate_argnums=1)
    loop(play, start(algorithm, params), 3)
    assert np.all(quadratic.flatten(params) == np.float32(0.1))  # the caller's own are still there


def test_a_scan_over_rounds_is_the_loop(parts):
    algorithm, advance = parts
    run = start(algorithm)
    expected = loop(jax.jit(advance), run, 4)
    scanned, records = jax.jit(
        lambda run: jax.lax.scan(lambda run, _: advance(KEY, run, PEOPLE), run, None, length=4)
    )(run)
    chex.assert_trees_all_close(scanned, expected, rtol=1e-6, atol=1e-7)
    assert records.num_live.shape == (4, 4)


def test_seeds_can_be_mapped(parts):
    algorithm, advance = parts
    keys = jax.random.split(jax.random.key(1), 2)
    run = start(algorithm)
    both, _ = jax.jit(jax.vmap(advance, in_axes=(0, None, None)))(keys, run, PEOPLE)
    play = jax.jit(advance)
    for i in range(2):
        alone, _ = play(keys[i], run, PEOPLE)
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, i=i: leaf[i], both), alone, rtol=1e-5, atol=1e-6
        )


def test_only_those_present_change_their_rows(parts):
    algorithm, advance = parts
    run = start(algorithm)
    after, record = jax.jit(advance)(KEY, run, PEOPLE)
    touched = jax.tree.leaves(
        jax.tree.map(lambda leaf: jnp.any(leaf.reshape(6, -1) != 0, axis=1), after.rows.uplink)
    )
    assert int(jnp.any(jnp.stack(touched), axis=0).sum()) == int(record.num_participating)
