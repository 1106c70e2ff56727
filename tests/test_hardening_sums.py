"""Sums that count beyond 2²⁴, and statistics that are no measurements."""

import itertools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, metrics
from fedjaxprune.federated import aggregators, batch_norm, cohort, early_stopping
from fedjaxprune.models import adapters, layers
from fedjaxprune.types import Broadcast, Client, Cohort, Message, Population, client_data
from tests import quadratic

KEY = jax.random.key(0)
LARGE = 2**24
NUM_SMALL = 1000


def stream(aggregator, values, weights, holds=None):
    """Add one large client first, then small ones, in a compiled loop."""

    def add(sums, client):
        value, weight = client
        return aggregator.add(sums, value, holds, weight), None

    start = aggregator.init(jax.tree.map(lambda leaf: leaf[0], values))
    return jax.jit(lambda: aggregator.finish(jax.lax.scan(add, start, (values, weights))[0]))()


WEIGHTS = jnp.asarray([LARGE, *[1] * NUM_SMALL], jnp.float32)
VALUES = jnp.asarray([[1.0, 0.0, 1.0], *[[1.0, 1.0, 3.0]] * NUM_SMALL], jnp.float32)
MEAN = np.average(np.asarray(VALUES, np.float64), axis=0, weights=np.asarray(WEIGHTS, np.float64))


def test_a_total_weight_counts_beyond_2_to_the_24():
    found = stream(aggregators.weighted_mean(), VALUES[:, 1], WEIGHTS)  # a scalar each
    np.testing.assert_allclose(found, MEAN[1], rtol=1e-6)


@pytest.mark.parametrize("name", ["weighted_mean", "weighted_sum", "holder_mean", "vote_weights"])
def test_arrays_count_beyond_2_to_the_24_in_the_wide_form(name):
    values = VALUES > 0 if name == "vote_weights" else VALUES
    holds = jnp.ones(3, jnp.bool_) if name == "holder_mean" else None
    total = LARGE + NUM_SMALL
    wanted = {"vote_weights": [total, NUM_SMALL, total], "weighted_sum": total * MEAN}
    found = stream(getattr(aggregators, name)().wide(), values, WEIGHTS, holds)
    np.testing.assert_allclose(found, wanted.get(name, MEAN), rtol=1e-6)


def test_metrics_count_beyond_2_to_the_24():
    means = metrics.Mean(total=WEIGHTS, weight=WEIGHTS)
    found = stream(aggregators.unweighted_sum(), means, WEIGHTS)
    np.testing.assert_array_equal(found.weight, LARGE + NUM_SMALL)
    np.testing.assert_array_equal(found.total, LARGE + NUM_SMALL)


@pytest.mark.parametrize("name", ["weighted_mean", "unweighted_sum", "vote_weights"])
def test_merging_large_totals_loses_nothing_and_commutes(name):
    make = getattr(aggregators, name)
    aggregator = make().wide()
    like = jnp.bool_(True) if name == "vote_weights" else jnp.float32(1.0)
    some, one = (aggregator.init(like) for _ in range(2))
    some = aggregator.add(some, like, None, jnp.float32(LARGE))
    one = aggregator.add(one, like, None, jnp.float32(1.0))
    first = second = some
    for _ in range(64):
        chex.assert_trees_all_equal(aggregator.merge(first, one), aggregator.merge(one, first))
        first, second = aggregator.merge(first, one), aggregator.merge(one, second)
    assert aggregator.finish(first) == aggregator.finish(second)
    wanted = {"weighted_mean": 1.0, "unweighted_sum": 65.0, "vote_weights": LARGE + 64}
    assert aggregator.finish(first) == wanted[name]


def test_a_cohort_of_a_large_population_counts_every_example():
    sizes = [LARGE, *[1] * 100]
    people = Population(
        examples={"inputs": jnp.zeros([1])},
        order=jnp.zeros(sum(sizes), jnp.int32),
        offsets=jnp.asarray(np.concatenate([[0], np.cumsum(sizes)]), jnp.int32),
    )

    def update(key, broadcast, state, data):
        value = jnp.where(data.size > 1, jnp.array([0.0, 1.0]), jnp.array([1.0, 1.0]))
        seen = metrics.Mean(total=data.size.astype(jnp.float32), weight=jnp.float32(1.0))
        fields = {"delta": value, "control": value, "metrics": seen}
        return Message(fields, data.size.astype(jnp.float32)), state

    members = Cohort(jnp.arange(101, dtype=jnp.int32), jnp.ones(101, jnp.bool_), ())
    rules = {
        "delta": aggregators.weighted_mean(),
        "control": aggregators.weighted_sum(),
        "metrics": aggregators.unweighted_sum(),
    }
    found = jax.jit(
        lambda: cohort.run(KEY, update, rules, (), members, people, chunk_size=4)
    )().fields
    total = LARGE + 100
    np.testing.assert_allclose(found["delta"], [100 / total, 1.0], rtol=1e-6)
    np.testing.assert_allclose(found["control"], [100, total], rtol=1e-7)
    np.testing.assert_array_equal(found["metrics"].total, total)


# Statistics ----------------------------------------------------------------------------------


def normalize(inputs, weights):
    """Train BatchNorm for a step from its start, on examples without height and width."""
    inputs = np.asarray(inputs, np.float32).reshape(-1, 1, 1, 1)
    module = layers.BatchNorm()

    @jax.jit
    def after(inputs, mask) -> Any:
        variables = module.init(KEY, inputs, train=False, mask=None)
        step = {"train": True, "mask": mask, "mutable": ["batch_stats"]}
        return module.apply(variables, inputs, **step)[1]

    found = jax.device_get(after(inputs, np.asarray(weights) > 0)["batch_stats"])
    return {name: float(leaf[0]) for name, leaf in found.items()}


