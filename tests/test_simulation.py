"""Rounds over a population's rows: the same by loop, by scan and for many seeds at once."""

import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune.federated import populations, sampling, uplinks
from fedjaxprune.rounds import simulation, stages
from fedjaxprune.types import RoundMetrics
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


@pytest.mark.slow
def test_a_scan_over_rounds_is_the_loop(parts):
    algorithm, advance = parts
    run = start(algorithm)
    expected = loop(jax.jit(advance), run, 4)
    scanned, records = jax.jit(
        lambda run: jax.lax.scan(lambda run, _: advance(KEY, run, PEOPLE), run, None, length=4)
    )(run)
    chex.assert_trees_all_close(scanned, expected, rtol=1e-6, atol=1e-7)
    assert records.num_live.shape == (4, 4)


@pytest.mark.slow
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


def test_clients_rows_are_written_in_place():
    """Nothing of the compiled round copies an array of everybody's rows."""
    number = 1237
    algorithm = dip()(setup(uplink=WIRE))
    sample = sampling.uniform(num_clients=number, cohort_size=3)
    offsets = jnp.minimum(jnp.arange(number + 1, dtype=jnp.int32), len(PEOPLE.order))
    people = PEOPLE._replace(offsets=offsets)
    run = simulation.start(algorithm, quadratic.PARAMS, STATE, num_clients=number)
    play = jax.jit(simulation.advance(algorithm.stages[0], sample), donate_argnums=1)
    text = str(play.lower(KEY, run, people).compile().as_text())
    assert f"[{number}]" in text
    assert not re.findall(rf"= \w+\[{number}[],].* copy\(", text)


@pytest.mark.parametrize("num_before", [0, 10])
def test_a_stage_of_ones_own_changes_nothing_where_it_is_not_finite(parts, num_before):
    algorithm, _ = parts

    def round_fn(key, state, cohort, population):
        in_state = jnp.where(state.round == 1, jnp.nan, 1.0)
        in_row = jnp.where((state.round == 2) & (cohort.client_ids == 4), jnp.inf, 1.0)
        after = state._replace(
            round=state.round + 1, params=jax.tree.map(lambda w: w + in_state, state.params)
        )
        rows = cohort.states._replace(
            uplink=jax.tree.map(
                lambda row: row + in_row.reshape(-1, *[1] * (row.ndim - 1)), cohort.states.uplink
            )
        )
        made: dict[str, Any] = dict.fromkeys(RoundMetrics._fields, ())
        made |= {"num_participating": jnp.int32(6), "num_rejected": jnp.int32(1)}
        return after, rows, RoundMetrics(**made)

    stage = stages.shift_rounds(algorithm.stages[0]._replace(round=round_fn), num_before)
    play = jax.jit(simulation.advance(stage, sampling.all_clients(6)))
    now = start(algorithm)
    now = now._replace(state=now.state._replace(round=jnp.int32(num_before)))
    for number, num_rejected in enumerate([1, 6, 6, 1]):
        after, metrics = play(KEY, now, PEOPLE)
        assert (after.state.round, metrics.num_rejected) == (num_before + number + 1, num_rejected)
        if num_rejected == 6:
            kept = after._replace(state=after.state._replace(round=now.state.round))
            chex.assert_trees_all_equal(kept, now)
        else:
            params, row = quadratic.flatten(after.state.params), jax.tree.leaves(after.rows.uplink)
            np.testing.assert_allclose(params, quadratic.flatten(now.state.params) + 1.0)
            assert np.all(row[0] == jax.tree.leaves(now.rows.uplink)[0] + 1.0)
        now = after


def test_rounds_of_the_package_are_not_guarded_twice(parts):
    algorithm, _ = parts
    for num_before in (0, 3):
        built_in = stages.shift_rounds(algorithm.stages[0], num_before).round
        assert stages.guarded(built_in) is built_in


def with_labels(size):
    examples = {**PEOPLE.examples, "labels": jnp.zeros(size, jnp.int32)}
    return PEOPLE._replace(examples=examples)


