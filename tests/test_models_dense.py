"""The small dense layer: the values and derivatives of `jax.lax.dot_general`."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from fedjaxprune.kernels import dense
from tests import draws

DIMENSIONS = (((1,), (0,)), ((), ()))


def operands(batch, features, outputs, *, num_clients=None):
    lead = () if num_clients is None else (num_clients,)
    return draws.normal(0, *lead, batch, features), draws.normal(1, *lead, features, outputs)


def loss(product, x, kernel):
    return jnp.sum(jnp.sin(product(x, kernel, DIMENSIONS)))


def both(transform):
    """Take something of our loss and of XLA's."""
    return [
        transform(functools.partial(loss, product))
        for product in (dense.dot_general, lax.dot_general)
    ]


def written_out(x, kernel):
    """Say whether the kernel's gradient is written as a sum and not as a product."""
    text = str(jax.make_jaxpr(jax.grad(functools.partial(loss, dense.dot_general), 1))(x, kernel))
    return text.count(" = dot_general[") == 1


@pytest.mark.usual("None-shape0", "None-shape3", "3-shape1", "3-shape4")
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (16, 64, 32), (16, 400, 120), (17, 5, 2)])
@pytest.mark.parametrize("num_clients", [None, 3])
def test_values_and_gradients_are_those_of_the_plain_product(shape, num_clients):
    given = operands(*shape, num_clients=num_clients)
    for argnums in (0, 1, (0, 1)):
        ours, plain = both(functools.partial(jax.value_and_grad, argnums=argnums))
        if num_clients is not None:
            ours, plain = jax.vmap(ours), jax.vmap(plain)
        chex.assert_trees_all_close(
            jax.jit(ours)(*given), jax.jit(plain)(*given), rtol=1e-5, atol=1e-5
        )


def test_one_kernel_for_all_clients_and_one_batch_for_all_kernels():
    x, kernel = operands(4, 5, 3, num_clients=2)
    for axes, given in [((0, None), (x, kernel[0])), ((None, 0), (x[0], kernel))]:
        ours, plain = both(lambda f, axes=axes: jax.vmap(jax.grad(f, argnums=(0, 1)), axes))
        chex.assert_trees_all_close(
            jax.jit(ours)(*given), jax.jit(plain)(*given), rtol=1e-5, atol=1e-5
        )


def test_derivatives_of_all_orders_are_there():
    x, kernel = operands(2, 3, 2)
    for transform in (jax.hessian, jax.jacfwd, jax.jacrev):
        ours, plain = both(functools.partial(transform, argnums=(0, 1)))
        chex.assert_trees_all_close(
            jax.jit(ours)(x, kernel), jax.jit(plain)(x, kernel), rtol=1e-4, atol=1e-5
        )
    ours, plain = both(lambda f: lambda *given: jax.jvp(jax.grad(f, 1), given, given)[1])
    chex.assert_trees_all_close(
        jax.jit(ours)(x, kernel), jax.jit(plain)(x, kernel), rtol=1e-4, atol=1e-5
    )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the form is for CPUs")
def test_only_small_layers_are_written_out():
    assert written_out(*operands(16, 64, 32))
    assert not written_out(*operands(17, 64, 32))
    assert not written_out(*operands(4, 512, 129))


@pytest.mark.parametrize("batch", [0, 2])
def test_an_empty_batch_has_a_gradient_of_zeros(batch):
    x, kernel = operands(batch, 4, 3)
    grad = jax.grad(functools.partial(loss, dense.dot_general), argnums=1)(x, kernel)
    assert grad.shape == kernel.shape
    assert np.any(grad) == (batch > 0)


def test_other_products_are_xlas_own():
    x, kernel = operands(4, 6, 6)
    cases = [
        (x, kernel, (((1,), (1,)), ((), ())), None, None),
        (x[None], kernel, (((2,), (0,)), ((), ())), None, None),
        (x, kernel, DIMENSIONS, lax.Precision.HIGHEST, None),
        (x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), DIMENSIONS, None, jnp.float32),
    ]
    for lhs, rhs, dimensions, precision, kind in cases:
        ours = dense.dot_general(lhs, rhs, dimensions, precision, kind)
        plain = lax.dot_general(lhs, rhs, dimensions, precision, kind)
        np.testing.assert_array_equal(ours, plain)
        assert ours.dtype == plain.dtype


def test_layers_of_flax_take_it():
    x, _ = operands(4, 6, 3)

    def of_linen(product):
        layer = nn.Dense(3, dot_general=product)
        params = jax.jit(layer.init)(jax.random.key(1), x)
        return jax.jit(
            jax.grad(lambda params: jnp.sum(jnp.sin(jnp.asarray(layer.apply(params, x)))))
        )(params)

    def of_nnx(product):
        layer = nnx.Linear(6, 3, dot_general=product, rngs=nnx.Rngs(1))
        return nnx.to_pure_dict(nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(x))))(layer))

    for gradient in (of_linen, of_nnx):
        chex.assert_trees_all_close(
            gradient(dense.dot_general), gradient(lax.dot_general), rtol=1e-5, atol=1e-5
        )
