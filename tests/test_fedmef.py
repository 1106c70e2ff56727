"""FedMef: the specification's vectors, and extrusion where and only where weights are exchanged."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, metrics, trees
from fedjaxprune.federated import extrusion, local_training, sparse_gradients, step_scales
from fedjaxprune.methods import fedmef
from fedjaxprune.pruning import drop_and_grow
from fedjaxprune.rounds import training
from fedjaxprune.rounds.protocol import FieldSpec
from fedjaxprune.types import Broadcast, client_data
from tests import quadratic
from tests.playing import PEOPLE, setup, simulate

KEY = jax.random.key(3)
DUE = (1, 3)  # indices of rounds of training that exchange weights
DECAY = optax.exponential_decay(1.0, 1, 0.5)


def make(protocol, **options):
    settings = {**fedmef.METHOD.law_settings, "allocation": "uniform", **options}
    return fedmef.build(fedmef.FedMef(**settings), quadratic.task(protocol))


def everybody(index):
    del index
    return list(range(6)), None


@functools.cache
def play(rate=0.1, **options):
    """Run the draw and all rounds with a rate that decays: the states from the draw on."""
    protocol = setup(learning_rate_scale=DECAY, optimizer=optax.sgd(rate))
    return simulate(make(protocol, **options), everybody)[0]


# ---- the vectors


@pytest.mark.parametrize(
    ("step", "budget"),
    [(0, 1.0), (5, 0.857142857), (10, 0.666666667), (15, 0.4), (19, 0.095238095)],
)
def test_the_budget_falls_with_the_steps(step, budget):
    rate = extrusion.extruding_rate(jnp.float32(50.0), jnp.int32(step), jnp.int32(20))
    np.testing.assert_allclose(rate, budget, rtol=1e-6)


@pytest.mark.parametrize(("norm", "part"), [(0.1, 0.049958375), (1, 0.462117157), (3, 0.905148254)])
def test_the_rate_grows_with_what_is_left_to_press_out(norm, part):
    rate = extrusion.extruding_rate(jnp.float32(norm), jnp.int32(0), jnp.int32(20))
    np.testing.assert_allclose(rate, part, rtol=1e-6)


def told(marks):
    """Make a broadcast in which a client has derived what is marked."""
    return Broadcast((), (), {}, jnp.int32(0), announced={extrusion.MARKED: [jnp.array(marks)]})


@pytest.mark.parametrize(
    ("step", "scheduled", "norm", "used"),
    [
        (0, 0.01, 1.0, 0.046212),
        (10, 0.01, 1.0, 0.030808),
        (19, 0.01, 1.0, 0.01),
        (10, 0.01, 0.05, 0.01),
        (0, 0.1, 3.0, 0.1),
    ],
)
def test_the_rate_is_held_up_as_in_the_table(step, scheduled, norm, used):
    first = 0.1
    scale = extrusion.held_up(lambda round_index: jnp.float32(scheduled / first))
    params = [jnp.array([norm, 7.0])]
    factor = scale.compute(params, told([True, False]), jnp.int32(step), jnp.int32(20))
    np.testing.assert_allclose(first * factor, used, atol=5e-7)


SIX = [0.5, -0.02, 0.03, -0.9, 0.01, 0.4]


def test_the_smallest_are_marked_and_penalized():
    params, live = [jnp.array(SIX)], [jnp.ones(6, bool)]
    (marks,) = extrusion.marked(params, live, [jnp.int32(3)])
    assert np.flatnonzero(marks).tolist() == [1, 2, 4]
    value, (grads,) = jax.value_and_grad(extrusion.penalty(0.01))(params, told(marks))
    np.testing.assert_allclose(value, 1.4e-5, rtol=1e-5)
    np.testing.assert_allclose(grads, [0, -0.0004, 0.0006, 0, 0.0002, 0], rtol=1e-5)
    rate = extrusion.held_up(lambda round_index: jnp.float32(0.0)).compute(
        params, told(marks), jnp.int32(0), jnp.int32(1)
    )
    np.testing.assert_allclose(rate, np.tanh(0.5 * 0.037416574), rtol=1e-6)


def test_only_live_weights_are_marked():
    live = [jnp.array([True, False, True, True, False, True])]
    (marks,) = extrusion.marked([jnp.array(SIX)], live, [jnp.int32(2)])
    assert np.flatnonzero(marks).tolist() == [2, 5]


def test_steps_with_the_penalty_alone_shrink_marked_weights():
    def flat_loss(params, state, batch, key):
        del batch, key
        loss = 0.0 * jnp.sum(params["kernel"], dtype=jnp.float32)
        return loss, (state, {"loss": metrics.Mean(total=loss, weight=jnp.float32(1.0))})

    client = local_training.local_sgd(
        flat_loss,
        batcher=quadratic.full_batches(4),
        optimizer=optax.sgd(0.1),
        penalties=(extrusion.penalty(0.5),),
    )
    marks = {"kernel": jnp.array([[False, True, True, False, True, False]])}
    client = step_scales.deriving(client, extrusion.MARKED, lambda broadcast: marks)
    params = {"kernel": jnp.array([SIX])}
    broadcast = Broadcast(params, masks.full(params), {}, jnp.int32(0))
    message, _ = jax.jit(client.update)(KEY, broadcast, (), client_data(PEOPLE, jnp.int32(0)))
    end = params["kernel"] + message.fields["delta"]["kernel"]
    shrunk = np.where(marks["kernel"], (1 - 2 * 0.5 * 0.1) ** 4, 1.0) * np.array([SIX])
    np.testing.assert_allclose(end, shrunk, rtol=1e-5)


def test_what_is_extruded_is_missed_less():
    """Others take over what correlated weights know: fewer is lost by dropping them."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(64, 2))
    features = jnp.asarray(common @ rng.normal(size=(2, 6)) + 0.1 * rng.normal(size=(64, 6)))
    wanted = features @ jnp.array([1.0, -1.0, 0.8, 0.3, -0.3, 0.2])

    def regression(params, state, batch, key):
        del batch, key
        loss = jnp.mean(jnp.square(features @ params["kernel"][:, 0] - wanted))
        return loss, (state, {"loss": metrics.Mean(total=loss, weight=jnp.float32(1.0))})

    marks = {"kernel": jnp.array([[False], [False], [False], [True], [True], [True]])}
    params = {"kernel": jnp.array([[1.0], [-1.0], [0.8], [0.3], [-0.3], [0.2]])}
    broadcast = Broadcast(params, masks.full(params), {}, jnp.int32(0))

    def after(coefficient):
        client = local_training.local_sgd(
            regression,
            batcher=quadratic.full_batches(200),
            optimizer=optax.sgd(0.02),
            penalties=(extrusion.penalty(coefficient),),
        )
        client = step_scales.deriving(client, extrusion.MARKED, lambda broadcast: marks)
        message, _ = jax.jit(client.update)(KEY, broadcast, (), client_data(PEOPLE, jnp.int32(0)))
        end = params["kernel"] + message.fields["delta"]["kernel"]
        dropped = {"kernel": jnp.where(marks["kernel"], 0.0, end)}
        norm = np.linalg.norm(end[np.asarray(marks["kernel"])])
        return norm, float(regression(dropped, {}, None, KEY)[0])

    (plain_norm, plain_loss), (norm, loss) = after(0.0), after(3.0)
    assert norm < 0.5 * plain_norm
    assert loss < 0.5 * plain_loss


