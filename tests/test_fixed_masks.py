"""The controls: which weights their masks keep, and what choosing them costs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks
from fedjaxprune.costs import ledger
from fedjaxprune.experiment.run import round_costs
from fedjaxprune.methods import fixed_masks, gradual_magnitude
from fedjaxprune.pruning import allocation, schedules
from fedjaxprune.rounds import protocol, server_work
from fedjaxprune.wire import format as wire_format
from fedjaxprune.wire import messages
from tests import quadratic

KEY = jax.random.key(2)
PEOPLE = quadratic.population()
ONE = quadratic.full_batches(1)
KERNELS = {"dense": 24, "head": 8}


def setup(**changes):
    base = protocol.Protocol(
        num_rounds=3, batcher=quadratic.full_batches(2), optimizer=optax.sgd(0.1)
    )
    return base._replace(**changes)


def start(algorithm, participated=None):
    """Play the stages before training: the state, and the traffic of each."""
    state = algorithm.init(quadratic.PARAMS, {})
    members = quadratic.cohort(algorithm, [0, 1, 2, 3, 4, 5], participated)
    traffic = []
    for stage in algorithm.stages[:-1]:
        state, rows, metrics = stage.round(
            jax.random.fold_in(KEY, state.round), state, members, PEOPLE
        )
        members = members._replace(states=rows)
        traffic.append(ledger.account(metrics, state, algorithm))
    return state, members, traffic


def computed(algorithm):
    """Play the stages before training: what the record has of each one's arithmetic."""
    state = algorithm.init(quadratic.PARAMS, {})
    members = quadratic.cohort(algorithm, [0, 1, 2, 3, 4, 5])
    found = []
    for stage in algorithm.stages[:-1]:
        key = jax.random.fold_in(KEY, state.round)
        state, _, metrics = stage.round(key, state, members, PEOPLE)
        found.append(round_costs.of_round(quadratic.profile(), metrics))
    return found


def largest(values, count):
    order = np.argsort(-np.asarray(values).ravel(), kind="stable")
    kept = np.zeros(order.size, bool)
    kept[order[:count]] = True
    return kept.reshape(np.shape(values))


def expected(values, sparsity=0.5):
    """Keep the best of each layer; biases stay."""
    return {
        name: {
            "bias": np.ones_like(values[name]["bias"], bool),
            "kernel": largest(values[name]["kernel"], size - round(sparsity * size)),
        }
        for name, size in KERNELS.items()
    }


def tree(vector):
    leaves, structure = jax.tree.flatten(quadratic.PARAMS)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = np.split(np.asarray(vector), ends)
    return jax.tree.unflatten(
        structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )


def pooled_mean():
    return np.asarray(PEOPLE.examples["inputs"]).mean(axis=0)


def small_people(max_size=28):
    return quadratic.full_batches(1, max_size)


SOURCES = {
    "held_out": (
        server_work.server_examples([3, 4]),
        lambda: PEOPLE.examples["inputs"][3:5].mean(axis=0),
    ),
    "one_client": (server_work.examples_of(3), lambda: quadratic.mean_point(PEOPLE, 3)),
    "pooled": (server_work.all_examples(), pooled_mean),
}


@pytest.mark.parametrize("weights", ["trained", "initial"])
@pytest.mark.parametrize("name", sorted(SOURCES))
def test_magnitude_masks_keep_the_largest_weights_after_training_where_they_are_made(name, weights):
    source, mean = SOURCES[name]
    algorithm = fixed_masks.magnitude_masks(
        quadratic.MODEL,
        setup(),
        sparsity=0.5,
        source=source,
        pretraining=small_people(),
        weights=weights,
    )
    state, _, traffic = start(algorithm)
    before = np.asarray(quadratic.flatten(quadratic.PARAMS))
    trained = tree(before + 0.1 * (np.asarray(mean()) - before))
    wanted = expected(jax.tree.map(np.abs, trained))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, state.masks), wanted)
    goes_on = trained if weights == "trained" else quadratic.PARAMS
    chex.assert_trees_all_close(
        state.params, masks.apply(state.masks, goes_on), rtol=1e-5, atol=1e-6
    )
    assert [(t.uplink_bits, t.downlink_bits) for t in traffic] == [(0, 0)]


