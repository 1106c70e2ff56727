"""What aggregators share: types of sums, division, refusals."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import trees


def sum_dtype(dtype: Any) -> Any:
    """Widen half precision to float32."""
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32


def divide(total: jax.Array, weight: jax.Array) -> jax.Array:
    """Divide, or give zero where there is nothing to divide by."""
    weight = weight.astype(total.dtype)
    safe = jnp.where(weight > 0, weight, jnp.ones_like(weight))
    return jnp.where(weight > 0, total / safe, jnp.zeros_like(total))


def require_inexact(name: str, tree: Any) -> None:
    """Refuse leaves that have no mean."""
    for path, leaf in trees.items(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"aggregators.{name} averages floating-point leaves, but {path!r} is {leaf.dtype}: "
                "aggregate it with aggregators.unweighted_sum or aggregators.vote_counts."
            )
