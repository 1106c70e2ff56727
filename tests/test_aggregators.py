"""Laws of many messages to one, over every aggregator."""

from collections.abc import Iterable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import metrics
from fedjaxprune.federated import aggregators
from tests import draws

NUM_CLIENTS = 7
WEIGHTS = jnp.array([1.0, 5.0, 0.0, 2.0, 3.0, 0.0, 4.0])
PRESENT = np.asarray(WEIGHTS) > 0
ABSENT = np.flatnonzero(~PRESENT)
VALUES = {
    "w": draws.normal(0, NUM_CLIENTS, 3, 4),
    "b": draws.normal(1, NUM_CLIENTS, 5),
    "scalar": draws.normal(2, NUM_CLIENTS),
}
MASKS = jax.tree.map(
    lambda leaf: (
        jax.random.bernoulli(jax.random.key(3), 0.4, leaf.shape).at[:, :1].set(False)
        if leaf.ndim > 1
        else leaf > 0
    ),
    VALUES,
)  # nobody holds some coordinates
COUNTS = jax.tree.map(lambda leaf: (10.0 * leaf).astype(jnp.int32), VALUES)
MEANS = jax.vmap(lambda v: metrics.Mean(total=v, weight=jnp.float32(1.0)))(VALUES["scalar"])


def _weights_like(leaf):
    return np.asarray(WEIGHTS).reshape(-1, *[1] * (leaf.ndim - 1))


def _direct_mean(leaf, mask):
    del mask
    leaf, weights = np.asarray(leaf)[PRESENT], _weights_like(leaf)[PRESENT]
    return np.sum(weights * leaf, axis=0) / np.sum(weights)


def _direct_holder_mean(leaf, mask):
    weights = np.where(mask, _weights_like(leaf), 0.0)
    total = np.sum(np.where(weights > 0, leaf, 0.0) * weights, axis=0)
    return np.where(weights.sum(axis=0) > 0, total / np.maximum(weights.sum(axis=0), 1.0), 0.0)


def _direct_total(leaf, mask):
    del mask
    return np.sum(np.asarray(leaf)[PRESENT], axis=0)


def _direct_weighted(leaf, mask):
    del mask
    return np.sum(_weights_like(leaf)[PRESENT] * np.asarray(leaf)[PRESENT], axis=0)


# name: (aggregator, values [C, ...], the formula of one leaf over all clients)
MONOIDS = {
    "weighted_mean": (aggregators.weighted_mean(), VALUES, _direct_mean),
    "holder_mean": (aggregators.holder_mean(), VALUES, _direct_holder_mean),
    "votes": (aggregators.vote_counts(), MASKS, _direct_total),
    "weighted_votes": (aggregators.vote_weights(), MASKS, _direct_weighted),
    "total": (aggregators.unweighted_sum(), VALUES, _direct_total),
    "total of integers": (aggregators.unweighted_sum(), COUNTS, _direct_total),
    "total of metrics": (aggregators.unweighted_sum(), MEANS, _direct_total),
}


def _direct_median(leaf):
    return np.median(np.asarray(leaf)[PRESENT], axis=0)


def _direct_trimmed_mean(leaf):
    return np.mean(np.sort(np.asarray(leaf)[PRESENT], axis=0)[1:-1], axis=0)


TOGETHER = {
    "median": (aggregators.median(), _direct_median),
    "trimmed_mean": (aggregators.trimmed_mean(fraction=0.3), _direct_trimmed_mean),  # 1 of 5
}


def _row(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def _masks_for(values):
    return MASKS if jax.tree.structure(values) == jax.tree.structure(MASKS) else None


def stream(name, clients: Iterable = range(NUM_CLIENTS), weights=WEIGHTS, values=None):
    """Accumulate one client after the other."""
    aggregator, default, _ = MONOIDS[name]
    values = default if values is None else values
    masks = _masks_for(values)
    add = jax.jit(aggregator.add)
    accumulator = aggregator.init(_row(values, 0))
    for i in clients:
        mask = None if masks is None else _row(masks, i)
        accumulator = add(accumulator, _row(values, i), mask, weights[i])
    return accumulator


def spoil(values):
    """Put nonsense where clients are absent."""

    def leaf(value):
        if value.dtype == jnp.bool_:
            return value.at[ABSENT].set(True)
        wrong = jnp.nan if jnp.issubdtype(value.dtype, jnp.inexact) else 10**6
        return value.at[ABSENT].set(wrong)

    return jax.tree.map(leaf, values)


def _as(like, value):
    return jnp.asarray(value, like.dtype)


def _close(first, second):
    chex.assert_trees_all_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(MONOIDS))
