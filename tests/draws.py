"""Random arrays of tests, drawn on the host: JAX would compile a program for every shape."""

import jax
import numpy as np


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    """Draw float32 from a normal distribution of this deviation about zero."""
    drawn = scale * np.random.default_rng(seed).standard_normal(shape)
    return jax.device_put(np.asarray(drawn, np.float32))


def uniform(seed: int, *shape: int, low: float = 0.0, high: float = 1.0) -> jax.Array:
    """Draw float32 from ``[low, high)``."""
    return jax.device_put(
        np.asarray(np.random.default_rng(seed).uniform(low, high, shape), np.float32)
    )


def flags(seed: int, *shape: int, probability: float) -> jax.Array:
    """Draw booleans that are True with this probability."""
    return jax.device_put(np.random.default_rng(seed).random(shape) < probability)
