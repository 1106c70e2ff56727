import chex
import jax
import jax.numpy as jnp
import pytest

from fedjaxprune import trees

TREE = {"b": [jnp.arange(6.0).reshape(2, 3), None], "a": {"kernel": jnp.arange(2)}}


def test_paths_and_sizes_follow_the_order_of_the_leaves():
    assert trees.paths(TREE) == ["a/kernel", "b/0"]
    assert trees.sizes(TREE) == [2, 6]


def test_map_with_path_gives_each_leaf_its_path():
    named = trees.map_with_path(
        lambda path, leaf, other: f"{path}:{leaf.size + other.size}", TREE, TREE
    )
    assert named == {"b": ["b/0:12", None], "a": {"kernel": "a/kernel:4"}}


@pytest.mark.parametrize("condition", [True, False])
def test_select_takes_one_of_two_trees(condition):
    other = jax.tree.map(lambda leaf: -leaf - 1, TREE)
    chosen = jax.jit(trees.tree_where)(jnp.bool_(condition), TREE, other)
    chex.assert_trees_all_equal(chosen, TREE if condition else other)


def test_all_finite_finds_one_bad_value_among_floats():
    assert bool(jax.jit(trees.all_finite)(TREE))
    assert bool(trees.all_finite({}))
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        tree = {**TREE, "c": jnp.array([0.0, bad], jnp.bfloat16)}
        assert not bool(trees.all_finite(tree))


def test_take_takes_rows_of_every_leaf():
    rows = jnp.array([1, 1, 0])
    taken = trees.take_rows(TREE, rows)
    assert taken["b"][0].tolist() == [[3, 4, 5], [3, 4, 5], [0, 1, 2]]
    assert taken["a"]["kernel"].tolist() == [1, 1, 0]
