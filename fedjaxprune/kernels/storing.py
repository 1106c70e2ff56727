"""Arrays that XLA computes once, though they have several uses."""

import jax
import jax.numpy as jnp
from jax import lax


def stored(x: jax.Array) -> jax.Array:
    """Return ``[...]`` as an array that XLA stores and does not compute again.

    XLA considers additions, maxima and selections so cheap that it repeats them for every use of
    the result. A division counts as expensive, so one by a 1 that the compiler cannot know makes
    XLA compute the array once. On other devices than a CPU nothing is done.
    """
    if jax.default_backend() != "cpu":
        return x
    one = jnp.ones((), x.dtype)
    return x / lax.clamp(one, x, one)
