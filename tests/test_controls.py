"""Controls around any method: as many weights at random places, new weights under its masks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, registry
from fedjaxprune.experiment.config import resolve
from fedjaxprune.experiment.run import build
from fedjaxprune.methods import random_masks, rigl
from fedjaxprune.rounds import controls, protocol
from fedjaxprune.types import Cohort
from tests import quadratic

KEY = jax.random.key(6)
OTHER = jax.tree.map(lambda leaf: leaf + 1.0, quadratic.PARAMS)
STATE = {"steps": jnp.float32(0.0)}


def make(method, control, *, num_rounds=2, **settings):
    """Build a method with a control around it; a new start is one more than the first."""
    setup = protocol.Protocol(
        num_rounds=num_rounds, batcher=quadratic.full_batches(1), optimizer=optax.sgd(0.1)
    )
    model = quadratic.MODEL._replace(init=lambda key: (OTHER, STATE))
    task = quadratic.task(setup, model=model)
    algorithm = method.build(method.METHOD.settings(sparsity=0.5, **settings), task)
    if control == "reinitialize":
        return algorithm, controls.reinitialized(algorithm, task)
    start = functools.partial(tuple, (quadratic.PARAMS, STATE))
    return algorithm, controls.shuffled(algorithm, task, initial=start)


def play(algorithm, until):
    """Run rounds with all clients up to a stage, that one included."""
    state = algorithm.init(quadratic.PARAMS, STATE)
    members = quadratic.cohort(algorithm, range(6))
    for stage in algorithm.stages:
        for _ in range(stage.num_rounds):
            key = jax.random.fold_in(KEY, state.round)
            state, rows, _ = jax.jit(stage.round)(key, state, members, quadratic.population())
            members = Cohort(members.client_ids, members.participated, rows)
        if stage.name == until:
            break
    return state, members.states


def test_a_shuffle_keeps_the_counts_of_layers_and_moves_the_places():
    before, _ = play(make(random_masks, "shuffle")[0], "draw")
    after, _ = play(make(random_masks, "shuffle")[1], "shuffle")
    np.testing.assert_array_equal(masks.num_kept(before.masks), masks.num_kept(after.masks))
    assert int(masks.num_changed(before.masks, after.masks)) > 0
    jax.tree.map(
        np.testing.assert_array_equal, after.params, masks.apply(after.masks, quadratic.PARAMS)
    )
    assert int(after.masks_id) == int(before.masks_id) + 1  # so that clients are sent them


def test_new_weights_are_trained_under_the_same_masks():
    before, _ = play(make(random_masks, "reinitialize")[0], "draw")
    after, _ = play(make(random_masks, "reinitialize")[1], "reinitialize")
    jax.tree.map(np.testing.assert_array_equal, before.masks, after.masks)
    jax.tree.map(np.testing.assert_array_equal, after.params, masks.apply(after.masks, OTHER))
    assert int(after.masks_id) == int(before.masks_id)


def names(algorithm):
    return [(stage.name, stage.num_rounds) for stage in algorithm.stages]


def test_a_method_that_revises_masks_runs_to_its_end_first():
    alone, controlled = make(rigl, "shuffle", prune_every=1)
    assert names(controlled) == [*names(alone), ("shuffle", 1), ("retrain", 2)]
    assert names(make(random_masks, "shuffle")[1]) == [("draw", 1), ("shuffle", 1), ("train", 2)]
    assert "first runs the method for its 3 rounds, then trains again" in controlled.notes[-1]
    assert controlled.stages[-2].cohort == "population"  # all of whom forget what they remember


FIXED = {
    "flpqsu": {"layers": "all"},
    "mpfl": {"layers": "all"},
    "random_filters": {"layers": "all"},
    "feddst": {"drop_fraction": 0.0},
    "fedsgc": {"sparsity": 0.0},
    "fedrts": {"drop_fraction": 0.0},
    "rigl": {"sparsity": 0.0},
    "prunefl": {"further_pruning": False},
    "fedavg": {},
}


def built(name, num_rounds=6, **settings):
    method = registry.find("method", name).part
    setup = protocol.Protocol(
        num_rounds=num_rounds, batcher=quadratic.full_batches(2), optimizer=optax.sgd(0.1)
    )
    task = quadratic.task(setup, num_epochs=2)
    return method.build(method.settings(**settings), task), task


@pytest.mark.parametrize("name", FIXED)
def test_methods_whose_masks_stay_are_trained_once(name):
    algorithm, task = built(name, **FIXED[name])
    controlled = controls.reinitialized(algorithm, task)
    before = [stage.name for stage in algorithm.stages[:-1]]
    assert [stage.name for stage in controlled.stages] == [*before, "reinitialize", "train"]
    assert controlled.notes == ()


@pytest.mark.parametrize("name", ["feddst", "fedsgc", "fedrts", "prunefl"])
def test_methods_whose_masks_move_are_trained_twice(name):
    assert not built(name)[0].has_fixed_masks


@pytest.mark.parametrize(("dense_rounds", "cohort"), [(1, "population"), (0, "sampled")])
def test_clients_forget_the_rounds_that_they_trained_before_a_control(dense_rounds, cohort):
    algorithm, task = built("mpfl", layers="all", dense_rounds=dense_rounds)
    assert controls.reinitialized(algorithm, task).stages[-2].cohort == cohort


def test_clients_of_a_control_keep_what_they_do_not_need():
    """Those of FL-PQSU remember a loss; plain training behind the control leaves it alone."""
    algorithm, task = built("flpqsu", **FIXED["flpqsu"])
    stage = controls.reinitialized(algorithm, task).stages[-1]
    state = algorithm.init(quadratic.PARAMS, STATE)
    members = quadratic.cohort(algorithm, range(6))
    _, rows, _ = jax.eval_shape(stage.round, KEY, state, members, quadratic.population())
    chex.assert_trees_all_equal_shapes_and_dtypes(rows, members.states)


@pytest.mark.parametrize(("num_rounds", "is_said"), [(1, True), (2, False)])
@pytest.mark.parametrize("name", ["feddst", "fedsgc", "fedfit"])
def test_a_run_that_is_too_short_to_revise_masks_says_so(name, num_rounds, is_said):
    notes = built(name, num_rounds)[0].notes
    assert ["num_rounds is 1: the masks stay" in note for note in notes] == [True] * is_said


def test_a_run_takes_a_control_by_name_for_any_method():
    given = {
        "method": {"name": "gradual_magnitude", "sparsity": 0.5},
        "model": {"name": "mlp", "hidden_sizes": (4,)},
        "federation": {"num_rounds": 2, "control": "shuffle"},
        "execution.devices": 1,
        "execution.chunk_size": 1,
    }
    parts = build.build(resolve.resolve(given))
    assert names(parts.algorithm) == [("train", 2), ("shuffle", 1), ("retrain", 2)]
