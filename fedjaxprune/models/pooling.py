"""Pooling by reshaping, which is far faster on CPU than a window that slides."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Take the maximum of every 2×2 window of ``[B, H, W, C]``, less an odd last row or column.

    Where entries of a window tie, the gradient goes to the first, in the order of rows.
    """
    return _forward(x)[0]


def _windows(x: jax.Array) -> jax.Array:
    """Lay the windows out: ``[B, H // 2, 2, W // 2, 2, C]``."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels)


def _peak(windows: jax.Array) -> jax.Array:
    rows = jnp.maximum(windows[:, :, 0], windows[:, :, 1])
    return jnp.maximum(rows[:, :, :, 0], rows[:, :, :, 1])


def _forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _peak(_windows(x)), x


def _backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    windows = _windows(x)
    peak = _peak(windows)
    zero = jnp.zeros((), cotangent.dtype)
    free = jnp.ones(peak.shape, jnp.bool_)
    gradients = []
    for i in range(2):
        row = []
        for j in range(2):
            wins = (windows[:, :, i, :, j] == peak) & free
            free = free & ~wins
            row.append(jnp.where(wins, cotangent, zero))
        gradients.append(jnp.stack(row, axis=3))
    gradient = jnp.stack(gradients, axis=2)
    batch, height, width, channels = x.shape
    gradient = gradient.reshape(batch, height // 2 * 2, width // 2 * 2, channels)
    return (jnp.pad(gradient, ((0, 0), (0, height % 2), (0, width % 2), (0, 0))),)


max_pool.defvjp(_forward, _backward)


def global_average_pool(x: jax.Array) -> jax.Array:
    """Average ``[B, H, W, C]`` over the image: ``[B, C]``."""
    return jnp.mean(x, axis=(1, 2))