def of_one_client(weights):
    return fixed_masks.magnitude_masks(
        quadratic.MODEL,
        setup(),
        sparsity=0.5,
        source=server_work.examples_of(3),
        pretraining=ONE,
        weights=weights,
        working_clients=(3,),
    )


def test_one_clients_mask_costs_a_dense_model_down_and_a_mask_up():
    algorithm = of_one_client("initial")
    state, members, traffic = start(algorithm)
    (costs,) = computed(algorithm)
    assert costs.modeled_flops is not None  # of the 8 examples of client 3, in one step
    assert list(costs.modeled_flops.values()) == 2 * [2 * 8 * 32, 2 * 8 * 8, 2 * 8 * 32]
    assert costs.mean_coverage == 1.0
    (entry,) = traffic[0].clients
    assert entry.client_ids == (3,)
    assert traffic[0].downlink.values == 32 * quadratic.NUM_WEIGHTS
    assert traffic[0].uplink._replace(framing=0, masks=0) == (0, 0, 0, 0, 0)
    assert 0 < traffic[0].uplink.masks <= 24 + 8  # prunable weights, a bit each
    assert traffic[0].published["values_and_bitmaps"] == (32, 32 * quadratic.NUM_WEIGHTS)
    _, _, metrics = algorithm.stages[-1].round(KEY, state, members, PEOPLE)
    assert (
        0 < ledger.account(metrics, state, algorithm).downlink.masks <= 6 * 32
    )  # then everybody is told


def test_one_clients_weights_travel_under_its_mask_where_training_starts_from_them():
    state, _, traffic = start(of_one_client("trained"))
    message = messages.values("params", state.params, state.masks)
    written = [messages.personal_masks(state.masks, [False, True, False, True]), message]
    assert traffic[0].uplink_bits == sum(8 * len(wire_format.encode(one)) for one in written)
    assert traffic[0].uplink.values == 32 * (quadratic.NUM_WEIGHTS - 16)


def test_random_masks_follow_from_the_seed_and_do_not_travel():
    algorithm = fixed_masks.random_masks(quadratic.MODEL, setup(), sparsity=0.25)
    state, members, traffic = start(algorithm)
    kept = [int(jnp.sum(state.masks[name]["kernel"])) for name in KERNELS]
    assert kept == [18, 6]
    assert [(t.uplink_bits, t.downlink_bits) for t in traffic] == [(0, 0)]
    after, _, metrics = algorithm.stages[-1].round(KEY, state, members, PEOPLE)
    assert ledger.account(metrics, after, algorithm).downlink.masks == 0
    chex.assert_trees_all_equal(after.masks, state.masks)


def sensitivity(mean, params=quadratic.PARAMS):
    grads = tree(np.asarray(quadratic.flatten(params)) - np.asarray(mean))
    return jax.tree.map(lambda w, g: np.abs(np.asarray(w) * g), params, grads)


def test_snip_keeps_the_largest_products_of_weight_and_gradient():
    algorithm = fixed_masks.snip_masks(
        quadratic.MODEL,
        setup(),
        sparsity=0.5,
        source=server_work.all_examples(),
        batcher=small_people(),
    )
    state, _, traffic = start(algorithm)
    wanted = expected(sensitivity(pooled_mean()))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, state.masks), wanted)
    chex.assert_trees_all_equal(state.params, masks.apply(state.masks, quadratic.PARAMS))
    assert [(t.uplink_bits, t.downlink_bits) for t in traffic] == [(0, 0)]


