"""Normalized sparse convolution (FedMef): formulas, and the masks that reach the network."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjaxprune as fjp
from fedjaxprune import live_weights, masks, metrics, trees
from fedjaxprune.costs import flops
from fedjaxprune.federated import local_training
from fedjaxprune.live_weights import COLLECTION
from fedjaxprune.models import layers, parameters, resnet
from fedjaxprune.rounds import server_work, stages
from fedjaxprune.rounds.protocol import broadcast_of
from fedjaxprune.structure.channels import groups
from fedjaxprune.types import (
    Algorithm,
    Batcher,
    ClientData,
    Cohort,
    RoundState,
    Sight,
    WeightView,
)

SHAPE = (8, 8, 1)
NOTHING: Any = ()


def normalized(values, live):
    return live_weights.normalize(jnp.array(values)[:, None], jnp.array(live)[:, None])[:, 0]


def test_the_specifications_vectors():
    given = normalized([1.0, 2.0, 3.0, 3.0], [True, True, True, False])
    np.testing.assert_allclose(given, [-0.707107, 0.0, 0.707107, 0.0], atol=1e-6)
    given = normalized([-1.0, 1.0], [True, True])
    np.testing.assert_allclose(given, [-0.707107, 0.707107], atol=1e-6)


def test_live_weights_have_mean_zero_and_norm_one_whatever_their_scale_and_mean():
    rng = np.random.default_rng(0)
    kernel, live = rng.normal(size=(3, 3, 4, 5)).astype(np.float32), rng.random((3, 3, 4, 5)) < 0.4
    given = live_weights.normalize(jnp.asarray(kernel), jnp.asarray(live))
    assert not np.any(given[~live])
    np.testing.assert_allclose(np.sum(given, (0, 1, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(np.sum(np.square(given), (0, 1, 2)), 1.0, rtol=1e-5)
    other = np.where(live, 2.0 * kernel + 3.0, 7.0).astype(np.float32)
    np.testing.assert_allclose(
        live_weights.normalize(jnp.asarray(other), jnp.asarray(live)), given, atol=2e-5
    )
    whole = live_weights.normalize(jnp.asarray(kernel), jnp.ones_like(kernel))
    standard = (kernel - kernel.mean((0, 1, 2))) / kernel.std((0, 1, 2)) / np.sqrt(36)
    np.testing.assert_allclose(whole, standard, atol=1e-5)


def test_a_pruned_weight_changes_the_rest_and_a_grown_one_is_live_with_a_gradient():
    kernel = jnp.array([[1.0], [0.0], [3.0], [5.0]])
    before = live_weights.normalize(kernel, jnp.array([[1], [1], [1], [1]]))
    after = live_weights.normalize(kernel, jnp.array([[1], [1], [1], [0]]))
    assert np.all(np.abs(before - after)[:3] > 1e-3)

    weights = jnp.array([[0.3], [-0.7], [0.2], [0.9]])

    def gradient(kernel, live):
        def loss(kernel):
            return jnp.sum(weights * live_weights.normalize(kernel, live))

        return jax.grad(loss)(kernel)

    grown = gradient(kernel, jnp.array([[1], [1], [1], [1]]))
    assert grown[1, 0] != 0.0
    # Pruned, it has a gradient too, and the others have none of it.
    pruned = gradient(kernel, jnp.array([[1], [0], [1], [1]]))
    deviation = np.std([1.0, 3.0, 5.0]) * np.sqrt(3)
    np.testing.assert_allclose(pruned[1, 0], weights[1, 0] / deviation, rtol=1e-5)
    alone = jax.grad(
        lambda k: jnp.sum(
            weights[jnp.array([0, 2, 3])] * live_weights.normalize(k, jnp.ones((3, 1)))
        )
    )(kernel[jnp.array([0, 2, 3])])
    np.testing.assert_allclose(pruned[jnp.array([0, 2, 3])], alone, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "live", "wanted"),
    [
        ([4.0, 9.0, 9.0], [1, 0, 0], [0.0, 2.0, 3.0]),  # what is pruned counts as it is
        ([4.0, 9.0, 9.0], [0, 0, 0], [1.0, 2.0, 3.0]),  # a dead filter may grow again
        ([0.0, 0.0, 9.0], [1, 1, 0], [-500.0, 500.0, 3.0]),  # grown at 0: at most 1000 times
    ],
)
def test_what_has_no_spread_is_zero_and_has_gradients_of_a_sensible_size(values, live, wanted):
    kernel, live = jnp.array(values)[:, None], jnp.array(live)[:, None]
    weights = jnp.array([[1.0], [2.0], [3.0]])
    value, gradient = jax.value_and_grad(
        lambda k: jnp.sum(live_weights.normalize(k, live) * weights)
    )(kernel)
    assert value == 0.0
    np.testing.assert_allclose(gradient[:, 0], wanted, rtol=1e-5)


def test_statistics_of_few_bits_are_those_of_float32():
    kernel = jnp.asarray(np.random.default_rng(0).normal(1.0, 0.1, (576, 2)), jnp.bfloat16)
    given = live_weights.normalize(kernel, jnp.ones((576, 2)))
    assert given.dtype == jnp.bfloat16
    exact = live_weights.normalize(kernel.astype(jnp.float32), jnp.ones((576, 2)))
    np.testing.assert_allclose(given.astype(jnp.float32), exact, rtol=2**-8)


@pytest.fixture(scope="module")
def network():
    model = resnet.resnet8(input_shape=SHAPE, num_classes=3, norm="live_weights")
    params, state = jax.jit(model.init)(jax.random.key(0))
    kernels = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).random(leaf.shape) < 0.3), params
    )
    flags = trees.map_with_path(masks.is_kernel, params)
    bits = jax.tree.map(lambda flag, bit: bit | (not flag), flags, kernels)
    return model, params, state, bits


def test_a_network_starts_with_every_weight_live_and_is_told_its_masks(network):
    _, params, state, bits = network
    assert {path.split("/", 1)[0] for path in trees.paths(state)} == {COLLECTION}
    assert all(np.all(leaf == 1.0) for leaf in jax.tree.leaves(state))
    told = live_weights.with_masks(state, bits)
    assert live_weights.without(told) == {}
    by_path = dict(zip(trees.paths(bits), jax.tree.leaves(bits), strict=True))
    for path, leaf in zip(trees.paths(told), jax.tree.leaves(told), strict=True):
        np.testing.assert_array_equal(leaf, by_path[path.removeprefix(f"{COLLECTION}/")])
    assert live_weights.with_masks({"other": 1.0}, bits) == {"other": 1.0}
    assert "norm_1" not in params


def test_its_multiply_adds_are_those_of_live_weights(network):
    model, params, _, bits = network
    example = jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)
    plain = resnet.resnet8(input_shape=SHAPE, num_classes=3, norm="group")
    names = set(trees.paths(jax.eval_shape(plain.init, jax.random.key(0))[0]))
    own = dict(zip(trees.paths(bits), jax.tree.leaves(bits), strict=True))
    both = {path: own.get(path, np.bool_(True)) for path in names if path.endswith("kernel")}
    assert set(both) <= set(trees.paths(params))
    found = {each.path: each for each in flops.of_model(model, bits, example)}
    other = {each.path: each for each in flops.of_model(plain, both, example)}
    for path in both:
        assert found[path].dense.forward == other[path].dense.forward
        assert found[path].sparse.forward == other[path].sparse.forward
    assert (
        0 < flops.sparse(list(found.values())).forward < flops.dense(list(found.values())).forward
    )


def test_a_collection_of_that_name_that_is_no_mask_is_refused():
    params = {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    for own in ({"layer": {"kernel": jnp.ones(3)}}, {"count": jnp.ones(())}, jnp.ones(3)):
        with pytest.raises(ValueError, match="give the collection another name"):
            parameters.check(params, {COLLECTION: own})
    parameters.check(params, {COLLECTION: {"layer": {"kernel": jnp.ones((2, 3))}}})
    parameters.check(params, {"live": jnp.ones(3)})


def test_a_client_normalizes_by_the_masks_that_its_steps_train_under():
    seen = {"kernel": jnp.array([True, False, True, False])}
    params, state = {"kernel": jnp.arange(1.0, 5.0)}, {COLLECTION: {"kernel": jnp.ones(4)}}

    def loss(params, state, batch, key):
        live = state[COLLECTION]["kernel"]
        is_told = (live == 1.0) == (params["kernel"] != 0.0)
        told = metrics.mean(is_told.astype(jnp.float32), jnp.ones(4))
        return jnp.sum(params["kernel"] * live), (state, {"loss": told})

    client = local_training.viewed_sgd(
        loss,
        batcher=Batcher(lambda data: jnp.int32(2), lambda key, data, step: NOTHING),
        optimizer=optax.sgd(0.1),
        view=WeightView(lambda _: Sight(seen), lambda *_: Sight(seen), period=None),
    )
    state = RoundState(jnp.int32(0), params, masks.full(params), jnp.int32(0), state, (), ())
    data = ClientData(NOTHING, NOTHING, jnp.int32(0), jnp.int32(4), jnp.int32(0))
    message, _ = client.update(jax.random.key(0), broadcast_of(state), (), data)
    assert message.fields["metrics"]["loss"].total == 8.0
    np.testing.assert_array_equal(
        broadcast_of(state, masks=seen).model_state[COLLECTION]["kernel"], seen["kernel"]
    )


def test_rounds_that_guard_themselves_are_not_guarded_twice():
    def prune(key, state, population):
        assert state.model_state[COLLECTION]["kernel"] is not before
        return state._replace(masks={"kernel": jnp.array([True, False])}), {}

    params, before = {"kernel": jnp.ones(2)}, jnp.zeros(2)
    stage = server_work.server_round("prune", prune)
    made = Algorithm(None, None, (stage,), None, None, None)  # pyright: ignore[reportArgumentType]
    (told,) = stages.telling_masks(made).stages
    assert stages.guarded(told.round) is told.round
    state = RoundState(
        jnp.int32(0),
        params,
        masks.full(params),
        jnp.int32(0),
        {COLLECTION: {"kernel": before}},
        (),
        (),
    )
    cohort = Cohort(jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.bool_), ())
    after = told.round(jax.random.key(0), state, cohort, NOTHING)[0]
    np.testing.assert_array_equal(after.model_state[COLLECTION]["kernel"], [1.0, 0.0])


def test_filters_are_those_of_the_kernels_and_not_of_the_masks(network):
    model, params, state, _ = network
    example = jax.ShapeDtypeStruct((2, *SHAPE), jnp.float32)
    found = groups.analyze(model.predict, params, state, example)
    makers = {m.path for group in found.filters for m in group.members if m.role == "filter"}
    assert makers == {path for path in trees.paths(params) if path.endswith("kernel")}


class Small(nn.Module):
    """Somebody's own network with such layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(layers.NormalizedConv(3)(x))
        x = nn.relu(layers.NormalizedConv(4, gain=layers.RELU_GAIN)(x))
        return nn.Dense(3)(x.mean((1, 2)))


