"""A depthwise convolution that stays fast in loops and under ``vmap`` on CPU.

Every channel has a kernel of its own, so there is no matrix product. The forward form is a sum over
the kernel's taps, and so is the input's gradient. The kernel's gradient is a sum over pixels for
each tap, image by image, so that an image stays in the cache. XLA's own kernel gradient takes
hundreds of times as long (docs/lab/performance.md).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fedjaxprune.kernels import strides as geometry
from fedjaxprune.kernels.strides import Pads


def conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Pads) -> jax.Array:
    """Convolve each channel of ``[B, H, W, C]`` by itself.

    The kernel is ``[kh, kw, 1, C * m]``; channel `c` makes the outputs from ``c * m`` up to
    ``(c + 1) * m``. Negative padding crops.
    """
    size = geometry.outputs(x.shape, kernel.shape, strides, padding)
    padded = _copies(geometry.pad(x, padding), kernel.shape)
    return functools.reduce(
        jnp.add,
        (
            geometry.met(padded, (i, j), strides, size) * kernel[i : i + 1, j : j + 1]
            for i in range(kernel.shape[0])
            for j in range(kernel.shape[1])
        ),
    )


def _copies(x: jax.Array, kernel: tuple[int, ...]) -> jax.Array:
    """Repeat each channel for all outputs that it makes."""
    copies = kernel[3] // x.shape[3]
    return x if copies == 1 else jnp.repeat(x, copies, axis=3)


def input_gradient(
    kernel: jax.Array,
    cotangent: jax.Array,
    x: tuple[int, ...],
    strides: tuple[int, int],
    padding: Pads,
) -> jax.Array:
    """Compute the gradient of images, of shape `x`."""
    d_copies = geometry.input_gradient(
        lambda cotangent, taps, pads: conv(cotangent, jnp.flip(taps, (0, 1)), (1, 1), pads),
        kernel,
        cotangent,
        x[1:3],
        strides,
        padding,
    )
    return d_copies.reshape(*x, -1).sum(axis=4)


def kernel_gradient(
    x: jax.Array,
    cotangent: jax.Array,
    kernel: tuple[int, ...],
    strides: tuple[int, int],
    padding: Pads,
) -> jax.Array:
    """Compute the gradient of a kernel, of shape `kernel`."""
    height, width, _, channels = kernel
    size = cotangent.shape[1:3]
    padded = geometry.pad(x, padding)
    ones = jnp.ones((1, size[0] * size[1]), x.dtype)

    def add(sums, image):
        pixels, out = (leaf[None] for leaf in image)
        pixels = _copies(pixels, kernel)
        taps = [
            ones @ (geometry.met(pixels, (i, j), strides, size) * out).reshape(-1, channels)
            for i in range(height)
            for j in range(width)
        ]
        return sums + jnp.stack(taps), None

    sums = jnp.zeros((height * width, 1, channels), x.dtype)
    sums, _ = lax.scan(add, sums, (padded, cotangent))
    return sums.reshape(kernel)
