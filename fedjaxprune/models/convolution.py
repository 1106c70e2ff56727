"""A two-dimensional convolution that stays fast in loops and under ``vmap`` on CPU.

XLA's CPU back end has one fast convolution, the plain forward form; inside a loop it takes the
gradients for something else and runs them up to a hundred times slower, and under ``vmap`` over
kernels it makes a grouped convolution. So here both gradients are written in the plain forward
form: the input's with the kernel flipped, the kernel's with batch and channels swapped (for every
shape of the built-in networks the fastest of those measured, next to one matrix product per tap,
per row of taps and over patches). Under ``vmap`` clients follow each other. Elsewhere than on CPU
this is XLA's own convolution.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fedjaxprune import forms

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_Pads = tuple[tuple[int, int], tuple[int, int]]


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Convolve as ``jax.lax.conv_general_dilated`` does, with gradients that are fast in loops.

    It fits ``flax.linen.Conv(conv_general_dilated=...)``. The fast form serves two-dimensional NHWC
    images on CPU, without dilation or groups; anything else goes to XLA unchanged. It has no
    forward-mode derivative (``jax.jvp`` of it fails, ``jax.grad`` and ``jax.vjp`` do not).
    """
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    fast = (
        jax.default_backend() == "cpu"
        and lhs.ndim == 4
        and numbers == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUT)
        and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and feature_group_count == batch_group_count == 1
        and lhs.dtype == rhs.dtype == jnp.float32
        and precision is None
        and preferred_element_type in (None, lhs.dtype)
    )
    if not fast:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            batch_group_count,
            precision,
            preferred_element_type,
        )
    strides = (int(window_strides[0]), int(window_strides[1]))
    pads = padding
    if isinstance(pads, str):
        pads = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, pads)
    (top, bottom), (left, right) = pads
    return conv(lhs, rhs, strides=strides, padding=((top, bottom), (left, right)))


def conv(x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], padding: _Pads) -> jax.Array:
    """Convolve ``[B, H, W, C]`` with ``[kh, kw, C, O]`` in the forms that are fast on CPU.

    Args:
      x: images.
      kernel: taps down, taps across, channels in, channels out.
      strides: down and across.
      padding: zeros (before, after) down and across; negative ones crop.

    Returns:
      ``[B, H', W', O]``.
    """
    if kernel.shape[:2] == (1, 1):
        pixels = lax.pad(x, jnp.zeros((), x.dtype), _image(padding))
        pixels = pixels[:, :: strides[0], :: strides[1]]
        output = lax.dot_general(pixels, kernel[0, 0], (((3,), (0,)), ((), ())))
    else:
        output = _conv(x, kernel, strides, padding)
    plain = functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=_LAYOUT,
    )
    return forms.stands_for(output, plain, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: _Pads) -> jax.Array:
    return _plain(x, kernel, strides, padding)


def _forward(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: _Pads) -> Any:
    return _plain(x, kernel, strides, padding), (x, kernel)


def _backward(strides: tuple[int, int], padding: _Pads, residuals: Any, cotangent: Any) -> Any:
    x, kernel = residuals
    height, width = cotangent.shape[1:3]
    if strides == (1, 1):
        return (
            _input_gradient(kernel, cotangent, x.shape[1:3], padding),
            _kernel_gradient(x, cotangent, kernel.shape[:2], padding),
        )
    # A stride makes pixels into channels; what is left has stride 1 and no padding.
    sides = (
        (height - 1 + -(-kernel.shape[0] // strides[0])) * strides[0],
        (width - 1 + -(-kernel.shape[1] // strides[1])) * strides[1],
    )
    no_padding = ((0, 0), (0, 0))
    images, pull_back_x = jax.vjp(lambda x: _gather_strides(x, strides, padding, sides), x)
    kernels, pull_back_kernel = jax.vjp(lambda k: _gather_taps(k, strides), kernel)
    d_images = _input_gradient(kernels, cotangent, images.shape[1:3], no_padding)
    d_kernels = _kernel_gradient(images, cotangent, kernels.shape[:2], no_padding)
    return *pull_back_x(d_images), *pull_back_kernel(d_kernels)


_conv.defvjp(_forward, _backward)


def _input_gradient(
    kernel: jax.Array, cotangent: jax.Array, size: tuple[int, ...], padding: _Pads
) -> jax.Array:
    """Convolve the cotangent with the flipped kernel; stride 1."""
    pads = []
    for i in range(2):
        before = kernel.shape[i] - 1 - padding[i][0]
        pads.append((before, size[i] - cotangent.shape[i + 1] + kernel.shape[i] - 1 - before))
    flipped = jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)
    return _plain(cotangent, flipped, (1, 1), (pads[0], pads[1]))


def _kernel_gradient(
    x: jax.Array, cotangent: jax.Array, size: tuple[int, ...], padding: _Pads
) -> jax.Array:
    """Convolve the images with the cotangent, channels as batch and batch as channels; stride 1."""
    pads = []
    for i in range(2):
        # Crop what no tap of the kernel reaches.
        before = padding[i][0]
        after = size[i] - 1 + cotangent.shape[i + 1] - x.shape[i + 1] - before
        pads.append((before, after))
    swapped = _plain(
        x.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3), (1, 1), (pads[0], pads[1])
    )
    return swapped.transpose(1, 2, 0, 3)


def _plain(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Any) -> jax.Array:
    """Run XLA's forward convolution; under ``vmap`` over kernels one after the other."""

    def convolve(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_LAYOUT)

    def rule(axis_size, in_batched, x, kernel):
        x_batched, kernel_batched = in_batched
        if not kernel_batched:
            outputs = run(x.reshape(-1, *x.shape[2:]), kernel)
            return outputs.reshape(axis_size, -1, *outputs.shape[1:]), True
        if not x_batched:
            return lax.map(lambda kernel: run(x, kernel), kernel), True
        return lax.map(lambda pair: run(*pair), (x, kernel)), True

    run = jax.custom_batching.custom_vmap(convolve)
    run.def_vmap(rule)
    return run(x, kernel)


def _image(padding: _Pads) -> list[tuple[int, int, int]]:
    return [(0, 0, 0), (*padding[0], 0), (*padding[1], 0), (0, 0, 0)]


def _gather_strides(
    x: jax.Array, strides: tuple[int, int], padding: _Pads, sides: tuple[int, int]
) -> jax.Array:
    """Pad or crop the images to `sides`, then make the pixels of a stride into channels."""
    pads = [(padding[i][0], sides[i] - x.shape[i + 1] - padding[i][0]) for i in range(2)]
    x = lax.pad(x, jnp.zeros((), x.dtype), _image((pads[0], pads[1])))
    batch, height, width, channels = x.shape
    down, across = strides
    x = x.reshape(batch, height // down, down, width // across, across, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(
        batch, height // down, width // across, down * across * channels
    )


def _gather_taps(kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """Make the taps of a stride into input channels, in the order of `_gather_strides`."""
    kh, kw, in_channels, out_channels = kernel.shape
    down, across = strides
    kernel = jnp.pad(kernel, ((0, -kh % down), (0, -kw % across), (0, 0), (0, 0)))
    rows, columns = kernel.shape[0] // down, kernel.shape[1] // across
    kernel = kernel.reshape(rows, down, columns, across, in_channels, out_channels)
    return kernel.transpose(0, 2, 1, 3, 4, 5).reshape(
        rows, columns, down * across * in_channels, out_channels
    )
