"""How a cohort runs must not show in what it computes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import masks, metrics
from fedjaxprune.federated import aggregators, cohort
from fedjaxprune.types import Broadcast, Cohort, CohortAggregator, Message
from tests import quadratic

KEY = jax.random.key(0)
PEOPLE = quadratic.population()
BROADCAST = Broadcast(quadratic.PARAMS, masks.full(quadratic.PARAMS), {}, jnp.int32(0))
AGGREGATORS = {
    "delta": aggregators.weighted_mean(),
    "votes": aggregators.vote_counts(),
    "metrics": aggregators.unweighted_sum(),
}


def update(key, broadcast, state, data):
    """Send noise of the client's own key; remember how often one took part."""
    noise = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), broadcast.params)
    points = data.examples["inputs"][data.order[data.start]]
    message = Message(
        fields={
            "delta": noise,
            "votes": jax.tree.map(lambda leaf: leaf > 0, noise),
            "metrics": metrics.mean(points[:1], jnp.ones([1])),
        },
        weight=data.size.astype(jnp.float32),
    )
    return message, {"visits": state["visits"] + 1}


def run(
    client_ids,
    participated=None,
    chunk_size=1,
    update=update,
    visits=None,
    extra=None,
    num_devices=None,
):
    mesh = None if num_devices is None else cohort.make_mesh(devices=jax.devices()[:num_devices])
    size = len(client_ids)
    members = Cohort(
        client_ids=jnp.asarray(client_ids, jnp.int32),
        participated=jnp.ones(size, bool) if participated is None else jnp.asarray(participated),
        states={"visits": jnp.zeros(size, jnp.int32) if visits is None else jnp.asarray(visits)},
    )
    return jax.jit(
        lambda members, people: cohort.run(
            KEY,
            update,
            {**AGGREGATORS, **(extra or {})},
            BROADCAST,
            members,
            people,
            chunk_size=chunk_size,
            mesh=mesh,
        )
    )(members, PEOPLE)


@pytest.mark.usual("2")
@pytest.mark.parametrize("chunk_size", [2, 4, 100])
def test_every_chunk_size_gives_the_same_result(chunk_size):
    ids = [4, 0, 5, 2, 1, 3]
    chex.assert_trees_all_close(run(ids, chunk_size=chunk_size), run(ids), rtol=1e-6)


