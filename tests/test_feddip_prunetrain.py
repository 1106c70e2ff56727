"""Pruning at the client: the curve, the counts, and a mean in which what is not sent is zero."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks
from fedjaxprune.federated.corrections import fednova
from fedjaxprune.methods import feddip_prunetrain
from fedjaxprune.pruning import pruners, schedules
from fedjaxprune.rounds import protocol
from fedjaxprune.types import PrunerInputs
from tests import quadratic

KEY = jax.random.key(4)
PEOPLE = quadratic.population()
CURVE = {"initial_sparsity": 0.5, "final_sparsity": 0.9, "begin_round": 0, "end_round": 100}
LENET5 = {"conv1": 150, "conv2": 2400, "fc1": 48_000, "fc2": 10_080, "fc3": 840}


def build(correction=None, **options):
    base = protocol.Protocol(
        num_rounds=6,
        batcher=quadratic.full_batches(2),
        optimizer=optax.sgd(0.1),
        correction=correction,
    )
    settings = {"sparsity": 0.75, "initial_sparsity": 0.25, "ends": "prunable", **options}
    method = feddip_prunetrain
    return method.build(method.FedDIPPruneTrain(**settings), quadratic.task(base, num_epochs=2))


def test_a_layer_that_an_equal_share_empties_is_refused():
    with pytest.raises(ValueError, match="at least one of the 8 weights of 'head/kernel', or noth"):
        build(sparsity=0.95, allocation="uniform")


@pytest.mark.parametrize(
    ("index", "wanted"), [(0, 0.5), (1, 0.511880), (25, 0.73125), (50, 0.85), (99, 0.9)]
)
def test_the_sparsity_of_a_round(index, wanted):
    found = float(schedules.evaluate(schedules.cubic(**CURVE), jnp.int32(index)))
    assert found == pytest.approx(wanted, abs=5e-7)


PRUNE_INNER = jax.jit(
    pruners.exempt(
        pruners.prune_to(schedules.cubic(**CURVE)), lambda path, leaf: path not in ("conv1", "fc3")
    ).update
)


@pytest.mark.parametrize("index", [0, 1, 25, 50, 99, 100])
def test_the_inner_leaves_of_lenet5_keep_what_the_curve_says(index):
    rng = np.random.default_rng(index)
    params = {name: jnp.asarray(rng.normal(size=n), jnp.float32) for name, n in LENET5.items()}
    inputs = PrunerInputs(params, None, jnp.int32(index))
    own, _ = PRUNE_INNER(KEY, masks.full(params), (), inputs)
    counts = {name: int(np.sum(mask)) for name, mask in own.items()}
    sparsity = float(schedules.evaluate(schedules.cubic(**CURVE), jnp.int32(index)))
    assert counts["conv1"] == 150
    assert counts["fc3"] == 840
    inner = counts["conv2"] + counts["fc1"] + counts["fc2"]
    assert inner == 60_480 - round(sparsity * 60_480)
    if index == 100:
        assert inner == 6_048
        assert 1 - sum(counts.values()) / 61_470 == pytest.approx(0.8855, abs=5e-5)


def kernels(params):
    return np.concatenate([np.ravel(params[n]["kernel"]) for n in ("dense", "head")])


def test_what_a_client_does_not_send_is_zero_in_the_mean():
    """Two rounds by hand: train all weights, prune each client's, average, prune the mean."""
    algorithm = build(penalty=0.0)
    state = algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})
    run, members = jax.jit(algorithm.stages[0].round), quadratic.cohort(algorithm, range(6))
    sizes = np.diff(np.asarray(PEOPLE.offsets))
    grown = 0
    for index, present in enumerate((range(6), (1, 2))):
        start = np.asarray(quadratic.flatten(state.params))
        own = []
        for client in present:
            mean = quadratic.mean_point(PEOPLE, client)
            trained = jnp.asarray(mean + 0.81 * (start - mean))
            own.append(pruned(trained, index))
        average = np.average(own, axis=0, weights=sizes[list(present)])
        wanted = pruned(jnp.asarray(average, jnp.float32), index)
        here = jnp.asarray([client in present for client in range(6)])
        members = members._replace(participated=here)
        after, rows, metrics = run(KEY, state, members, PEOPLE)
        chex.assert_trees_all_close(quadratic.flatten(after.params), wanted, atol=1e-6)
        old, new = kernels(state.masks), kernels(after.masks)
        grown += int(np.sum(new & ~old))
        count = 32 - round((0.75 - 0.5 * (1 - index / 6) ** 3) * 32)
        assert int(new.sum()) == count
        assert np.all(np.asarray(metrics.num_uploaded)[here].sum(axis=1) == count + 6)
        state, members = after, members._replace(states=rows)
    assert grown > 0  # what was pruned in one round may be live in the next


def pruned(vector, index):
    """Keep the largest of the kernels' entries of a flat vector; biases stay."""
    is_kernel = quadratic.flatten(
        jax.tree.map(lambda leaf: jnp.full(leaf.shape, leaf.ndim > 1), quadratic.PARAMS)
    )
    count = 32 - round((0.75 - 0.5 * (1 - index / 6) ** 3) * 32)
    sizes = np.where(is_kernel, np.abs(np.asarray(vector)), -1.0)
    largest = np.argsort(-sizes, kind="stable")[:count]
    keep = ~np.asarray(is_kernel)
    keep[largest] = True
    return np.where(keep, np.asarray(vector), 0.0)


def test_the_ends_stay_dense_and_a_network_of_ends_alone_is_refused():
    with pytest.raises(ValueError, match="prun"):
        build(ends="dense").init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})


def test_a_curve_that_falls_is_refused():
    with pytest.raises(ValueError, match=r"initial_sparsity must be at most sparsity \(0.75\)"):
        build(initial_sparsity=0.8)


def test_deltas_divided_by_steps_cannot_count_what_is_absent_as_zero():
    divided = fednova.normalized_averaging(batcher=quadratic.full_batches(2))
    with pytest.raises(ValueError, match="'fednova' divides deltas by steps"):
        build(correction=divided)