def test_streaming_equals_the_direct_formula(name):
    aggregator, values, formula = MONOIDS[name]
    result = aggregator.finish(stream(name))
    masks = _masks_for(values) or jax.tree.map(jnp.ones_like, values)
    _close(
        result, jax.tree.map(lambda new, *leaves: _as(new, formula(*leaves)), result, values, masks)
    )


@pytest.mark.parametrize("name", sorted(MONOIDS))
def test_merging_is_associative_and_commutative(name):
    merge = MONOIDS[name][0].merge
    a, b, c = stream(name, [0, 1]), stream(name, [2, 3, 4]), stream(name, [5, 6])
    chex.assert_trees_all_equal(merge(a, b), merge(b, a))
    _close(merge(merge(a, b), c), merge(a, merge(b, c)))
    _close(merge(merge(a, b), c), stream(name))


@pytest.mark.parametrize("name", sorted(MONOIDS))
def test_zero_is_neutral(name):
    aggregator, values, _ = MONOIDS[name]
    zero, some = aggregator.init(_row(values, 0)), stream(name)
    chex.assert_trees_all_equal(aggregator.merge(zero, some), some)
    chex.assert_trees_all_equal_shapes_and_dtypes(zero, some)
    finished = aggregator.finish(zero)
    chex.assert_trees_all_equal(finished, jax.tree.map(jnp.zeros_like, finished))


@pytest.mark.parametrize("name", sorted(MONOIDS))
def test_weight_zero_adds_nothing_whatever_the_value(name):
    spoilt = spoil(MONOIDS[name][1])
    chex.assert_trees_all_equal(stream(name, values=spoilt), stream(name, np.flatnonzero(PRESENT)))


@pytest.mark.parametrize("name", sorted(MONOIDS))
def test_the_order_of_clients_is_irrelevant(name):
    _close(stream(name, [4, 0, 6, 2, 1, 5, 3]), stream(name))


@pytest.mark.parametrize("name", sorted(MONOIDS))
def test_chunks_under_vmap_are_clients_one_by_one(name):
    aggregator, values, _ = MONOIDS[name]
    masks = _masks_for(values)
    zero = aggregator.init(_row(values, 0))
    axes = (None, 0, None if masks is None else 0, 0)
    parts = jax.vmap(aggregator.add, in_axes=axes)(zero, values, masks, WEIGHTS)
    _close(jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0, dtype=leaf.dtype), parts), stream(name))


def test_what_nobody_holds_is_zero_and_a_sole_holder_decides():
    aggregator = aggregators.holder_mean()
    values = jnp.array([[1.0, 2.0, jnp.nan], [3.0, jnp.nan, jnp.nan]])
    masks = jnp.array([[True, True, False], [True, False, False]])
    accumulator = aggregator.init(values[0])
    for i, weight in enumerate((1.0, 3.0)):
        accumulator = aggregator.add(accumulator, values[i], masks[i], jnp.float32(weight))
    np.testing.assert_allclose(aggregator.finish(accumulator), [2.5, 2.0, 0.0])


def test_where_everybody_holds_everything_the_two_means_agree():
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.bool_), _row(VALUES, 0))
    means = []
    for aggregator in (aggregators.weighted_mean(), aggregators.holder_mean()):
        accumulator = aggregator.init(_row(VALUES, 0))
        for i in range(NUM_CLIENTS):
            accumulator = aggregator.add(accumulator, _row(VALUES, i), masks, WEIGHTS[i])
        means.append(aggregator.finish(accumulator))
    _close(*means)


@pytest.mark.parametrize("make", [aggregators.weighted_mean, aggregators.holder_mean])
def test_sums_of_half_precision_are_kept_in_float32(make):
    like, mask = jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.bool_)
    accumulator = make().init(like)
    for _ in range(300):  # bfloat16 stops counting at 256
        accumulator = make().add(accumulator, like, mask, jnp.float32(1.0))
    np.testing.assert_array_equal(accumulator.totals.total, np.full(3, 300.0))


