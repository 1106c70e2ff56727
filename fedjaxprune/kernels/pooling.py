"""Pooling by reshaping, which is far faster on CPU than a window that slides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune.structure import jaxprs


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


def max_pool_3(x: jax.Array) -> jax.Array:
    """Take the maximum of 3×3 windows at stride 2 of ``[B, H, W, C]``, with a border of one.

    The border never wins. Where entries of a window tie, they share the gradient. The image comes
    out at ``ceil(H / 2) × ceil(W / 2)``.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        out = -(-size // 2)
        pads = [(0, 0, 0)] * x.ndim
        pads[axis] = (1, 2 * out - size, 0)
        padded = jax.lax.pad(x, jnp.array(-jnp.inf, x.dtype), pads)
        first, second, third = (
            jax.lax.slice_in_dim(padded, i, i + 2 * out - 1, stride=2, axis=axis) for i in range(3)
        )
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x


def adaptive_average_pool(x: jax.Array, *, size: int) -> jax.Array:
    """Average ``[B, H, W, C]`` over ``size × size`` windows that cover the image: ``[B, n, n, C]``.

    Window `i` runs from ``floor(i H / n)`` to ``ceil((i + 1) H / n)``, as in PyTorch: windows
    overlap where `n` does not divide the side, and repeat pixels where it exceeds it. It runs as
    two products, and counts as the pooling that it is.
    """
    pooled = x
    for axis in (1, 2):
        side = x.shape[axis]
        if side == size:
            continue
        weights = np.zeros((side, size))
        for i, (start, stop) in enumerate(_spans(side, size)):
            weights[start:stop, i] = 1.0 / (stop - start)
        weights = jnp.asarray(weights, x.dtype)
        pooled = jax.lax.dot_general(pooled, weights, (((axis,), (0,)), ((), ())))
        pooled = jnp.moveaxis(pooled, -1, axis)
    if pooled is x:
        return x
    return jaxprs.equivalent_to(pooled, functools.partial(_means, size=size), x)


def _means(x: jax.Array, *, size: int) -> jax.Array:
    """Average window by window, first down, then across."""
    for axis in (1, 2):
        spans = _spans(x.shape[axis], size)
        windows = [jax.lax.slice_in_dim(x, *span, axis=axis) for span in spans]
        x = jnp.concatenate([jnp.mean(w, axis=axis, keepdims=True) for w in windows], axis=axis)
    return x


def _spans(side: int, size: int) -> list[tuple[int, int]]:
    """List where the windows begin and end."""
    return [(i * side // size, -(-(i + 1) * side // size)) for i in range(size)]
