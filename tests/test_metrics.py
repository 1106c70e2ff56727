import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import metrics

VALUES = jnp.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0])
WEIGHTS = jnp.array([1.0, 0.0, 2.0, 1.0, 0.5, 3.0, 0.0, 1.0])


def test_the_value_is_the_weighted_mean():
    got = metrics.value(jax.jit(metrics.mean)(VALUES, WEIGHTS))
    assert float(got) == pytest.approx(np.average(VALUES, weights=WEIGHTS), rel=1e-6)


@pytest.mark.parametrize("cut", [0, 1, 5, 8])
def test_merging_parts_gives_the_whole(cut):
    parts = [metrics.mean(VALUES[:cut], WEIGHTS[:cut]), metrics.mean(VALUES[cut:], WEIGHTS[cut:])]
    whole = metrics.mean(VALUES, WEIGHTS)
    chex.assert_trees_all_close(metrics.merge(*parts), whole, rtol=1e-6)
    chex.assert_trees_all_equal(metrics.merge(*parts), metrics.merge(*reversed(parts)))


def test_zero_merges_without_a_trace():
    whole = metrics.mean(VALUES, WEIGHTS)
    chex.assert_trees_all_equal(metrics.merge(metrics.zero(), whole), whole)
    assert np.isnan(metrics.value(metrics.zero()))


def test_merging_is_associative_over_trees():
    parts = [{"loss": metrics.mean(VALUES[i::3], WEIGHTS[i::3])} for i in range(3)]
    left = metrics.merge(metrics.merge(parts[0], parts[1]), parts[2])
    right = metrics.merge(parts[0], metrics.merge(parts[1], parts[2]))
    chex.assert_trees_all_close(left, right, rtol=1e-6)


def test_a_value_of_no_weight_may_be_anything():
    poisoned = VALUES.at[1].set(jnp.nan).at[6].set(jnp.inf)
    chex.assert_trees_all_equal(metrics.mean(poisoned, WEIGHTS), metrics.mean(VALUES, WEIGHTS))


def test_a_mean_of_means_is_not_the_mean():
    many = metrics.Mean(total=jnp.float32(8.0), weight=jnp.float32(8.0))
    few = metrics.Mean(total=jnp.float32(0.0), weight=jnp.float32(2.0))
    assert float(metrics.value(metrics.merge(many, few))) == pytest.approx(0.8)
