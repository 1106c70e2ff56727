"""Poolings are what their definitions say."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import executed
from fedjaxprune.kernels import pooling
from fedjaxprune.structure import jaxprs
from tests import draws

KEY = jax.random.key(0)


def theirs(x):
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]


@pytest.mark.usual("shape1", "shape2")
@pytest.mark.parametrize("shape", [(2, 6, 5, 3), (1, 1, 2, 1), (1, 7, 7, 2)])
def test_a_sliding_maximum_is_flaxs(shape):
    x = draws.normal(0, *shape)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = theirs(x)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(theirs(x)))))(x)
    np.testing.assert_array_equal(pooling.max_pool_3(x), expected)
    ours = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(pooling.max_pool_3(x)))))(x)
    np.testing.assert_allclose(ours, gradient, rtol=1e-6)


@pytest.mark.parametrize(("height", "width", "size"), [(6, 6, 7), (8, 5, 2), (1, 1, 7), (7, 14, 7)])
def test_an_adaptive_average_covers_the_image(height, width, size):
    x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    got = pooling.adaptive_average_pool(jnp.asarray(x), size=size)
    for i in range(size):
        for j in range(size):
            rows = slice(i * height // size, -(-(i + 1) * height // size))
            columns = slice(j * width // size, -(-(j + 1) * width // size))
            np.testing.assert_allclose(
                got[:, i, j], x[:, rows, columns].mean(axis=(1, 2)), rtol=1e-5, atol=1e-6
            )
    # It says what it computes, in a form that multiplies nothing.
    plain = jaxprs.plain(lambda x: pooling.adaptive_average_pool(x, size=size))
    np.testing.assert_allclose(plain(jnp.asarray(x)), got, rtol=1e-5, atol=1e-6)
    assert executed.executed(plain, x) == (0, 0)