def test_the_variance_of_a_single_value_is_not_measured():
    alone = normalize([5.0, 1.0, 2.0], [1.0, 0.0, 0.0])  # two are filling
    assert alone == {"mean": pytest.approx(0.5), "var": 1.0}
    assert normalize([5.0, 1.0], [0.0, 0.0]) == {"mean": 0.0, "var": 1.0}
    two = normalize([5.0, 1.0, 2.0], [1.0, 1.0, 0.0])
    assert two == {"mean": pytest.approx(0.3), "var": pytest.approx(0.9 + 0.1 * 8.0)}


class Normalized(nn.Module):
    """BatchNorm of flat inputs, by the package or by flax."""

    foreign: bool = False

    @nn.compact
    def __call__(self, x, train, mask=None):
        if self.foreign:
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return layers.BatchNorm(name="batch")(x[:, None, None], train, mask)[:, 0, 0]


def measure(sizes, *, foreign, passes=None, batch_size=4):
    """Measure the statistics of clients whose examples are alike, and combine them."""
    model = adapters.from_linen(Normalized(foreign), input_shape=(2,))
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(sum(sizes), 2)).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    people = Population(
        examples={"inputs": jnp.asarray(inputs), "labels": jnp.zeros(len(inputs), jnp.int32)},
        order=jnp.arange(len(inputs), dtype=jnp.int32),
        offsets=jnp.asarray(offsets, jnp.int32),
    )

    def batch(key, data, step):
        del key
        slots = batch_size * step + jnp.arange(batch_size)
        rows = data.order[data.start + slots % jnp.maximum(data.size, 1)]
        weights = (slots < data.size).astype(jnp.float32)
        return quadratic.Batch(people.examples["inputs"][rows], jnp.zeros(batch_size, int), weights)

    batcher = quadratic.Batcher(num_steps=lambda data: -(-data.size // batch_size), batch=batch)
    params, state = jax.jit(model.init)(KEY)
    before = batch_norm.pick(state)
    broadcast = Broadcast(params, masks.full(params), state, jnp.int32(0))
    if passes is None:
        client = batch_norm.statistics(model.loss, batcher=batcher)
    else:
        client = batch_norm.moving_statistics(model.loss, batcher=batcher, num_passes=passes)
    update = jax.jit(batch_norm.leave_out(client).update)
    mean = aggregators.weighted_mean()
    sums = {}
    for index in range(len(sizes)):
        message, _ = update(KEY, broadcast, (), client_data(people, jnp.int32(index)))
        for name in ("statistics", "measured"):
            value = message.fields[name]
            so_far = sums[name] if name in sums else mean.init(value)
            sums[name] = mean.add(so_far, value, None, message.weight)
    found = {name: mean.finish(value) for name, value in sums.items()}
    combined = batch_norm.combine(found["statistics"], found["measured"], before)
    parts = [inputs[a:b].astype(np.float64) for a, b in itertools.pairwise(offsets)]
    return [np.asarray(leaf) for leaf in combined], parts, found["measured"]


@pytest.mark.parametrize("foreign", [False, True])
def test_a_client_of_one_example_measures_a_mean_and_no_variance(foreign):
    (mean, var), (large, small, _), _ = measure((4, 1, 0), foreign=foreign)
    both = np.concatenate([large, small])
    np.testing.assert_allclose(mean, both.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, large.var(axis=0, ddof=0 if foreign else 1), rtol=1e-4)


def test_a_last_batch_of_one_example_measures_no_variance():
    (mean, var), (points,), _ = measure((5,), foreign=False)
    np.testing.assert_allclose(mean, points.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, points[:4].var(axis=0, ddof=1), rtol=1e-4)


@pytest.mark.parametrize("passes", [None, 2])
def test_where_nobody_measures_a_variance_it_stays(passes):
    (_, var), _, measured = measure((1, 1), foreign=False, passes=passes)
    np.testing.assert_array_equal(var, [1.0, 1.0])
    assert [float(share) for share in measured] == [1.0, 0.0]


def test_where_everybody_measures_nothing_is_rounded():
    (mean, var), parts, measured = measure((4, 3), foreign=False)
    assert [float(share) for share in measured] == [1.0, 1.0]
    every = np.concatenate(parts)
    np.testing.assert_allclose(mean, every.mean(axis=0), rtol=1e-5, atol=1e-6)
    wanted = sum(len(part) * part.var(axis=0, ddof=1) for part in parts) / 7
    np.testing.assert_allclose(var, wanted, rtol=1e-4)


def test_without_held_out_labels_an_explorer_follows_its_training_loss():
    def look(key, broadcast, state, data):
        return Message({"losses": jnp.float32(0.0)}, jnp.float32(0.0)), state

    client = early_stopping.until_no_improvement(
        quadratic.MODEL.loss,
        epoch=quadratic.full_batches(1),
        optimizer=optax.sgd(0.1),
        max_epochs=6,
        patience=2,
        watch="epoch",
        validation=Client(init=lambda params: (), update=look),
    )
    broadcast = Broadcast(
        quadratic.PARAMS, masks.full(quadratic.PARAMS), {"steps": jnp.float32(0.0)}, jnp.int32(0)
    )
    data = client_data(quadratic.population(), jnp.int32(0))
    message, _ = jax.jit(client.update)(KEY, broadcast, (), data)
    assert message.fields["metrics"]["epochs"].total == 6.0
