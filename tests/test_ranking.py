import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import topk

SPECIAL = [0.0, -0.0, np.nan, np.inf, -np.inf, 1.0, -1.0, 0.5, 2.0, 1e-40, -1e-40, 3e38, -3e38]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.int8, jnp.uint8, jnp.uint32]


def reference(values, k):
    """Stable sort, descending; NaN counts as -inf."""
    values = np.asarray(values).astype(np.float64).ravel()
    values = np.where(np.isnan(values), -np.inf, values)
    kept = np.zeros(values.size, np.bool_)
    kept[np.argsort(-values, kind="stable")[: max(k, 0)]] = True
    return kept


def draw(seed, size):
    """Draw values with many ties in one of three ways."""
    rng = np.random.default_rng(seed)
    if seed % 3 == 0:
        return rng.standard_normal(size).astype(np.float32)
    if seed % 3 == 1:
        return rng.choice(np.array(SPECIAL, np.float32), size)
    return rng.integers(-2, 3, size).astype(np.float32)


TOP_K = jax.jit(topk.top_k)
TREE_TOP_K = jax.jit(topk.tree_top_k)


@pytest.mark.parametrize("seed", range(6))
def test_top_k_is_a_stable_sort(seed):
    values = draw(seed, 35)
    for k in range(-1, 38):
        kept = TOP_K(jnp.asarray(values).reshape(5, 7), jnp.int32(k))
        assert kept.dtype == jnp.bool_
        np.testing.assert_array_equal(np.asarray(kept).ravel(), reference(values, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_ranks_any_narrow_dtype(dtype):
    rng = np.random.default_rng(0)
    values = jnp.asarray(
        rng.integers(0, 100, 64) - (0 if jnp.issubdtype(dtype, jnp.unsignedinteger) else 50)
    ).astype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        values = values.at[3].set(jnp.iinfo(dtype).max).at[5].set(jnp.iinfo(dtype).min)
    for k in (0, 1, 20, 63, 64, 70):
        np.testing.assert_array_equal(TOP_K(values, jnp.int32(k)), reference(values, k))


def test_top_k_keeps_the_largest_integer_there_is_only_if_asked():
    values = jnp.full((4,), jnp.iinfo(jnp.int32).max)
    assert int(jnp.sum(TOP_K(values, jnp.int32(0)))) == 0
    assert TOP_K(values, jnp.int32(2)).tolist() == [True, True, False, False]


@pytest.mark.parametrize("seed", range(6))
def test_tree_top_k_ranks_all_leaves_as_one_pool_in_tree_order(seed):
    values = draw(seed, 60)
    tree = {
        "b": jnp.asarray(values[20:44]).reshape(2, 3, 4),
        "a": [jnp.asarray(values[:20]), None, jnp.zeros((0, 3))],
        "c": jnp.asarray(values[44:]).reshape(16, 1),
        "scalar": None,
    }
    for k in (-1, 0, 1, 7, 30, 59, 60, 61):
        kept = TREE_TOP_K(tree, jnp.int32(k))
        chex.assert_trees_all_equal_shapes(kept, tree)
        flat = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(kept)])
        np.testing.assert_array_equal(flat, reference(values, k))


def test_top_k_maps_over_scores_and_counts():
    values = jnp.stack([jnp.asarray(draw(seed, 30)) for seed in range(6)])
    counts = jnp.array([0, 5, 11, 29, 30, 17], jnp.int32)
    kept = jax.jit(jax.vmap(topk.top_k))(values, counts)
    for row, k, mask in zip(values, counts.tolist(), kept, strict=True):
        np.testing.assert_array_equal(mask, reference(row, k))
    by_count = jax.vmap(topk.top_k, in_axes=(None, 0))(values[0], counts)
    assert jnp.sum(by_count, axis=1, dtype=jnp.int32).tolist() == counts.tolist()


def test_top_k_of_many_equal_entries_keeps_the_first():
    kept = TOP_K(jnp.zeros((100_003,)), jnp.int32(77_777))
    np.testing.assert_array_equal(kept, np.arange(100_003) < 77_777)


def test_top_k_counts_exactly_where_float32_cannot():
    size = (1 << 24) + 3
    values = jax.lax.iota(jnp.int32, size)
    assert int(jnp.sum(TOP_K(values, jnp.int32(size - 1)), dtype=jnp.int32)) == size - 1


def test_top_k_is_traced_once_for_all_k():
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(topk.top_k, n=1))
    for k in range(5):
        traced(jnp.arange(9.0), jnp.int32(k))


def test_nothing_is_kept_of_nothing():
    assert topk.tree_top_k({}, jnp.int32(3)) == {}
    chex.assert_shape(topk.top_k(jnp.zeros((0, 2)), jnp.int32(3)), (0, 2))


def test_scores_without_a_common_order_are_refused():
    with pytest.raises(ValueError, match=r"float32, int32"):
        topk.tree_top_k([jnp.ones(2), jnp.ones(2, jnp.int32)], jnp.int32(1))
    with pytest.raises(ValueError, match="complex64"):
        topk.top_k(jnp.ones(2, jnp.complex64), jnp.int32(1))
