"""The blocked layer is convolution, ReLU and max-pooling, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedjaxprune.kernels import blocked
from tests import draws

KEY = jax.random.key(0)


def plain(x, kernel, bias, *, padding):
    x = lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jax.nn.relu(x + bias[None, None, None])
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def inputs_for(shape, kernel_shape):
    bias = draws.normal(2, kernel_shape[-1])
    return draws.normal(0, *shape), draws.normal(1, *kernel_shape), bias


def check_close(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.max(np.abs(b), initial=0)))


@pytest.mark.usual(
    "shape1-kernel_shape1-0-2", "shape2-kernel_shape2-1-4", "shape6-kernel_shape6-0-2"
)
@pytest.mark.parametrize(
    ("shape", "kernel_shape", "padding", "block"),
    [
        ((2, 12, 12, 1), (5, 5, 1, 6), 2, 4),
        ((2, 10, 13, 3), (5, 5, 3, 4), 0, 2),
        ((2, 7, 9, 2), (3, 3, 2, 3), 1, 4),
        ((1, 6, 5, 2), (1, 1, 2, 3), 0, 2),
        ((1, 9, 9, 2), (3, 5, 2, 3), 0, 4),
        ((1, 9, 9, 1), (2, 2, 1, 2), 0, 2),
        ((2, 3, 9, 1), (5, 5, 1, 2), 0, 2),  # smaller than the kernel: no outputs
    ],
)
def test_it_is_the_plain_composition(shape, kernel_shape, padding, block):
    arguments = inputs_for(shape, kernel_shape)

    def mine(*a):
        return blocked.conv_relu_max_pool(*a, padding=padding, block=block)

    def theirs(*a):
        return plain(*a, padding=padding)

    @functools.partial(jax.jit, static_argnums=0)
    def both_ways(function, *a):
        outputs, pull_back = jax.vjp(function, *a)
        cotangent = jax.random.normal(jax.random.fold_in(KEY, 1), outputs.shape)
        return outputs, pull_back(cotangent)

    check_close(both_ways(mine, *arguments), both_ways(theirs, *arguments))


def test_under_vmap_it_has_no_convolution_left():
    x, kernel, bias = inputs_for((2, 8, 8, 1), (5, 5, 1, 4))
    kernels = jnp.stack([kernel, 2 * kernel])

    def total(k):
        return jnp.sum(blocked.conv_relu_max_pool(x, k, bias, padding=2, block=2) ** 2)

    together = jax.vmap(jax.grad(total))
    assert "conv_general_dilated" not in str(jax.make_jaxpr(together)(kernels))
    alone = jax.jit(jax.grad(total))
    check_close(jax.jit(together)(kernels), jnp.stack([alone(k) for k in kernels]))


def test_a_tie_sends_the_gradient_to_one_entry():
    x = jnp.ones((1, 4, 4, 1))
    kernel = jnp.ones((1, 1, 1, 1))
    grad = jax.grad(
        lambda x: jnp.sum(blocked.conv_relu_max_pool(x, kernel, jnp.zeros(1), padding=0, block=2))
    )(x)
    np.testing.assert_array_equal(grad[0, :, :, 0], jnp.tile(jnp.array([[1, 0], [0, 0]]), (2, 2)))


@pytest.mark.parametrize("block", [0, 3, -2])
def test_a_block_that_pooling_does_not_divide_is_refused(block):
    with pytest.raises(ValueError, match=f"multiple of 2, got {block}"):
        blocked.conv_relu_max_pool(*inputs_for((1, 8, 8, 1), (3, 3, 1, 1)), padding=0, block=block)