def test_snip_in_several_steps_takes_new_gradients_at_each():
    algorithm = fixed_masks.snip_masks(
        quadratic.MODEL,
        setup(),
        sparsity=0.75,
        source=server_work.all_examples(),
        batcher=small_people(),
        num_steps=3,
    )
    state, _, _ = start(algorithm)
    params, live = quadratic.PARAMS, masks.full(quadratic.PARAMS)
    for sparsity in (0.25, 0.5, 0.75):
        scores = jax.tree.map(
            lambda score, mask: np.where(mask, score, -1.0),
            sensitivity(pooled_mean(), params),
            live,
        )
        live = expected(scores, sparsity)
        params = masks.apply(live, params)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, state.masks), live)


def test_snip_of_the_clients_is_snip_of_the_pooled_data():
    algorithm = fixed_masks.snip_masks_of_clients(
        quadratic.MODEL, setup(), sparsity=0.5, batcher=ONE
    )
    state, members, traffic = start(algorithm)
    wanted = expected(sensitivity(pooled_mean()))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, state.masks), wanted)
    chosen, scored = computed(algorithm)
    assert chosen.modeled_flops is not None
    assert scored.modeled_flops is not None
    assert set(chosen.modeled_flops.values()) == {0}  # by magnitude, in case nobody answers
    assert list(scored.modeled_flops.values()) == 2 * [2 * 28 * 32, 2 * 28 * 8, 2 * 28 * 32]
    assert scored.mean_coverage == 0.0  # gradients move nothing
    every = 6 * 32 * quadratic.NUM_WEIGHTS
    assert (traffic[0].uplink_bits, traffic[0].downlink_bits) == (0, 0)
    for link in (traffic[1].uplink, traffic[1].downlink):
        assert link._replace(framing=0) == (every, 0, 0, 0, 0)
    _, _, metrics = algorithm.stages[-1].round(KEY, state, members, PEOPLE)
    assert 0 < ledger.account(metrics, state, algorithm).downlink.masks <= 6 * 32


def test_snip_of_clients_that_do_not_answer_falls_back_to_magnitude():
    algorithm = fixed_masks.snip_masks_of_clients(
        quadratic.MODEL, setup(), sparsity=0.5, batcher=ONE
    )
    state, _, _ = start(algorithm, participated=[False] * 6)
    wanted = expected(jax.tree.map(np.abs, quadratic.PARAMS))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, state.masks), wanted)


def test_one_pool_lets_layers_compete():
    algorithm = fixed_masks.magnitude_masks(
        quadratic.MODEL,
        setup(),
        sparsity=0.5,
        source=server_work.all_examples(),
        pretraining=ONE,
        weights="initial",
        allocation=allocation.global_pool(),
    )
    state, _, _ = start(algorithm)
    kept = [int(jnp.sum(state.masks[name]["kernel"])) for name in KERNELS]
    assert sum(kept) == 16
    assert kept != [12, 4]


def test_gradual_magnitude_follows_its_curve_and_nothing_returns():
    algorithm = gradual_magnitude.gradual_magnitude(
        quadratic.MODEL, setup(), final_sparsity=0.75, period=2, end_round=6
    )
    curve = schedules.cubic(initial_sparsity=0.0, final_sparsity=0.75, begin_round=0, end_round=6)
    state = algorithm.init(quadratic.PARAMS, {})
    run = jax.jit(algorithm.stages[0].round)
    members = quadratic.cohort(algorithm, range(6))
    for r in range(8):
        before = state.masks
        state, _, metrics = run(jax.random.fold_in(KEY, r), state, members, PEOPLE)
        due = r - r % 2
        kept = int(np.asarray(metrics.num_live).sum()) - 6  # without biases
        assert kept == 32 - round(float(curve(jnp.float32(due))) * 32)
        grown = jax.tree.map(lambda new, old: jnp.any(new & ~old), state.masks, before)
        assert not any(jax.tree.leaves(grown))
    with pytest.raises(ValueError, match="final_sparsity must be at least initial_sparsity"):
        gradual_magnitude.gradual_magnitude(
            quadratic.MODEL,
            setup(),
            final_sparsity=0.5,
            initial_sparsity=0.75,
            period=1,
            end_round=3,
        )