@pytest.mark.usual("8-3")
@pytest.mark.parametrize(("num_devices", "chunk_size"), [(1, 4), (2, 1), (3, 2), (8, 3)])
def test_every_number_of_devices_gives_the_same_result(num_devices, chunk_size):
    ids, present = [4, 0, 5, 2, 1], [True, True, False, True, True]
    visits = [40, 0, 50, 20, 10]
    extra = {"metrics": CohortAggregator(lambda v, m, w: (v, w))}
    whole = run(ids, present, visits=visits, extra=extra)
    shared = run(ids, present, chunk_size, visits=visits, extra=extra, num_devices=num_devices)
    chex.assert_trees_all_close(shared, whole, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(shared.states["visits"], [41, 1, 50, 21, 11])


@pytest.mark.usual("2")
@pytest.mark.parametrize("num_devices", [2, 8])
def test_a_client_that_is_not_finite_is_left_out_on_any_device(num_devices):
    def broken(key, broadcast, state, data):
        message, after = update(key, broadcast, state, data)
        bad = jnp.where(data.start == PEOPLE.offsets[2], jnp.float32(np.nan), jnp.float32(1.0))
        return message, {"visits": after["visits"] * bad}

    def run_broken(ids, num_devices):
        return run(
            ids, update=broken, visits=np.zeros(len(ids), np.float32), num_devices=num_devices
        )

    outcome = run_broken([1, 2, 3], num_devices)
    chex.assert_trees_all_close(outcome.fields, run_broken([1, 3], None).fields, rtol=1e-6)
    np.testing.assert_array_equal(outcome.rejected, [False, True, False])


@pytest.mark.parametrize("num_devices", [1, 2, 3, 5])
def test_a_cohort_is_dealt_out_by_examples_not_by_clients(num_devices):
    sizes = np.array([7, 0, 900, 30, 31, 400, 200, 250, 3, 0, 88])
    num_slots = -(-len(sizes) // num_devices)
    dealt, slots = jax.jit(cohort._deal, static_argnums=(1, 2))(
        jnp.asarray(sizes), num_devices, num_slots
    )
    np.testing.assert_array_equal(np.asarray(dealt)[slots], np.arange(len(sizes)))
    held = np.append(sizes, 0)[np.asarray(dealt)].reshape(num_devices, num_slots)
    assert held.sum() == sizes.sum()
    assert np.all(np.diff(held, axis=1) <= 0)  # a chunk holds clients of like size
    # No device can have less than the largest client, and the greedy deal stays within a third.
    assert held.sum(axis=1).max() <= 4 / 3 * max(sizes.max(), sizes.sum() / num_devices)


def test_a_mesh_of_other_axes_is_refused():
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    members = Cohort(jnp.zeros(1, jnp.int32), jnp.ones(1, bool), {"visits": jnp.zeros(1)})
    with pytest.raises(ValueError, match="must have an axis 'clients', got"):
        cohort.run(KEY, update, AGGREGATORS, BROADCAST, members, PEOPLE, chunk_size=1, mesh=mesh)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_the_order_of_a_cohort_is_irrelevant(chunk_size):
    one = run([0, 1, 2, 3, 4], chunk_size=chunk_size)
    other = run([3, 0, 4, 1, 2], chunk_size=chunk_size)
    chex.assert_trees_all_close(one.fields, other.fields, rtol=1e-5, atol=1e-6)


@pytest.mark.usual("3")
@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_absent_clients_change_nothing(chunk_size):
    few = run([0, 2], chunk_size=chunk_size)
    many = run([5, 0, 3, 2], [False, True, False, True], chunk_size=chunk_size, visits=[7, 0, 9, 0])
    # Sums in another order; what nearly cancels is as exact as what it is the difference of.
    chex.assert_trees_all_close(few.fields, many.fields, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(many.states["visits"], [7, 1, 9, 1])
    assert not np.any(many.rejected)


@pytest.mark.usual("nan-3", "inf-1")
@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_client_that_is_not_finite_is_left_out_and_counted(chunk_size, bad):
    def broken(key, broadcast, state, data):
        message, after = update(key, broadcast, state, data)
        is_bad = data.start == PEOPLE.offsets[2]
        kernel = message.fields["delta"]["dense"]["kernel"]
        kernel = kernel.at[0, 0].set(jnp.where(is_bad, jnp.float32(bad), kernel[0, 0]))
        message.fields["delta"]["dense"]["kernel"] = kernel
        return message, after

    outcome = run([1, 2, 3], chunk_size=chunk_size, update=broken)
    chex.assert_trees_all_close(outcome.fields, run([1, 3]).fields, rtol=1e-6)
    np.testing.assert_array_equal(outcome.rejected, [False, True, False])
    np.testing.assert_array_equal(outcome.states["visits"], [1, 0, 1])


def test_streaming_equals_the_formula_over_gathered_messages():
    gathered = run([0, 1, 2], extra={"delta": CohortAggregator(lambda v, m, w: (v, w))})
    values, weights = gathered.fields["delta"]
    expected = jax.tree.map(lambda v: jnp.tensordot(weights / weights.sum(), v, axes=1), values)
    chex.assert_trees_all_close(run([0, 1, 2]).fields["delta"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usual("2-2")
@pytest.mark.parametrize(("chunk_size", "num_devices"), [(1, None), (2, None), (2, 2)])
def test_the_median_sees_all_messages_at_once(chunk_size, num_devices):
    outcome = run(
        [0, 1, 2, 3, 4],
        chunk_size=chunk_size,
        extra={"delta": aggregators.median()},
        num_devices=num_devices,
    )
    gathered = run([0, 1, 2, 3, 4], extra={"delta": CohortAggregator(lambda v, m, w: v)})
    expected = jax.tree.map(lambda v: np.median(v, axis=0), gathered.fields["delta"])
    chex.assert_trees_all_close(outcome.fields["delta"], expected, rtol=1e-6)


def test_a_field_without_an_aggregator_is_named():
    def chatty(key, broadcast, state, data):
        message, after = update(key, broadcast, state, data)
        return message._replace(fields={**message.fields, "gossip": jnp.float32(1.0)}), after

    with pytest.raises(ValueError, match="fields without an aggregator: gossip"):
        run([0], update=chatty)


def test_a_chunk_holds_at_least_one_client():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        run([0, 1], chunk_size=0)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_a_cohort_of_nobody_is_refused(chunk_size):
    with pytest.raises(ValueError, match="at least one client"):
        run([], chunk_size=chunk_size)
