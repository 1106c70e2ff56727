"""Convolutions of several clients at once, each with a kernel of its own, off the CPU.

Under ``vmap`` over kernels JAX makes one convolution in as many groups as there are clients. GPU
and TPU libraries are made for few groups, so there are two more forms: patches of the images and a
batched matrix product, or one client after another. Which one is fastest depends on the device and
the network, so it is a setting; no form changes anything without ``vmap``, or on a CPU.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from fedjaxprune.kernels import strides as geometry
from fedjaxprune.kernels.strides import Pads

Way = Literal["grouped", "patches", "sequential"]
"""How clients are convolved side by side: XLA's grouped convolution, a batched product over patches
of the images, or one client after another."""

WAYS: tuple[Way, ...] = get_args(Way)
DEFAULT: Way = "patches"

_way: contextvars.ContextVar[Way] = contextvars.ContextVar("way", default=DEFAULT)


@contextlib.contextmanager
def convolved(way: Way) -> Iterator[None]:
    """Let convolutions that are traced inside take a way.

    Raises:
      ValueError: there is no such way.
    """
    if way not in WAYS:
        raise ValueError(f"way must be one of {', '.join(WAYS)}, got {way!r}.")
    before = _way.set(way)
    try:
        yield
    finally:
        _way.reset(before)


def current() -> Way:
    """Give the way of the convolutions that are being traced."""
    return _way.get()


def by_patches(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], padding: Pads, groups: int
) -> jax.Array:
    """Convolve ``[B, H, W, C]`` with ``[kh, kw, C / G, O]`` as one product over patches.

    Each output's patch is a row of ``kh * kw * C / G`` numbers, so the images are held as often as
    there are taps for each output.
    """
    height, width, per_group, out_channels = kernel.shape
    size = geometry.outputs(x.shape, kernel.shape, strides, padding)
    padded = geometry.pad(x, padding)
    taps = [
        geometry.met(padded, (i, j), strides, size) for i in range(height) for j in range(width)
    ]
    rows = jnp.stack(taps, axis=3)  # [B, H', W', taps, C]
    if groups == 1:
        rows = rows.reshape(x.shape[0] * size[0] * size[1], height * width * per_group)
        flat = rows @ kernel.reshape(height * width * per_group, out_channels)
        return flat.reshape(x.shape[0], *size, out_channels)
    rows = rows.reshape(-1, height * width, groups, per_group).transpose(2, 0, 1, 3)
    rows = rows.reshape(groups, -1, height * width * per_group)
    own = kernel.reshape(height * width, per_group, groups, -1).transpose(2, 0, 1, 3)
    own = own.reshape(groups, height * width * per_group, -1)
    found = jnp.matmul(rows, own)  # [G, B * H' * W', O / G]
    return found.transpose(1, 0, 2).reshape(x.shape[0], *size, out_channels)