@pytest.mark.parametrize("name", sorted(TOGETHER))
def test_reducing_equals_the_direct_formula_on_those_present(name):
    aggregator, formula = TOGETHER[name]
    reduce = jax.jit(aggregator.reduce)
    expected = jax.tree.map(lambda leaf: jnp.asarray(formula(leaf)), VALUES)
    _close(reduce(VALUES, None, WEIGHTS), expected)
    chex.assert_trees_all_equal(reduce(spoil(VALUES), None, WEIGHTS), reduce(VALUES, None, WEIGHTS))
    order = jnp.array([4, 0, 6, 2, 1, 5, 3])
    shuffled = jax.tree.map(lambda leaf: leaf[order], VALUES)
    _close(reduce(shuffled, None, WEIGHTS[order]), expected)
    _close(reduce(VALUES, None, 3.0 * WEIGHTS), expected)  # weights above 0 do not matter


@pytest.mark.parametrize("name", sorted(TOGETHER))
def test_reducing_nobody_gives_zero(name):
    result = TOGETHER[name][0].reduce(spoil(VALUES), None, jnp.zeros_like(WEIGHTS))
    chex.assert_trees_all_equal(result, jax.tree.map(jnp.zeros_like, _row(VALUES, 0)))


@pytest.mark.parametrize("num_participating", range(1, NUM_CLIENTS + 1))
def test_the_median_is_right_for_odd_and_even_counts(num_participating):
    weights = (jnp.arange(NUM_CLIENTS) < num_participating).astype(jnp.float32)
    result = aggregators.median().reduce(VALUES["w"], None, weights)
    np.testing.assert_allclose(
        result, np.median(VALUES["w"][:num_participating], axis=0), rtol=1e-6
    )


@pytest.mark.parametrize("wrong", [1e30, jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.parametrize("name", sorted(TOGETHER))
def test_one_wrong_client_does_not_decide(name, wrong):
    values = VALUES["w"].at[0].set(wrong)
    result = TOGETHER[name][0].reduce(values, None, WEIGHTS)
    honest = np.asarray(VALUES["w"])[PRESENT][1:]
    assert np.all(result >= honest.min(axis=0))
    assert np.all(result <= honest.max(axis=0))


def test_trimming_counts_in_decimals():
    values = jnp.arange(100.0) ** 2  # 29 of 100 at either end, though 0.29 * 100 < 29 in floats
    result = aggregators.trimmed_mean(fraction=0.29).reduce(values, None, jnp.ones(100))
    np.testing.assert_allclose(result, np.mean(values[29:71]), rtol=1e-6)


def test_trimming_nothing_is_the_plain_mean():
    result = aggregators.trimmed_mean(fraction=0.0).reduce(VALUES["w"], None, WEIGHTS)
    np.testing.assert_allclose(result, np.mean(VALUES["w"][PRESENT], axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fraction", [-0.1, 0.5, float("nan")])
def test_a_fraction_that_makes_no_sense_is_refused(fraction):
    with pytest.raises(ValueError, match=rf"\[0, 0.5\), got {fraction}"):
        aggregators.trimmed_mean(fraction=fraction)


def test_a_holder_mean_without_masks_is_refused():
    aggregator, value = aggregators.holder_mean(), _row(VALUES, 0)
    with pytest.raises(ValueError, match="carry no personal masks"):
        jax.eval_shape(aggregator.add, aggregator.init(value), value, None, jnp.float32(1.0))


@pytest.mark.parametrize("name", ["weighted_mean", "holder_mean"])
def test_means_of_integers_are_refused_by_name(name):
    with pytest.raises(ValueError, match=r"aggregators\.\w+ averages .* 'steps' is int32"):
        MONOIDS[name][0].init({"steps": jnp.int32(1), "w": jnp.float32(1.0)})
    with pytest.raises(ValueError, match=r"'steps' is int32"):
        jax.eval_shape(
            TOGETHER["median"][0].reduce, {"steps": jnp.zeros(7, jnp.int32)}, None, WEIGHTS
        )


def test_votes_that_are_not_bool_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'w' is float32"):
        aggregators.vote_counts().init({"w": jnp.ones(3)})


@pytest.mark.parametrize("name", ["weighted_mean", "holder_mean", "vote_counts", "unweighted_sum"])
def test_a_field_without_leaves_is_fine(name):
    aggregator = getattr(aggregators, name)()
    accumulator = aggregator.add(aggregator.init({}), {}, {}, jnp.float32(1.0))
    assert aggregator.finish(accumulator) == {}