# ---- rounds


def test_other_rounds_are_federated_averaging_under_the_mask_to_the_bit():
    states = play()
    plain = training.training(
        setup(learning_rate_scale=DECAY),
        client=quadratic.task(setup(learning_rate_scale=DECAY)).local_client(),
    )
    run = jax.jit(plain.stages[0].round)
    members = quadratic.cohort(plain, range(6))
    for index, (before, after) in enumerate(itertools.pairwise(states)):
        inside = before._replace(round=jnp.int32(index), method=())
        key = jax.random.fold_in(jax.random.key(3), index + 1)
        expected, _, _ = run(key, inside, members, PEOPLE)
        same = not trees_differ(expected.params, after.params)
        assert same == (index not in DUE)


def trees_differ(one, two):
    return bool(np.any(quadratic.flatten(one) != quadratic.flatten(two)))


def test_counts_are_held_and_grown_weights_are_zero():
    exchanged = 0
    for before, after in itertools.pairwise(play()):
        for path, mask in trees.items(before.masks):
            new, values = (np.asarray(dict(trees.items(t))[path]) for t in (after[2], after.params))
            assert new.sum() == np.asarray(mask).sum()
            grown = new & ~np.asarray(mask)
            exchanged += grown.sum()
            assert not values[grown].any()
    assert exchanged > 0


def one_block(protocol, *, fraction, period, until):
    """Build training that exchanges weights of all layers, without extrusion."""
    task = quadratic.task(protocol)
    counts = drop_and_grow.counts(
        fraction=drop_and_grow.cosine_decay(initial=fraction, until=until + 1),
        period=period,
        until=until,
        blocks=lambda paths: [0] * len(paths),
        order="forward",
        prunable=masks.is_kernel,
        rounding="down",
    )
    client = task.local_client(
        report_grads=drop_and_grow.every(period=period, until=until),
        report_steps=local_training.last_step,
    )
    return training.training(
        protocol,
        client=sparse_gradients.top_gradients(client, num_pairs=counts),
        pruner=drop_and_grow.drop_and_grow(counts),
        fields={"grads": FieldSpec(send="pairs")},
    )


@pytest.mark.slow
def test_without_a_penalty_and_decay_it_is_a_plain_exchange_of_all_layers_to_the_bit():
    states, _, _ = simulate(make(setup(), penalty=0.0), everybody)
    plain = one_block(setup(), fraction=0.8, period=2, until=5)
    run = jax.jit(plain.stages[0].round)
    members, state = quadratic.cohort(plain, range(6)), states[0]
    changed = 0
    for index, expected in enumerate(states[1:]):
        key = jax.random.fold_in(jax.random.key(3), index + 1)
        inside = state._replace(round=jnp.int32(index))
        state, _, _ = run(key, inside, members, PEOPLE)
        chex.assert_trees_all_equal((state.params, state.masks), (expected.params, expected.masks))
        changed += int(masks.num_changed(inside.masks, state.masks))
    assert changed > 0


@pytest.mark.slow
def test_the_server_drops_what_was_marked_where_that_is_asked_for():
    states, by_size = (play(0.6, penalty=0.0, drop=rule) for rule in ("marked", "smallest"))
    assert trees_differ(states[-1].masks, by_size[-1].masks)
    for index, (before, after) in enumerate(itertools.pairwise(states)):
        gone = jax.tree.map(lambda old, new: old & ~new, before.masks, after.masks)
        counts = jax.tree.map(lambda leaf: jnp.sum(leaf, dtype=jnp.int32), gone)
        chex.assert_trees_all_equal(gone, extrusion.marked(before.params, before.masks, counts))
        assert (int(sum(map(int, jax.tree.leaves(counts)))) > 0) == (index in DUE)


@pytest.mark.slow
def test_a_share_of_nothing_keeps_the_first_masks():
    algorithm = make(setup(), drop_fraction=0.0)
    states, _, _ = simulate(algorithm, everybody, num_rounds=2)
    chex.assert_trees_all_equal(states[0].masks, states[-1].masks)
