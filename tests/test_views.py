"""Views of the weights inside a round: the specification's vectors, periods, what may move."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, metrics
from fedjaxprune.federated import local_training
from fedjaxprune.pruning import views
from fedjaxprune.types import Broadcast, Sight, client_data
from tests import quadratic

KEY = jax.random.key(0)
PEOPLE = quadratic.population()
# One layer of four weights, of which two are seen.
START, TARGET = [0.1, 0.4, -0.3, 0.05], [1.0, 1.0, -1.0, 0.5]
FIRST = [False, True, True, False]  # the largest of the start


def tree(values, dtype=jnp.float32):
    """Make one kernel ``[n, 1]`` of a list."""
    return {"layer": {"kernel": jnp.asarray(values, dtype)[:, None]}}


def flat(params):
    return np.asarray(params["layer"]["kernel"])[:, 0]


def squares(params, state, batch, key):
    """Take half the squared distance from TARGET as the loss."""
    del batch, key
    gap = params["layer"]["kernel"][:, 0] - jnp.asarray(TARGET)
    loss = 0.5 * jnp.sum(jnp.square(gap), dtype=jnp.float32)
    return loss, (state, {"loss": metrics.Mean(total=loss, weight=jnp.float32(1.0))})


def slope(grads):
    """Make a loss whose gradient is `grads` everywhere."""

    def loss_fn(params, state, batch, key):
        del batch, key
        loss = jnp.sum(params["layer"]["kernel"][:, 0] * jnp.asarray(grads), dtype=jnp.float32)
        return loss, (state, {"loss": metrics.Mean(total=loss, weight=jnp.float32(1.0))})

    return loss_fn


@functools.cache
def runner(view, loss, optimizer):
    """Compile local work whose number of steps is given, for all tests that share it."""
    batcher = quadratic.full_batches(1)._replace(num_steps=lambda data: data.size)
    client = local_training.viewed_sgd(loss, batcher=batcher, optimizer=optimizer, view=view)

    @jax.jit
    def run(params, masks, num_steps):
        data = client_data(PEOPLE, jnp.int32(0))._replace(size=num_steps)
        broadcast = Broadcast(params, masks, {}, jnp.int32(0))
        message, _ = client.update(KEY, broadcast, (), data)
        return message.fields["delta"]

    return run


SGD = optax.sgd(0.25)


def walk(view, start, seen, num_steps, *, loss=squares, optimizer=SGD):
    """Give the weights after so many steps."""
    given = tree(start), tree(seen, bool), jnp.int32(num_steps)
    return np.asarray(start, np.float32) + flat(runner(view, loss, optimizer)(*given))


def by_hand(num_steps, period):
    """Follow the rule as it is published, in a loop: masks anew where (t + 1) % period is 0."""
    weights, seen = np.array(START), np.array(FIRST)
    for step in range(num_steps):
        if period is not None and (step + 1) % period == 0:
            order = np.argsort(-np.abs(weights), kind="stable")
            seen = np.isin(np.arange(4), order[:2])
        weights = weights - 0.25 * (np.where(seen, weights, 0.0) - np.array(TARGET))
    return weights, seen


LARGEST = {period: views.largest(period=period) for period in (1, 3, None)}


def test_dynamic_pruning_follows_the_vectors():
    seen, update = [], jax.jit(LARGEST[1].update)
    for num_steps in range(4):
        params = tree(walk(LARGEST[1], START, FIRST, num_steps))
        broadcast = Broadcast(params, tree(FIRST, bool), {}, jnp.int32(0))
        seen.append("".join(str(int(bit)) for bit in flat(update(params, broadcast).seen)))
    assert seen == ["0110", "0110", "0110", "1100"]
    third, fourth = (walk(LARGEST[1], START, FIRST, n) for n in (3, 4))
    np.testing.assert_allclose(third, [0.85, 0.746875, -0.704688, 0.425], rtol=1e-6)
    np.testing.assert_allclose(fourth, [0.8875, 0.810156, -0.954688, 0.55], atol=5e-7)


def test_a_static_mask_is_training_under_it():
    client = local_training.local_sgd(
        squares,
        batcher=quadratic.full_batches(4),
        optimizer=SGD,
    )
    start, seen = tree(START), tree(FIRST, bool)
    broadcast = Broadcast(start, seen, {}, jnp.int32(0))
    message, _ = jax.jit(client.update)(KEY, broadcast, (), client_data(PEOPLE, jnp.int32(0)))
    end = flat(masks.apply(seen, start)) + flat(message.fields["delta"])
    np.testing.assert_allclose(end, [0, 0.810156, -0.778516, 0], atol=5e-7)


@pytest.mark.parametrize("period", list(LARGEST))
def test_masks_are_computed_where_the_period_says(period):
    for num_steps in (0, 1, 2, 3, 5, 6, 8):
        expected, _ = by_hand(num_steps, period)
        found = walk(LARGEST[period], START, FIRST, num_steps)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.allclose(by_hand(8, 1)[0], by_hand(8, None)[0], atol=1e-2)


def test_a_view_that_never_changes_is_dense_feedback_to_the_bit():
    options = {"batcher": quadratic.full_batches(3), "optimizer": optax.sgd(0.1, momentum=0.9)}
    plain = local_training.dense_feedback_sgd(quadratic.MODEL.loss, **options)
    viewed = local_training.viewed_sgd(quadratic.MODEL.loss, view=LARGEST[None], **options)
    half = jax.tree.map(lambda leaf: leaf > 0, quadratic.PARAMS)
    broadcast = Broadcast(quadratic.PARAMS, half, {"steps": jnp.float32(0.0)}, jnp.int32(0))
    data = client_data(PEOPLE, jnp.int32(1))
    one, two = (jax.jit(c.update)(KEY, broadcast, (), data)[0] for c in (plain, viewed))
    chex.assert_trees_all_equal(one, two)


GROUPS = [0.5, -0.1, 0.2, -0.4, 0.3, 0.3, -0.3, 0.05]
SLOPE = (0.1, -0.2, 0.3, -0.4, 0.5, 0.6, 0.7, -0.8)
N_OF_M = views.best_of_groups(n=2, m=4, decay=2e-4)


def test_unseen_weights_of_a_group_decay_as_in_the_vectors():
    broadcast = Broadcast(tree(GROUPS), tree([True] * 8, bool), {}, jnp.int32(0))
    sight = N_OF_M.update(broadcast.params, broadcast)
    assert flat(sight.seen).astype(int).tolist() == [1, 0, 0, 1, 1, 1, 0, 0]
    assert N_OF_M.penalty is not None
    pull = flat(jax.grad(N_OF_M.penalty)(broadcast.params, sight))
    effective = np.array(SLOPE) + pull
    wanted = [0.1, -0.20002, 0.30004, -0.4, 0.5, 0.6, 0.69994, -0.79999]
    np.testing.assert_allclose(effective, wanted, atol=1e-7)
    end = walk(N_OF_M, GROUPS, [True] * 8, 1, loss=slope(SLOPE), optimizer=optax.sgd(0.1))
    wanted = [0.49, -0.079998, 0.169996, -0.36, 0.25, 0.24, -0.369994, 0.129999]
    np.testing.assert_allclose(end, wanted, atol=1e-6)


def test_unseen_weights_without_a_gradient_shrink_by_the_decay():
    end = walk(N_OF_M, GROUPS, [True] * 8, 1, loss=slope((0.0,) * 8), optimizer=optax.sgd(0.1))
    shrunk = np.where([1, 0, 0, 1, 1, 1, 0, 0], 1.0, 1.0 - 0.1 * 2e-4) * np.array(GROUPS)
    np.testing.assert_allclose(end, shrunk, rtol=1e-6)
    assert (np.abs(end[[1, 2, 6, 7]]) < np.abs(np.array(GROUPS, np.float32))[[1, 2, 6, 7]]).all()


TEN = [0.9, -0.05, 0.4, 0.2, -0.7, 0.1, 0.03, -0.3, 0.6, 0.02]
LIVE = [True] * 10
EXPLORING = views.two_sets(sparsity=0.8, backward_sparsity=0.5, coefficient=1.0)


def sight_of(view, values, live, index=0):
    broadcast = Broadcast(tree(values), tree(live, bool), {}, jnp.int32(index))
    return jax.jit(view.update)(broadcast.params, broadcast)


def test_the_two_sets_and_their_penalty_are_those_of_the_vectors():
    sight = sight_of(EXPLORING, TEN, LIVE)
    assert np.flatnonzero(flat(sight.seen)).tolist() == [0, 4]
    assert np.flatnonzero(flat(sight.may_move)).tolist() == [0, 2, 4, 7, 8]
    assert EXPLORING.penalty is not None
    value, grads = jax.value_and_grad(EXPLORING.penalty)(tree(TEN), sight)
    np.testing.assert_allclose(value, 0.65 + 1.525, rtol=1e-6)
    np.testing.assert_allclose(flat(grads), [0.9, 0, 2, 0, -0.7, 0, 0, -1.5, 3, 0], rtol=1e-6)


def test_nothing_moves_outside_the_larger_set():
    """Not even by momentum and weight decay."""
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.01, momentum=0.9))
    end = walk(EXPLORING, TEN, LIVE, 3, loss=slope((0.5,) * 10), optimizer=optimizer)
    moved = np.flatnonzero(end != np.array(TEN, np.float32))
    assert moved.tolist() == [0, 2, 4, 7, 8]


def test_a_weight_outside_comes_in_as_others_shrink():
    view = views.two_sets(sparsity=0.9, backward_sparsity=0.8)
    end = walk(view, TEN, LIVE, 3, loss=slope((0.0,) * 4 + (-0.9,) + (0.0,) * 5))
    # The second largest, -0.7, shrinks below 0.6 in the first step, and stays there.
    np.testing.assert_allclose(end[4], -0.475, rtol=1e-6)
    assert np.flatnonzero(flat(sight_of(view, end, LIVE).may_move)).tolist() == [0, 8]


def test_sets_are_chosen_among_the_live_weights():
    live = [index in (2, 3, 5) for index in range(10)]
    sight = sight_of(EXPLORING, TEN, live)
    assert np.flatnonzero(flat(sight.seen)).tolist() == [2, 3]
    assert np.flatnonzero(flat(sight.may_move)).tolist() == [2, 3, 5]


def test_exploration_ends_in_the_round_that_is_said():
    view = views.two_sets(
        sparsity=0.8, backward_sparsity=0.5, explores=lambda round_index: round_index < 4
    )
    counts = [int(flat(sight_of(view, TEN, LIVE, index).may_move).sum()) for index in (3, 4)]
    assert counts == [5, 2]


@pytest.mark.parametrize(
    "view",
    [
        views.largest(),
        views.best_of_groups(n=2, m=2, decay=0.1),
        views.two_sets(sparsity=0.0, backward_sparsity=0.0),
    ],
    ids=["largest", "best_of_groups", "two_sets"],
)
def test_where_all_is_seen_it_is_plain_training_to_the_bit(view):
    options = {"batcher": quadratic.full_batches(3), "optimizer": optax.sgd(0.1, momentum=0.9)}
    plain = local_training.local_sgd(quadratic.MODEL.loss, **options)
    viewed = local_training.viewed_sgd(quadratic.MODEL.loss, view=view, **options)
    params = quadratic.PARAMS
    broadcast = Broadcast(params, masks.full(params), {"steps": jnp.float32(0.0)}, jnp.int32(0))
    data = client_data(PEOPLE, jnp.int32(1))
    one, two = (jax.jit(c.update)(KEY, broadcast, (), data)[0] for c in (plain, viewed))
    chex.assert_trees_all_equal(one, two)


def test_a_single_step_from_masked_weights_is_training_under_the_broadcast_masks():
    start = [0.0, 0.4, -0.3, 0.0]
    one, two = (walk(LARGEST[period], start, FIRST, 1) for period in (1, None))
    np.testing.assert_array_equal(one, two)


def test_where_all_is_seen_the_penalties_are_decay_of_all_weights_or_none():
    live = tree([True] * 10, bool)
    of_all = views.two_sets(sparsity=0.0, backward_sparsity=0.0, coefficient=1.0).penalty
    of_none = views.best_of_groups(n=2, m=2, decay=0.5).penalty
    assert of_all is not None
    assert of_none is not None
    sight = Sight(live, live)
    np.testing.assert_allclose(of_all(tree(TEN), sight), 0.5 * np.square(TEN).sum(), rtol=1e-6)
    assert of_none(tree(TEN), sight) == 0.0


def test_unseen_weights_have_a_gradient():
    seen = [True, False, False, False]
    start = [0.1, 0.0, 0.0, 0.0]
    assert np.all(walk(LARGEST[None], start, seen, 1)[1:] != 0.0)


def test_leaves_that_are_not_prunable_are_seen_and_move():
    params = quadratic.PARAMS
    half = masks.restrict(jax.tree.map(lambda leaf: leaf > 0, params), masks.is_kernel)
    broadcast = Broadcast(params, half, {}, jnp.int32(0))
    views_of_all = [
        views.largest(),
        views.best_of_groups(n=1, m=2, decay=0.0),
        views.two_sets(sparsity=0.5, backward_sparsity=0.25),
    ]
    for view in views_of_all:
        sight = jax.jit(view.update)(params, broadcast)
        trees = [sight.seen] if sight.may_move is None else list(sight)
        for each in trees:
            chex.assert_trees_all_equal_structs(each, params)
            assert np.all(each["dense"]["bias"])
            assert np.all(each["head"]["bias"])


def test_an_optimizer_that_asks_for_the_loss_sees_the_views_penalty():
    view = views.best_of_groups(n=1, m=2, decay=0.5)

    def update_fn(grads, state, params=None, *, value, value_fn, **rest):
        del grads, rest
        gap = value_fn(params) - value  # of the same loss at the same place: zero
        return jax.tree.map(lambda slope: slope + gap, jax.grad(value_fn)(params)), state

    asked: Any = update_fn
    asking = optax.GradientTransformationExtraArgs(lambda params: (), asked)
    moved = walk(view, START, FIRST, 1, optimizer=asking) - np.array(START)
    # 0.4 and -0.3 are seen, the others decay.
    np.testing.assert_allclose(moved, [0.05, -0.6, 0.7, 0.025], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: views.best_of_groups(n=2, m=4, decay=-1.0), "decay must not be negative, got -1"),
        (lambda: views.best_of_groups(n=5, m=4, decay=0.0), "n and m must satisfy"),
        (
            lambda: views.two_sets(sparsity=0.5, backward_sparsity=0.6),
            r"backward_sparsity must lie in \[0, sparsity\].* got 0.6 and 0.5",
        ),
        (
            lambda: views.two_sets(sparsity=0.5, backward_sparsity=0.1, coefficient=-1.0),
            "coefficient must not be negative",
        ),
        (
            lambda: walk(views.largest(period=0), START, FIRST, 1),
            "period of a view must be at least 1 step or None, got 0",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
