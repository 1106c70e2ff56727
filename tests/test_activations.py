"""Activations that are stored in part: the vector, exact gradients of inputs, weights', memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks import step_memory
from fedjaxprune import models
from fedjaxprune.models import activations
from fedjaxprune.structure import residuals
from fedjaxprune.types import Batch
from tests import draws

KEY = jax.random.key(0)
W, X, NONE = (frozenset(names) for names in ({"weight"}, {"example"}, ()))
IMAGES = draws.normal(1, 3, 6, 6, 2)
ROWS = draws.normal(2, 20, 6)
PARAMS = {
    "conv": draws.normal(3, 3, 3, 2, 4),
    "dense": draws.normal(4, 144, 5),
}
LAYERS = [draws.normal(i, 6, 6, scale=0.5) for i in (5, 6)]


def convolve(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def network(params, x):
    hidden = jax.nn.relu(convolve(x, params["conv"]))
    outputs = hidden.reshape(x.shape[0], -1) @ params["dense"]
    return jnp.sum(jnp.square(outputs))


def sparse(function, share):
    return residuals.sparse_residuals(function, share=share, roles=(W, X))


def largest(x, share):
    """Set all but the largest entries to zero."""
    order = np.argsort(-np.abs(np.asarray(x)).ravel(), kind="stable")
    kept = np.isin(np.arange(x.size), order[: int((1 - share) * x.size + 1e-9)])
    return jnp.where(kept.reshape(x.shape), x, 0.0)


def test_the_largest_entries_are_kept_with_a_bit_for_each_entry():
    x = jnp.array([[0.5, -2, 0.1, 0], [1.5, -0.3, 0.7, -0.05]])
    entries, bits = residuals.largest_entries(x, 4)
    np.testing.assert_array_equal(entries, np.array([0.5, -2, 1.5, 0.7], np.float32))
    assert np.flatnonzero(np.unpackbits(np.asarray(bits))).tolist() == [0, 1, 4, 6]
    wanted = np.array([[0.5, -2, 0, 0], [1.5, 0, 0.7, 0]], np.float32)
    np.testing.assert_array_equal(residuals.unpack_entries(entries, bits, x.shape), wanted)
    nothing = residuals.largest_entries(x, 0)
    assert not np.any(residuals.unpack_entries(*nothing, x.shape))


@functools.cache
def gradients(share):
    """Give the loss and the gradients of parameters and images; None takes the plain network."""
    function = network if share is None else sparse(network, share)
    return jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(PARAMS, IMAGES)


def test_where_all_is_stored_gradients_are_the_plain_ones():
    for one, two in zip(
        jax.tree.leaves(gradients(0.0)), jax.tree.leaves(gradients(None)), strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_gradients_of_inputs_are_exact_and_those_of_weights_are_of_the_stored_entries(share):
    (value, (grads, back)), (plain, (_, exact)) = gradients(share), gradients(None)
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    np.testing.assert_allclose(back, exact, rtol=1e-4, atol=1e-3)

    hidden = jax.nn.relu(convolve(IMAGES, PARAMS["conv"]))
    flat = hidden.reshape(3, -1)
    slope = 2.0 * flat @ PARAMS["dense"]
    np.testing.assert_allclose(grads["dense"], largest(flat, share).T @ slope, rtol=1e-4, atol=1e-3)
    inner = jnp.where(hidden > 0, (slope @ PARAMS["dense"].T).reshape(hidden.shape), 0.0)
    _, pull_back = jax.vjp(lambda k: convolve(largest(IMAGES, share), k), PARAMS["conv"])
    np.testing.assert_allclose(grads["conv"], pull_back(inner)[0], rtol=1e-4, atol=2e-3)


def unrolled(params, x):
    for kernel in params:
        x = jnp.tanh(x @ kernel)
    return jnp.sum(x)


def in_a_loop(params, x):
    step = lambda x, kernel: (jnp.tanh(x @ kernel), ())  # noqa: E731
    return jnp.sum(lax.scan(step, x, jnp.stack(params))[0])


def in_a_branch(params, x):
    for kernel in params:
        x = lax.cond(x[0, 0] < 1e9, lambda x, k: jnp.tanh(x @ k), lambda x, k: x, x, kernel)
    return jnp.sum(x)


def in_a_checkpoint(params, x):
    return jax.checkpoint(jax.jit(unrolled))(params, x)


@pytest.mark.parametrize("function", [in_a_loop, in_a_branch, in_a_checkpoint])
def test_layers_are_found_inside_of_other_operations(function):
    wanted = jax.jit(jax.grad(sparse(unrolled, 0.5)))(LAYERS, ROWS)
    found = jax.jit(jax.grad(sparse(function, 0.5)))(LAYERS, ROWS)
    plain = jax.jit(jax.grad(unrolled))(LAYERS, ROWS)
    for one, two, other in zip(found, wanted, plain, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
        assert np.abs(one - other).max() > 1e-2


def test_products_of_examples_with_examples_and_of_weights_are_left_alone():
    def function(params, x):
        return jnp.sum((x @ x.T) @ x) + jnp.sum(params[0] @ params[1])

    assert str(jax.make_jaxpr(sparse(function, 0.5))(LAYERS, ROWS)).count("custom_vjp") == 0


@pytest.mark.parametrize("share", [0.5, 0.75, 0.9])
def test_memory_falls_as_the_stored_form_says(share):
    def linear(params, x):
        return jnp.sum((x @ params[0]) @ params[1])

    sizes = ROWS.size, ROWS.size  # what the two layers read
    kept = [32 * int((1 - share) * n + 1e-9) + 8 * -(-n // 8) for n in sizes]
    dense = step_memory.activations(linear, LAYERS, ROWS)
    assert dense == 32 * sum(sizes)
    assert step_memory.activations(sparse(linear, share), LAYERS, ROWS) == sum(kept)


def test_a_model_trains_with_a_part_and_predicts_as_before():
    model = models.lenet5(input_shape=(28, 28, 1), num_classes=10)
    assert activations.pruned(model, 0.0) is model
    half = activations.pruned(model, 0.5)
    assert half.predict is model.predict
    params, state = jax.eval_shape(model.init, KEY)
    images = jax.ShapeDtypeStruct((20, 28, 28, 1), jnp.float32)
    labels = jax.ShapeDtypeStruct((20,), jnp.int32)
    weights = jax.ShapeDtypeStruct((20,), jnp.float32)

    def train(loss):
        return lambda params, *batch: loss(params, {}, Batch(*batch), KEY)[0]

    args = params, images, labels, weights
    before, after = (step_memory.activations(train(one.loss), *args) for one in (model, half))
    # Five layers read this many entries; of each, half and a bit an entry are stored.
    read = 20 * (28 * 28 + 14 * 14 * 6 + 400 + 120 + 84)
    assert before - after >= (32 - 17) * (read - 20 * 28 * 28) - 32 * 5
    assert not state


def test_a_share_out_of_range_is_refused():
    model = models.mlp(input_shape=(4,), num_classes=2)
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\), got 1.0"):
        activations.pruned(model, 1.0)