def test_a_run_follows_its_masks_and_sends_none_of_them_twice(tmp_path):
    rng = np.random.default_rng(0)
    data = (rng.random((24, *SHAPE), np.float32), np.arange(24, dtype=np.int32) % 3)
    run = fjp.run(
        method={"name": "fedmef", "sparsity": 0.6, "prune_every": 1, "last_prune_round": 2},
        model=Small(),
        data=data,
        **{"federation.num_rounds": 3, "client.steps": 1, "client.batch_size": 4},
        **{"execution.chunk_size": 1, "execution.devices": 1, "server.aggregator": "weighted_mean"},
        num_clients=2,
        folder=str(tmp_path / "run"),
    )
    told = live_weights.with_masks(run.model_state, run.masks)
    assert jax.tree.all(jax.tree.map(np.array_equal, run.model_state, told))
    assert not jax.tree.all(jax.tree.map(np.all, told))
    assert np.sum(run.record["mask.num_changed"][1:]) > 0  # exchanges, after the draw
    assert not any(run.record["traffic.down.statistics"])
    assert not any(run.record["traffic.up.statistics"])
    computed = run.record["compute.training_flops.forward"]
    dense = run.record["compute.training_flops.dense_forward"]
    assert 0 < computed[-1] < 0.7 * dense[-1]
