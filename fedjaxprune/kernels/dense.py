"""Dense layers that stay fast where they are small, in loops and over clients.

XLA's CPU back end makes the kernel's gradient of a dense layer a batched matrix product once there
are clients, and shares one of a microsecond out to its threads, who wait for each other. Written as
a sum over the examples of what came in times what comes back, it is one loop that XLA fuses.

`dot_general` replaces `jax.lax.dot_general` in a flax layer:
``nn.Dense(32, dot_general=dense.dot_general)``, likewise in ``nnx.Linear``.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from fedjaxprune.kernels import bilinear
from fedjaxprune.structure import jaxprs

# Measured with `python -m benchmarks.dense`: with more examples XLA's product is as fast or faster.
_MOST_EXAMPLES = 16
_LARGEST_KERNEL = 65_536  # as far as was measured


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
) -> jax.Array:
    """Multiply as `jax.lax.dot_general` does, small dense layers by a form with a fast gradient.

    Those are ``[B, F] x [F, O]`` in float32, of up to 16 examples and 65,536 weights; the
    form is for CPUs, and elsewhere lowered as the plain product. All derivatives are there, of any
    order, forward and reverse.
    """
    plain = functools.partial(
        lax.dot_general,
        dimension_numbers=dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    contracted, batched = dimension_numbers
    if (
        (tuple(map(tuple, contracted)), tuple(map(tuple, batched))) == (((1,), (0,)), ((), ()))
        and lhs.ndim == rhs.ndim == 2
        and lhs.dtype == rhs.dtype == jnp.float32
        and preferred_element_type in (None, jnp.float32)
        and precision is None
        and out_sharding is None
        and all(isinstance(size, int) for size in lhs.shape)  # and no symbol of an export
        and lhs.shape[0] <= _MOST_EXAMPLES
        and rhs.size <= _LARGEST_KERNEL
    ):
        return jaxprs.equivalent_to(_small(lhs, rhs), plain, lhs, rhs)
    return plain(lhs, rhs)


def _by_example(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply example by example: transposed it is a sum of outer products."""
    rows = [jnp.sum(row[:, None] * kernel, axis=0) for row in x]
    return jnp.stack(rows) if rows else jnp.zeros((0, kernel.shape[1]), x.dtype)


@functools.cache
def _product(x: tuple[int, int], kernel: tuple[int, int]) -> bilinear.Family:
    shapes = jax.ShapeDtypeStruct(x, jnp.float32), jax.ShapeDtypeStruct(kernel, jnp.float32)
    return bilinear.Family(
        shapes=(x, kernel, (x[0], kernel[1])),
        cpu=bilinear.transposed(_by_example, *shapes),
        other=bilinear.transposed(jnp.matmul, *shapes),
    )


@jax.custom_jvp
def _small(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _small_tangent(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Follow the kernel by a product whose transpose is the fast gradient."""
    x, kernel = primals
    x_dot, kernel_dot = tangents
    out = x @ kernel
    moved = jnp.zeros_like(out)
    if not isinstance(kernel_dot, SymbolicZero):
        moved = bilinear.apply(_product(x.shape, kernel.shape), x, kernel_dot)
    if not isinstance(x_dot, SymbolicZero):
        moved = moved + x_dot @ kernel
    return out, moved


_small.defjvp(_small_tangent, symbolic_zeros=True)
