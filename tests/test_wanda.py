"""Wanda: scores by norms of inputs, the best of each output, and what clients send of it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedjaxprune import masks
from fedjaxprune.costs import ledger
from fedjaxprune.federated import input_squares
from fedjaxprune.method import Needs
from fedjaxprune.methods import wanda
from fedjaxprune.pruning import scores, selection
from fedjaxprune.rounds.protocol import broadcast_of
from fedjaxprune.structure import moments
from fedjaxprune.structure.moments.products import Use
from fedjaxprune.testing import scenario
from fedjaxprune.types import Batch, PrunerInputs, client_data
from tests import draws, quadratic
from tests.playing import setup

KEY = jax.random.key(5)
PEOPLE = quadratic.population()
DENSE = {"kernel": Use((1,), (), 1)}
# The specification's layer: three rows of four inputs, two outputs.
X = ((0.1, 2.0, 1.0, 3.0), (0.2, -1.0, 0.5, 1.0), (0.1, 2.0, -1.0, 2.0))
W = ((0.9, 0.5), (-0.3, 0.1), (0.4, -0.6), (0.2, 0.3))


def worth(kernel, squares):
    params = {"kernel": jnp.asarray(kernel, jnp.float32)}
    seen = input_squares.spread({"kernel": squares}, params, DENSE)
    inputs = PrunerInputs(params, None, jnp.int32(0), statistics={"squares": seen})
    return scores.input_norm("squares")(KEY, inputs)["kernel"]


def kept(values, sparsity=0.5):
    full = {"kernel": jnp.ones(values.shape, bool)}
    mask = wanda.best_of_outputs({"kernel": values}, full, DENSE, sparsity)["kernel"]
    return [set(np.flatnonzero(~np.asarray(column)).tolist()) for column in mask.T]


def test_a_layer_has_the_scores_of_the_specification():
    squares = jnp.sum(jnp.square(jnp.asarray(X)), axis=0)[:, None]
    np.testing.assert_allclose(squares[:, 0], (0.06, 9, 2.25, 14), rtol=1e-6)
    np.testing.assert_allclose(jnp.sqrt(squares[:, 0]), (0.244949, 3, 1.5, 3.741657), rtol=2e-6)
    wanted = ((0.220454, 0.122474), (0.9, 0.3), (0.6, 0.9), (0.748331, 1.122497))
    found = worth(W, squares)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=6e-7)  # six digits
    assert kept(found) == [{0, 2}, {0, 1}]
    assert kept(jnp.abs(jnp.asarray(W))) == [{1, 3}, {1, 3}]
    pool = selection.top_k(found, jnp.int32(4))
    assert np.flatnonzero(~np.asarray(pool).ravel()).tolist() == [0, 1, 3, 4]


def test_scores_do_not_know_the_scale_of_an_input_and_a_constant_one_leaves_magnitude():
    squares = jnp.asarray([[0.06], [9], [2.25], [14]])
    rows = jnp.asarray([[4.0], [1], [0.5], [8]])
    chex.assert_trees_all_close(
        worth(jnp.asarray(W) / rows, squares * rows**2), worth(W, squares), rtol=1e-6
    )
    assert kept(worth(W, jnp.full((4, 1), 3.0))) == kept(jnp.abs(jnp.asarray(W)))
    dead = worth(W, squares.at[3].set(0.0))
    assert all(3 in out for out in kept(dead, 0.25))


def test_outputs_keep_alike_many_and_ties_the_lower_index():
    values = jnp.asarray([[1.0, 5, 0], [1, 4, 0], [1, 6, -1], [1, 7, 3]])
    by_floor = selection.per_output(sparsity=0.3)(values, jnp.int32(0))
    assert by_floor.sum(axis=0).tolist() == [3, 3, 3]  # 4 less floor(1.2)
    assert by_floor.T.tolist()[0] == [True, True, True, False]
    many = selection.per_output(sparsity=0.29)(jnp.arange(100.0)[:, None], jnp.int32(0))
    assert many.sum() == 71  # though 0.29 * 100 is a hair below 29
    shared = selection.per_output()(values, jnp.int32(7))
    assert shared.sum(axis=0).tolist() == [3, 2, 2]
    across = selection.per_output(axis=0)(values.T, jnp.int32(7))
    np.testing.assert_array_equal(across, shared.T)
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\), got 1.0"):
        selection.per_output(sparsity=1.0)
    with pytest.raises(ValueError, match="per_output works along axis 2"):
        selection.per_output(axis=2)(values, jnp.int32(7))


# ---- what enters layers


def conv(x, kernel, strides=(1, 1), groups=1):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, strides, "VALID", dimension_numbers=layout, feature_group_count=groups
    )


def network(params, inputs):
    """Convolve twice, once in two groups, then multiply: outputs first and outputs last."""
    x = jax.nn.relu(conv(inputs, params["first"]["kernel"], (2, 2)))
    x = jnp.tanh(conv(x, params["groups"]["kernel"], groups=2)).mean(axis=(1, 2))
    x = jnp.tanh(lax.dot_general(x, params["outer"]["weight"], (((1,), (1,)), ((), ()))))
    return x @ params["last"]["kernel"]


SHAPES = {"first": (2, 2, 2, 4), "groups": (2, 2, 2, 6), "outer": (5, 6), "last": (5, 3)}
PARAMS = {
    name: {("weight" if name == "outer" else "kernel"): draws.normal(i, *shape)}
    for i, (name, shape) in enumerate(SHAPES.items())
}
NETWORK = quadratic.MODEL._replace(predict=lambda p, s, x: network(p, x))


def of_network(params, inputs, weights):
    batch = Batch(inputs, weights, weights)
    loss = input_squares.of_network(NETWORK)
    uses = moments.uses(loss, prunable=masks.is_kernel)(params, {}, batch, KEY)
    look = moments.of_loss(loss, prunable=masks.is_kernel, kinds=("channels",))
    found = jax.jit(look)(params, {}, batch, KEY)[2].channels
    return uses, found


def test_inputs_have_one_number_each_over_all_places_and_examples():
    inputs = draws.normal(0, 4, 7, 6, 2)
    weights = jnp.asarray([1.0, 1, 0, 1])
    uses, found = of_network(PARAMS, inputs, weights)
    assert uses == {
        "first/kernel": Use((3,), (0, 1), 1),
        "groups/kernel": Use((3,), (0, 1), 2),
        "outer/weight": Use((0,), (), 1),
        "last/kernel": Use((1,), (), 1),
    }
    small = input_squares.compact(found, uses)
    shapes = {name: next(iter(tree.values())).shape for name, tree in small.items()}
    assert shapes == {
        "first": (1, 1, 2, 1),
        "groups": (1, 1, 2, 2),
        "outer": (1, 6),
        "last": (5, 1),
    }
    chex.assert_trees_all_equal(input_squares.spread(small, PARAMS, uses), found)
    here = inputs[np.flatnonzero(weights)]
    hidden = jax.nn.relu(conv(here, PARAMS["first"]["kernel"], (2, 2)))
    np.testing.assert_allclose(
        small["first"]["kernel"].ravel(), np.square(here).sum((0, 1, 2)), rtol=1e-6
    )
    by_group = np.square(hidden).sum((0, 1, 2)).reshape(2, 2)  # group, channel in it
    np.testing.assert_allclose(small["groups"]["kernel"][0, 0], by_group.T, rtol=1e-6)


def test_a_kernel_of_which_it_is_not_clear_what_an_output_is_is_refused():
    batch = Batch(jnp.ones((2, 3)), jnp.ones(2), jnp.ones(2))

    def uses(use):
        def loss(params, state, batch, key):
            return jnp.sum(use(batch.inputs, params["w"])), (state, {})

        find = moments.uses(loss, prunable=lambda path, leaf: True)
        return find({"w": jnp.ones((3, 3))}, {}, batch, KEY)

    with pytest.raises(ValueError, match="'w' make one output, as it is moved or cut"):
        uses(lambda x, w: x @ w.T)
    with pytest.raises(ValueError, match="products use 'w' in several ways"):
        uses(lambda x, w: lax.dot_general(x @ w, w, (((1,), (1,)), ((), ()))))
    with pytest.raises(ValueError, match="as it is not used in a product"):
        uses(lambda x, w: x)
    assert uses(lambda x, w: (x @ w) @ w) == {"w": Use((1,), (), 1)}


# ---- rounds

MODEL = scenario.network(Needs(products=True))


@functools.cache
def built(**options):
    settings = wanda.Wanda(**{"sparsity": 0.5, "dense_rounds": 1, **options})
    return wanda.build(settings, quadratic.task(setup(), model=MODEL))


def test_clients_send_one_number_for_each_input_whose_sum_does_not_know_the_split():
    algorithm = built()
    assert [stage.name for stage in algorithm.stages] == ["start", "score", "settle", "train"]
    state = algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})
    members = quadratic.cohort(algorithm, range(6))
    after, _, metrics = jax.jit(algorithm.stages[1].round)(KEY, state, members, PEOPLE)
    assert masks.num_kept(after.masks).tolist() == [4, 12, 2, 4]
    traffic = ledger.account(jax.device_get(metrics), state, algorithm)
    assert traffic.uplink.values == 32 * (6 + 4) * 6
    # All rows of a kernel meet the same inputs here but for their scale.
    sizes = np.abs(np.asarray(quadratic.PARAMS["dense"]["kernel"])) * 0.5 ** np.arange(6)[:, None]
    wanted = np.argsort(np.argsort(-sizes, axis=0, kind="stable"), axis=0) < 3
    np.testing.assert_array_equal(after.masks["dense"]["kernel"], wanted)
    uses = {"dense/kernel": Use((1,), (), 1), "head/kernel": Use((1,), (), 1)}
    client = input_squares.report(
        MODEL, batcher=quadratic.full_batches(1), uses=uses, name="squares"
    )
    broadcast, update = broadcast_of(state), jax.jit(client.update)
    sums = [
        update(KEY, broadcast, (), client_data(PEOPLE, jnp.int32(i)))[0].fields["squares"]
        for i in range(6)
    ]
    total = jax.tree.map(lambda *parts: sum(parts), *sums)
    np.testing.assert_allclose(total["dense"]["kernel"][:, 0], 28 * 0.25 ** np.arange(6), rtol=1e-6)


def test_there_are_as_many_exchanges_as_blocks_and_no_more_than_layers():
    names = [stage.name for stage in built(blocks=2).stages]
    assert names == ["start", "score_1", "score_2", "settle", "train"]
    with pytest.raises(ValueError, match=r"method\.blocks must be at most .* \(2\), got 3"):
        built(blocks=3)


@pytest.mark.slow
def test_blocks_are_scored_one_after_the_other_with_inputs_from_pruned_ones():
    algorithm = built(dense_rounds=0, blocks=2)
    state = algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})
    members = quadratic.cohort(algorithm, range(6))
    seen = []
    for stage in algorithm.stages[:2]:
        after, rows, metrics = jax.jit(stage.round)(KEY, state, members, PEOPLE)
        charged = ledger.account(jax.device_get(metrics), state, algorithm)
        seen.append((masks.num_kept(after.masks).tolist(), charged.uplink.values // (32 * 6)))
        values = charged.downlink.values // (32 * 6)
        assert values == masks.num_kept(state.masks).sum()
        state, members = after, members._replace(states=rows)
    assert seen == [([4, 12, 2, 8], 6), ([4, 12, 2, 4], 4)]


def test_where_nobody_answers_the_largest_weights_of_each_output_are_kept():
    algorithm = built()
    state = algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})
    members = quadratic.cohort(algorithm, range(6))
    after, _, _ = jax.jit(algorithm.stages[2].round)(KEY, state, members, PEOPLE)
    sizes = np.abs(np.asarray(quadratic.PARAMS["dense"]["kernel"]))
    wanted = np.argsort(np.argsort(-sizes, axis=0, kind="stable"), axis=0) < 3
    np.testing.assert_array_equal(after.masks["dense"]["kernel"], wanted)
    again, _, _ = jax.jit(algorithm.stages[2].round)(KEY, after, members, PEOPLE)
    chex.assert_trees_all_equal(again.masks, after.masks)
