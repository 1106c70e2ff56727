"""Single rounds whose result is known by hand, and what rounds make of unusual parts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune.costs import ledger
from fedjaxprune.federated import aggregators, local_training, penalties
from fedjaxprune.methods import feddip
from fedjaxprune.rounds import training
from fedjaxprune.types import ClientData
from tests import quadratic
from tests.playing import KEY, PEOPLE, STATE, UPLINKS, dip, plain, setup, simulate, some


def test_fedprox_without_pull_is_fedavg_to_the_bit():
    without_pull = plain(penalties=(penalties.proximal(mu=0.0),))(setup())
    expected = simulate(plain()(setup()), some)[0][-1]
    chex.assert_trees_all_equal(simulate(without_pull, some)[0][-1].params, expected.params)


def test_fedavg_gives_the_known_answer():
    states, _, history = simulate(plain()(setup()), lambda r: ([0, 3], None), num_rounds=3)
    mean = (3 * quadratic.mean_point(PEOPLE, 0) + 8 * quadratic.mean_point(PEOPLE, 3)) / 11
    start = np.asarray(quadratic.flatten(quadratic.PARAMS))
    expected = mean + 0.9 ** (2 * 3) * (start - mean)  # two steps a round, three rounds
    np.testing.assert_allclose(quadratic.flatten(states[-1].params), expected, rtol=1e-4, atol=1e-6)
    assert states[-1].model_state["steps"] == 6.0  # BatchNorm-like state is averaged too
    assert history[0].train["loss"].weight == 2 * 11  # every example, in each of two steps


def test_error_feedback_forgets_nothing_over_rounds():
    algorithm = plain()(setup(uplink=UPLINKS["feedback_top_k"]))
    dense = plain()(setup())
    run = jax.jit(algorithm.stages[0].round)
    state = algorithm.init(quadratic.PARAMS, STATE)
    members = quadratic.cohort(algorithm, [2])
    after, rows, _ = run(KEY, state, members, PEOPLE)
    exact, _, _ = jax.jit(dense.stages[0].round)(
        KEY, dense.init(quadratic.PARAMS, STATE), quadratic.cohort(dense, [2]), PEOPLE
    )
    sent = jax.tree.map(jnp.subtract, after.params, quadratic.PARAMS)
    computed = jax.tree.map(jnp.subtract, exact.params, quadratic.PARAMS)
    held_back = jax.tree.map(lambda leaf: leaf[0], rows.uplink.residual)
    assert np.count_nonzero(quadratic.flatten(held_back)) == 28  # 6+18 of kernels, 3+1 of biases
    chex.assert_trees_all_close(
        jax.tree.map(jnp.add, sent, held_back), computed, rtol=1e-5, atol=1e-6
    )


def test_personal_masks_are_averaged_over_their_holders():
    inner = local_training.local_sgd(
        quadratic.MODEL.loss, batcher=quadratic.full_batches(1), optimizer=optax.sgd(0.1)
    )

    def personal_masks(data: ClientData):
        odd = (data.size % 2) == 1  # clients 0 and 1 hold even positions, the others odd ones
        return jax.tree.map(
            lambda leaf: (jnp.arange(leaf.size).reshape(leaf.shape) % 2 == 0) == odd,
            quadratic.PARAMS,
        )

    def update(key, broadcast, state, data):
        mine = personal_masks(data)
        message, state = inner.update(key, broadcast._replace(masks=mine), state, data)
        return message._replace(fields={**message.fields, "masks": mine}), state

    algorithm = training.training(
        setup(aggregator=aggregators.holder_mean()), client=inner._replace(update=update)
    )
    state, _, metrics = jax.jit(algorithm.stages[0].round)(
        KEY, algorithm.init(quadratic.PARAMS, STATE), quadratic.cohort(algorithm, [0, 2]), PEOPLE
    )
    even = np.concatenate(
        [np.arange(leaf.size) % 2 == 0 for leaf in jax.tree.leaves(quadratic.PARAMS)]
    )
    start = np.asarray(quadratic.flatten(quadratic.PARAMS))

    def stepped(client_id, mine):
        seen = np.where(mine, start, 0.0)
        return 0.1 * (quadratic.mean_point(PEOPLE, client_id) - seen)

    expected = start + np.where(even, stepped(0, even), stepped(2, ~even))
    np.testing.assert_allclose(quadratic.flatten(state.params), expected, rtol=1e-4, atol=1e-6)
    assert np.asarray(metrics.num_uploaded).sum() == quadratic.NUM_WEIGHTS
    charged = ledger.account(metrics, state, algorithm).uplink
    assert charged.values == 32 * quadratic.NUM_WEIGHTS
    assert charged.masks == 2 * quadratic.NUM_PRUNABLE


@pytest.mark.parametrize(
    "aggregator", ["median", pytest.param("trimmed_mean", marks=pytest.mark.slow)]
)
def test_robust_aggregation_ignores_the_absent_and_the_order(aggregator):
    rule = {"median": aggregators.median(), "trimmed_mean": aggregators.trimmed_mean(fraction=0.3)}
    algorithm = dip()(setup(aggregator=rule[aggregator], chunk_size=3))
    run = jax.jit(algorithm.stages[0].round)
    every = [True, True, True, False]
    first, _, _ = simulate(algorithm, lambda r: ([0, 1, 2, 5], every), num_rounds=2, run=run)
    second, _, _ = simulate(algorithm, lambda r: ([2, 0, 1, 4], every), num_rounds=2, run=run)
    chex.assert_trees_all_close(first[-1], second[-1], rtol=1e-4, atol=1e-5)


def test_a_pruner_that_finds_nothing_to_prune_is_refused():
    params = [jnp.ones([3, 4]), jnp.ones([4])]
    with pytest.raises(ValueError, match="nothing to prune: none of the leaves 0, 1 is prunable"):
        dip()(setup()).init(params, STATE)


def test_finite_messages_that_overflow_move_nothing_and_are_counted():
    def update(key, broadcast, state, data):
        inner = local_training.local_sgd(
            quadratic.MODEL.loss, batcher=quadratic.full_batches(1), optimizer=optax.sgd(0.1)
        )
        message, state = inner.update(key, broadcast, state, data)
        huge = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3e38), message.fields["delta"])
        return message._replace(fields={**message.fields, "delta": huge}), state

    algorithm = training.training(
        setup(), client=local_training.Client(init=lambda params: (), update=update)
    )
    states, _, history = simulate(algorithm, lambda r: ([0, 1, 2], None), num_rounds=1)
    chex.assert_trees_all_equal(states[-1].params, quadratic.PARAMS)
    assert history[-1].num_rejected == 3


def test_integer_state_follows_the_mean_to_the_nearest_count():
    def loss(params, state, batch, key):
        value, (_, metrics) = quadratic.MODEL.loss(params, {}, batch, key)
        return value, ({"count": state["count"] + 3}, metrics)

    algorithm = plain(quadratic.MODEL._replace(loss=loss))(setup())
    state = algorithm.init(quadratic.PARAMS, {"count": jnp.int32(1)})
    states, _, _ = simulate(algorithm, some, num_rounds=1, start=state)
    assert states[-1].model_state["count"] == 1 + 2 * 3
    assert states[-1].model_state["count"].dtype == jnp.int32


def test_half_precision_parameters_go_through_a_round():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), quadratic.PARAMS)

    def loss(params, state, batch, key):
        full = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        value, aux = quadratic.MODEL.loss(full, state, batch, key)
        return value.astype(jnp.bfloat16), aux

    model = quadratic.MODEL._replace(loss=loss)
    algorithm = feddip.build(
        feddip.FedDIP(sparsity=0.75, num_segments=3),
        quadratic.task(setup(uplink=UPLINKS["quantize"]), model=model),
    )
    state = algorithm.init(params, STATE)
    run = jax.jit(algorithm.stages[0].round)
    after, _, _ = run(KEY, state, quadratic.cohort(algorithm, [0, 1], params=params), PEOPLE)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(after.params))
    assert np.any(quadratic.flatten(after.params) != quadratic.flatten(params))
