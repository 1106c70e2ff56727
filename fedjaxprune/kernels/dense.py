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

    Those are ``[B, F] x [F, O]`` in float32 on a CPU, of up to 16 examples and 65,536 weights. All
    derivatives are there, of any order, forward and reverse.
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
        jax.default_backend() == "cpu"
        and (tuple(map(tuple, contracted)), tuple(map(tuple, batched))) == (((1,), (0,)), ((), ()))
        and lhs.ndim == rhs.ndim == 2
        and lhs.dtype == rhs.dtype == jnp.float32
        and preferred_element_type in (None, jnp.float32)
        and precision is None
        and out_sharding is None
        and isinstance(lhs.shape[0], int)  # and not the symbol of an export
        and lhs.shape[0] <= _MOST_EXAMPLES
        and rhs.size <= _LARGEST_KERNEL
    ):
        return jaxprs.equivalent_to(_small(lhs, rhs), plain, lhs, rhs)
    return plain(lhs, rhs)


@jax.custom_jvp
def _small(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _small_tangent(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Follow the kernel example by example: in reverse a sum of outer products."""
    x, kernel = primals
    x_dot, kernel_dot = tangents
    out = x @ kernel
    moved = jnp.zeros_like(out)
    if not isinstance(kernel_dot, SymbolicZero):
        rows = [jnp.sum(row[:, None] * kernel_dot, axis=0) for row in x]
        moved = jnp.stack(rows) if rows else moved
    if not isinstance(x_dot, SymbolicZero):
        moved = moved + x_dot @ kernel
    return out, moved


_small.defjvp(_small_tangent, symbolic_zeros=True)
