"""What all forms of convolution share: sizes, paddings, and the taps that reach each place."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]  # zeros (before, after) down and across


def outputs(
    x: Sequence[int], kernel: Sequence[int], strides: tuple[int, int], padding: Pads
) -> tuple[int, ...]:
    """Count the outputs down and across."""
    return tuple(
        max(0, (x[i + 1] + sum(padding[i]) - kernel[i]) // strides[i] + 1) for i in range(2)
    )


def pad(x: jax.Array, padding: Pads) -> jax.Array:
    """Put zeros around images ``[B, H, W, C]``; negative numbers crop."""
    return lax.pad(
        x, jnp.zeros((), x.dtype), [(0, 0, 0), (*padding[0], 0), (*padding[1], 0), (0, 0, 0)]
    )


def met(
    x: jax.Array, tap: tuple[int, int], strides: tuple[int, int], size: Sequence[int]
) -> jax.Array:
    """Take what a tap meets of padded images: ``[B, H', W', C]`` for outputs of `size`."""
    down, across = (tap[i] + strides[i] * (size[i] - 1) + 1 for i in range(2))
    return lax.slice(x, (0, *tap, 0), (x.shape[0], down, across, x.shape[3]), (1, *strides, 1))


def input_gradient(
    convolve: Callable[[jax.Array, jax.Array, Pads], jax.Array],
    kernel: jax.Array,
    cotangent: jax.Array,
    size: tuple[int, ...],
    strides: tuple[int, int],
    padding: Pads,
) -> jax.Array:
    """Convolve the cotangent with the taps that reach each place in a stride, without zeros.

    `convolve` takes the cotangent ``[B, H', W', O]``, taps and padding, and gives what the taps
    give back to the images at stride 1; the kernel is ``[kh, kw, ...]``, the images are of `size`.
    """
    blocks = [-(-size[i] // strides[i]) for i in range(2)]
    down, across = (
        [
            _reaching_taps(place, kernel.shape[i], cotangent.shape[i + 1], blocks[i], strides[i], p)
            for place in range(strides[i])
        ]
        for i, (p, _) in enumerate(padding)
    )

    def at_place(row, column):
        (taps_down, pads_down), (taps_across, pads_across) = row, column
        if not taps_down or not taps_across:
            return None
        taps = kernel[taps_down[0] :: strides[0], taps_across[0] :: strides[1]]
        return convolve(cotangent, taps, (pads_down, pads_across))

    places = [[at_place(row, column) for column in across] for row in down]
    some = next(place for row in places for place in row if place is not None)
    if strides == (1, 1):
        return some
    rows = [
        jnp.stack([jnp.zeros_like(some) if place is None else place for place in row], axis=3)
        for row in places
    ]
    images = jnp.stack(rows, axis=2)  # [B, H / s, s, W / s, s, C]
    shape = (some.shape[0], blocks[0] * strides[0], blocks[1] * strides[1], some.shape[3])
    return images.reshape(shape)[:, : size[0], : size[1]]


def _reaching_taps(
    place: int, num_taps: int, num_outputs: int, num_blocks: int, stride: int, pad: int
) -> tuple[range, tuple[int, int]]:
    """Find the taps that reach pixels ``stride * m + place``, and how far to pad the cotangent."""
    first = (place + pad) % stride
    taps = range(first, num_taps, stride)
    offset = (place + pad - first) // stride  # pixel m meets output m + offset at the first tap
    before = len(taps) - 1 - offset
    return taps, (before, num_blocks + offset - num_outputs)
