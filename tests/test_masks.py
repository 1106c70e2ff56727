import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import masks
from tests import draws

PARAMS = {
    "conv": {"kernel": jnp.ones((3, 3, 2, 5)), "bias": jnp.ones(5)},
    "norm": {"scale": jnp.ones(5)},
    "dense": {"kernel": jnp.ones((7, 3), jnp.bfloat16)},
}


def draw(seed):
    leaves, structure = jax.tree.flatten(PARAMS)
    drawn = [
        draws.flags(10 * seed + i, *leaf.shape, probability=0.4) for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


FIRST, SECOND, FULL = draw(0), draw(1), masks.full(PARAMS)
NONE = jax.tree.map(jnp.zeros_like, FULL)


def flat(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def test_full_masks_are_total_and_boolean():
    assert jax.tree.structure(FULL) == jax.tree.structure(PARAMS)
    chex.assert_trees_all_equal_shapes(FULL, PARAMS)
    assert {leaf.dtype for leaf in jax.tree.leaves(FULL)} == {jnp.dtype(jnp.bool_)}
    assert flat(FULL).all()


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf, -0.0, 3.0])
def test_pruned_entries_are_exact_zeros_whatever_they_were(poison):
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, poison), PARAMS)
    applied = masks.apply(FIRST, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(applied, params)
    values, kept = flat(applied).astype(np.float32), flat(FIRST)
    assert (values[~kept] == 0).all()
    assert not np.signbit(values[~kept]).any()
    np.testing.assert_array_equal(values[kept], np.float32(poison))


def test_applying_masks_twice_is_applying_them_once():
    once = masks.apply(FIRST, PARAMS)
    chex.assert_trees_all_equal(masks.apply(FIRST, once), once)
    chex.assert_trees_all_equal(masks.apply(FULL, PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("a/kernel", (3, 4), True),
        ("kernel", (3, 3, 1, 4), True),
        ("layer/weight", (4, 3), True),
        ("layer/w", (4, 3), True),
        ("a/kernel", (3,), False),
        ("kernel/bias", (3, 4), False),
        ("a/scale", (3, 4), False),
        ("a/my_kernel", (3, 4), False),
    ],
)
def test_kernels_are_known_by_path_and_shape(path, shape, expected):
    assert masks.is_kernel(path, jnp.zeros(shape)) is expected


def test_restrict_switches_the_rest_back_on():
    restricted = masks.restrict(FIRST, masks.is_kernel)
    chex.assert_trees_all_equal(restricted["conv"]["kernel"], FIRST["conv"]["kernel"])
    chex.assert_trees_all_equal(restricted["dense"], FIRST["dense"])
    assert flat([restricted["conv"]["bias"], restricted["norm"]]).all()


def test_prunable_leaves_follow_the_order_of_the_tree():
    assert masks.prunable_leaves(PARAMS, masks.is_kernel) == [False, True, True, False]


def test_counts_are_those_of_numpy():
    assert masks.num_kept(FIRST).tolist() == [int(leaf.sum()) for leaf in jax.tree.leaves(FIRST)]
    assert masks.num_kept(FIRST).dtype == jnp.int32
    assert int(masks.num_changed(FIRST, SECOND)) == int((flat(FIRST) != flat(SECOND)).sum())
    assert int(masks.num_changed(FIRST, FIRST)) == 0


def test_sparsity_counts_prunable_weights_only():
    kernels = [FIRST["conv"]["kernel"], FIRST["dense"]["kernel"]]
    expected = 1 - flat(kernels).mean()
    assert float(
        jax.jit(masks.sparsity, static_argnums=1)(FIRST, masks.is_kernel)
    ) == pytest.approx(expected, abs=1e-6)
    assert float(masks.sparsity(FULL, masks.is_kernel)) == 0.0
    assert float(masks.sparsity(NONE, lambda path, leaf: False)) == 0.0


def test_packing_loses_nothing_and_costs_a_bit_per_weight():
    packed = jax.jit(masks.pack)(FIRST)
    for bits, leaf in zip(jax.tree.leaves(packed), jax.tree.leaves(FIRST), strict=True):
        assert bits.dtype == jnp.uint8
        assert bits.shape == (-(-leaf.size // 8),)
    chex.assert_trees_all_equal(jax.jit(masks.unpack)(packed, PARAMS), FIRST)
    np.testing.assert_array_equal(
        masks.pack(jnp.array([True, False, False, True, False, False, False, False, True])),
        [0b10010000, 0b10000000],
    )
