"""How many entries of a leaf a fraction of them is, on the host and while tracing."""

import jax
import jax.numpy as jnp


def check_fraction(fraction: float) -> None:
    """Refuse a fraction that sends nothing or more than there is."""
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}.")


def num_sent(fraction: float, num_kept: int) -> int:
    """Count the entries sent of a leaf, on the host: rounded, at least one of any."""
    return min(max(round(fraction * num_kept), 1), num_kept)


def num_sent_traced(fraction: float, mask: jax.Array) -> jax.Array:
    """Count the entries sent of a leaf: ``[]`` int32, equal to `num_sent`.

    The product is in float64, as on the host: float32 miscounts from 2²⁴ entries.
    """
    num_kept = jnp.sum(mask, dtype=jnp.int32)
    with jax.enable_x64(True):
        exact = jnp.float64(fraction) * num_kept.astype(jnp.float64)
        count = jnp.round(exact).astype(jnp.int32)  # half to even, as in Python
    return jnp.minimum(jnp.maximum(count, 1), num_kept)
