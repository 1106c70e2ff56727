"""Local training, on the client whose answer is known."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks
from fedjaxprune.federated import local_training, penalties
from fedjaxprune.types import Broadcast, client_data
from tests import quadratic

KEY = jax.random.key(0)
PEOPLE = quadratic.population()
HALF = {
    "dense": {"bias": jnp.ones([4], bool), "kernel": jnp.arange(24).reshape(6, 4) % 2 == 0},
    "head": {"bias": jnp.ones([2], bool), "kernel": jnp.arange(8).reshape(4, 2) % 3 > 0},
}
KINDS = {
    "local_sgd": local_training.local_sgd,
    "dense_feedback_sgd": local_training.dense_feedback_sgd,
}


def work(client, mask_tree=None, params=quadratic.PARAMS, round_index=0, client_id=1):
    mask_tree = masks.full(params) if mask_tree is None else mask_tree
    broadcast = Broadcast(params, mask_tree, {"steps": jnp.float32(0.0)}, jnp.int32(round_index))
    data = client_data(PEOPLE, jnp.int32(client_id))
    message, _ = jax.jit(client.update)(KEY, broadcast, client.init(params), data)
    return message


def make(kind="local_sgd", *, steps=3, optimizer=None, **options):
    return KINDS[kind](
        quadratic.MODEL.loss,
        batcher=quadratic.full_batches(steps),
        optimizer=optax.sgd(0.1) if optimizer is None else optimizer,
        **options,
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_sgd_walks_the_closed_form_path(kind):
    message = work(make(kind))
    start = np.asarray(quadratic.flatten(quadratic.PARAMS))
    target = quadratic.mean_point(PEOPLE, 1)
    expected = target + 0.9**3 * (start - target) - start
    np.testing.assert_allclose(quadratic.flatten(message.fields["delta"]), expected, rtol=1e-4)
    assert message.weight == 5.0
    assert message.fields["model_state"]["steps"] == 3.0


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adam(0.1)])
def test_pruned_weights_stay_exact_zeros_under_any_optimizer(optimizer):
    params = masks.apply(HALF, quadratic.PARAMS)
    noisy = optax.chain(optimizer, optax.add_noise(0.1, 0.5, jax.random.key(1)))
    for each in (optimizer, noisy):
        delta = work(make(optimizer=each), HALF, params).fields["delta"]
        outside = jax.tree.map(lambda d, m: jnp.where(m, 0.0, d), delta, HALF)
        assert not np.any(quadratic.flatten(outside))
        assert np.any(quadratic.flatten(delta))


def test_feedback_moves_pruned_weights_by_the_gradient_at_the_masked_ones():
    params = masks.apply(HALF, quadratic.PARAMS)
    delta = work(make("dense_feedback_sgd", steps=2), HALF, params).fields["delta"]
    keep = np.asarray(quadratic.flatten(HALF))
    start = np.asarray(quadratic.flatten(params))
    target = quadratic.mean_point(PEOPLE, 1)
    # Live weights contract towards the target; pruned ones are seen at zero in every step, so that
    # each step adds the same 0.1 * target.
    expected = np.where(keep, target + 0.9**2 * (start - target) - start, 2 * 0.1 * target)
    np.testing.assert_allclose(quadratic.flatten(delta), expected, rtol=1e-4, atol=1e-6)


def test_feedback_decays_the_dense_weights():
    decayed = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
    delta = work(make("dense_feedback_sgd", steps=1, optimizer=decayed), HALF).fields["delta"]
    start = np.asarray(quadratic.flatten(quadratic.PARAMS))
    seen = np.where(np.asarray(quadratic.flatten(HALF)), start, 0.0)
    expected = -0.1 * ((seen - quadratic.mean_point(PEOPLE, 1)) + 0.5 * start)
    np.testing.assert_allclose(quadratic.flatten(delta), expected, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_scale_is_a_function_of_the_round():
    scale = optax.exponential_decay(1.0, 1, 0.5)
    first = work(make(steps=1, learning_rate_scale=scale)).fields["delta"]
    third = work(make(steps=1, learning_rate_scale=scale), round_index=2).fields["delta"]
    chex.assert_trees_all_close(jax.tree.map(lambda d: 0.25 * d, first), third, atol=1e-6)


def test_the_proximal_term_balances_the_loss_at_the_known_point():
    client = make(steps=200, penalties=(penalties.proximal(mu=3.0),))
    delta = work(client).fields["delta"]
    start = np.asarray(quadratic.flatten(quadratic.PARAMS))
    # Minimum of ½(w − c)² + 3/2 (w − w₀)²: a quarter of the way to c.
    expected = (quadratic.mean_point(PEOPLE, 1) - start) / 4.0
    np.testing.assert_allclose(quadratic.flatten(delta), expected, rtol=1e-3, atol=1e-5)


def test_the_norm_penalty_pulls_each_prunable_layer_along_its_direction():
    penalty = penalties.layer_norms(
        coefficient=lambda r: jnp.float32(0.7), prunable=masks.is_kernel
    )
    broadcast = Broadcast(quadratic.PARAMS, None, {}, jnp.int32(0))
    grads = jax.grad(penalty)(quadratic.PARAMS, broadcast)
    kernel = quadratic.PARAMS["dense"]["kernel"]
    np.testing.assert_allclose(
        grads["dense"]["kernel"], 0.7 * kernel / jnp.linalg.norm(kernel), rtol=1e-5
    )
    assert not np.any(grads["dense"]["bias"])
    for small in (0.0, 1e-25):  # whose square is no float32
        near_zero = jax.tree.map(lambda leaf, x=small: jnp.full_like(leaf, x), quadratic.PARAMS)
        assert not np.any(quadratic.flatten(jax.grad(penalty)(near_zero, broadcast)))


def test_reported_grads_are_dense_means_and_only_in_their_rounds():
    client = make(steps=2, report_grads=lambda round_index: round_index == 4)
    params = masks.apply(HALF, quadratic.PARAMS)
    grads = work(client, HALF, params, round_index=4).fields["grads"]
    start = np.asarray(quadratic.flatten(params))
    target = quadratic.mean_point(PEOPLE, 1)
    keep = np.asarray(quadratic.flatten(HALF))
    second = np.where(keep, 0.9 * (start - target), -target)
    np.testing.assert_allclose(
        quadratic.flatten(grads), ((start - target) + second) / 2, rtol=1e-4, atol=1e-6
    )
    others = work(client, HALF, params, round_index=3).fields["grads"]
    assert not np.any(quadratic.flatten(others))


def test_a_negative_mu_is_refused():
    with pytest.raises(ValueError, match="mu must not be negative, got -1"):
        penalties.proximal(mu=-1.0)