SHAPES = {
    "labels": (with_labels(27), r"agree in their first axis, got 28 in 'inputs', 27 in 'labels'"),
    "a number": (PEOPLE._replace(examples=jnp.float32(1.0)), "got a single number in 'examples'"),
    "nothing": (PEOPLE._replace(examples={}), "got no array in 'examples'"),
    "order": (PEOPLE._replace(order=PEOPLE.order.astype(jnp.float32)), "order must be .* float32"),
    "offsets": (PEOPLE._replace(offsets=PEOPLE.offsets[None]), r"offsets must be .* \(1, 7\)"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_population_of_ones_own_is_compared_by_shapes_while_tracing(parts, name):
    algorithm, advance = parts
    people, sentence = SHAPES[name]
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(advance, KEY, start(algorithm), people)
    with pytest.raises(ValueError, match=sentence):
        algorithm.stages[0].round(
            KEY, start(algorithm).state, quadratic.cohort(algorithm, [0, 1]), people
        )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"participated": jnp.ones(3, jnp.bool_)}, r"booleans of shape \(2,\), .* \(3,\)"),
        ({"participated": jnp.ones(2)}, "booleans of shape .* float32"),
        ({"client_ids": jnp.zeros(2)}, "vector of integers, got float32"),
        ({"client_ids": jnp.zeros(3, jnp.int32)}, "booleans of shape"),
    ],
)
def test_a_cohort_of_ones_own_is_compared_by_shapes_while_tracing(parts, changes, sentence):
    algorithm, _ = parts
    members = quadratic.cohort(algorithm, [0, 1])._replace(**changes)
    with pytest.raises(ValueError, match=sentence):
        algorithm.stages[0].round(KEY, start(algorithm).state, members, PEOPLE)


def test_a_cohorts_rows_are_those_of_its_clients(parts):
    algorithm, _ = parts
    members = quadratic.cohort(algorithm, [0, 1])
    others = members._replace(client_ids=jnp.arange(3), participated=jnp.ones(3, jnp.bool_))
    with pytest.raises(ValueError, match="a row for each of its 3 clients"):
        algorithm.stages[0].round(KEY, start(algorithm).state, others, PEOPLE)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"order": PEOPLE.order.at[3].set(28)}, r"order must hold rows in \[0, 28\), got 0 to 28"),
        ({"order": PEOPLE.order.at[3].set(-1)}, "got -1 to"),
        ({"order": PEOPLE.order[:27]}, "offsets must not fall, from 0 to the 27 entries"),
        ({"offsets": PEOPLE.offsets.at[2].set(1)}, r"got \[0, 3, 1, 10, 18, 22, ...\]"),
        ({"offsets": PEOPLE.offsets[1:-1]}, "num_clients must be that of the population, 4, got 6"),
    ],
)
def test_the_rows_of_a_population_of_ones_own_are_looked_at_once(parts, changes, sentence):
    algorithm, _ = parts
    options = {"num_clients": 6, "population": PEOPLE}
    simulation.start(algorithm, quadratic.PARAMS, STATE, **options)
    options["population"] = PEOPLE._replace(**changes)
    with pytest.raises(ValueError, match=sentence):
        simulation.start(algorithm, quadratic.PARAMS, STATE, **options)
    jax.eval_shape(populations.check_values, PEOPLE)  # values that are traced are not known


def test_a_network_that_does_not_start_finite_is_refused(parts):
    algorithm, _ = parts
    dense = quadratic.PARAMS["dense"]
    wrong = {**dense, "bias": dense["bias"].at[0].set(jnp.nan)}
    params = {**quadratic.PARAMS, "dense": wrong}
    with pytest.raises(ValueError, match=r"but 1 of \d+ in the parameter 'dense/bias' are not"):
        simulation.start(algorithm, params, STATE, num_clients=6)
    jax.eval_shape(lambda p: simulation.start(algorithm, p, STATE, num_clients=6), params)
    state = {**STATE, "steps": jnp.float32(jnp.inf)}
    with pytest.raises(ValueError, match="but 1 of 1 in the state 'steps' are not"):
        simulation.start(algorithm, quadratic.PARAMS, state, num_clients=6)
