"""Convolution, ReLU and 2×2 max-pooling of small images as one matrix product per direction.

A 5×5 convolution with 1 or 6 channels in and 6 or 16 out gives a CPU nothing to chew on: as a
matrix product it is 16 columns wide. Here the image is cut into blocks of ``s × s`` pixels whose
pixels become channels, so that one row of the product makes a whole block of outputs:
``[B * n * m, q * q * s * s * C] @ [q * q * s * s * C, s * s * O]``, where ``q`` blocks a side cover
what a block of outputs sees. The matrix holds the kernel ``s * s`` times, shifted, among zeros:
more arithmetic, at several times the speed. The four outputs of a pooling window lie in the four
quarters of a row, so pooling is a maximum of four slices.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjaxprune.kernels import chosen, convolution, pooling, side_by_side, storing
from fedjaxprune.kernels import strides as geometry
from fedjaxprune.kernels.side_by_side import Way
from fedjaxprune.structure import jaxprs

_POOL = 2  # pooling windows are 2 × 2


def conv_relu_max_pool(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, *, padding: int, block: int
) -> jax.Array:
    """Compute ``max_pool(relu(conv(x, kernel) + bias))`` by blocks of `block` outputs a side.

    Under ``vmap`` over kernels it becomes batched matrix products, not a grouped convolution.
    Where two entries of a window tie, the gradient goes to the first.

    Args:
      x: ``[B, H, W, C]``.
      kernel: ``[kh, kw, C, O]``, applied with stride 1.
      bias: ``[O]``.
      padding: zeros added on each of the four sides.
      block: outputs a side that one row of the product makes, a multiple of 2.

    Returns:
      ``[B, H', W', O]``, with ``H' = (H + 2 * padding - kh + 1) // 2``, and `W'` likewise.

    Raises:
      ValueError: if `block` is not a positive multiple of 2.
    """
    if block <= 0 or block % _POOL:
        raise ValueError(f"block must be a positive multiple of {_POOL}, got {block}.")

    def plain(x, kernel, bias):
        return _finish(_convolve(x, kernel, padding), bias)

    output = _conv_relu_max_pool(x, kernel, bias, padding, block, side_by_side.current())
    again = functools.partial(conv_relu_max_pool, padding=padding, block=block)
    tapped = functools.partial(_tapped, padding=padding, block=block)
    return jaxprs.equivalent_to(output, plain, x, kernel, bias, again=again, tapped=tapped)


def _convolve(x: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    pads, layout = [(padding, padding)] * 2, ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=layout)


def _finish(x: jax.Array, bias: jax.Array) -> jax.Array:
    return jax.nn.relu(pooling.max_pool(x) + bias[None, None, None])


# The way is an argument: the backward form is traced when that of the forward form may be over.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _conv_relu_max_pool(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, padding: int, block: int, way: Way
) -> jax.Array:
    return _chosen_forward(x, kernel, bias, padding, block, way)[0]


class _Forms(NamedTuple):
    """Both directions, of the blocks and of the plain layer; each stores what its backward reads.

    What one platform stores is zeros on the other, which nothing reads, so XLA leaves it out.
    """

    forward: Any
    plain_forward: Any
    backward: Any
    plain_backward: Any
    stored: tuple[jax.ShapeDtypeStruct, ...]  # the output, and what the backward forms read


@functools.cache
def _forms(
    x: tuple[int, ...], kernel: tuple[int, ...], padding: int, block: int, dtype: Any, way: Way
) -> _Forms:
    pads = (padding, padding), (padding, padding)

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolution.unmarked(x, kernel, (1, 1), pads, 1, way)

    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in (x, kernel, kernel[-1:])]

    def forward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> Any:
        output, (_, _, *stored) = _forward(x, kernel, bias, padding, block)
        return output, *stored

    def plain_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> Any:
        convolved = convolve(x, kernel)
        return _finish(convolved, bias), convolved

    def backward(x: jax.Array, kernel: jax.Array, bias: jax.Array, *rest: jax.Array) -> Any:
        del bias
        *stored, _, cotangent = rest
        return _backward(padding, block, (x, kernel, *stored), cotangent)

    def plain_backward(x: jax.Array, kernel: jax.Array, bias: jax.Array, *rest: jax.Array) -> Any:
        *_, convolved, cotangent = rest
        d_convolved, d_bias = jax.vjp(_finish, convolved, bias)[1](cotangent)
        by_image = jax.linear_transpose(lambda x: convolve(x, kernel), x)
        by_kernel = jax.linear_transpose(lambda kernel: convolve(x, kernel), kernel)
        return *by_image(d_convolved), *by_kernel(d_convolved), d_bias

    output, *own = jax.eval_shape(forward, *operands)
    _, plain = jax.eval_shape(plain_forward, *operands)

    def zeros(shapes: Any) -> list[jax.Array]:
        return [jnp.zeros(one.shape, one.dtype) for one in shapes]

    return _Forms(
        lambda *given: [*forward(*given), *zeros([plain])],
        lambda *given: [(found := plain_forward(*given))[0], *zeros(own), found[1]],
        backward,
        plain_backward,
        (output, *own, plain),
    )


def _chosen_forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, padding: int, block: int, way: Way
) -> Any:
    forms = _forms(x.shape, kernel.shape, padding, block, x.dtype, way)
    output, *stored = chosen.call(forms.forward, forms.plain_forward, forms.stored, x, kernel, bias)
    return output, (x, kernel, bias, *stored)


def _chosen_backward(
    padding: int, block: int, way: Way, residuals: Any, cotangent: jax.Array
) -> Any:
    x, kernel, bias, *_ = residuals
    forms = _forms(x.shape, kernel.shape, padding, block, x.dtype, way)
    like = (x, kernel, bias)
    operands = (*residuals, cotangent)
    return tuple(chosen.call(forms.backward, forms.plain_backward, like, *operands))


_conv_relu_max_pool.defvjp(_chosen_forward, _chosen_backward)


def _forward(x: jax.Array, kernel: jax.Array, bias: jax.Array, padding: int, block: int) -> Any:
    *_, in_channels, out_channels = kernel.shape
    n, m, q, r = _grid(x.shape, kernel.shape, padding, block)
    half = block // _POOL
    blocks = _to_blocks(x, padding, block, n + q - 1, m + r - 1)
    patches = jnp.concatenate(
        [blocks[:, i : i + n, j : j + m] for i in range(q) for j in range(r)], axis=-1
    ).reshape(x.shape[0] * n * m, q * r * block * block * in_channels)
    outputs = patches @ _spread(kernel, block)
    pooled = jnp.maximum(_peak(outputs)[1] + jnp.tile(bias, half * half)[None], 0)
    images = _swap(
        pooled,
        (x.shape[0], n, m, half, half, out_channels),
        (x.shape[0], n * half, m * half, out_channels),
    )
    height, width = _pooled(x.shape, kernel.shape, padding)
    return images[:, :height, :width], (x, kernel, patches, outputs, pooled)


def _peak(outputs: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Cut rows into the four places of a pooling window, and take the largest."""
    first, second, third, fourth = parts = jnp.split(outputs, 4, axis=-1)
    return parts, jnp.maximum(jnp.maximum(first, second), jnp.maximum(third, fourth))


def _swap(x: jax.Array, shape: tuple[int, ...], result: tuple[int, ...]) -> jax.Array:
    """Swap the two middle axes of six: pixels of blocks and blocks of pixels."""
    return x.reshape(shape).transpose(0, 1, 3, 2, 4, 5).reshape(result)


def _backward(padding: int, block: int, residuals: Any, cotangent: jax.Array) -> Any:
    return _gradients(padding, block, residuals, cotangent, lambda errors: errors)[0]


def _tapped(
    backward: Any, operands: Any, rest: Any, dummies: Any, *, padding: int, block: int
) -> jax.Array:
    """Do the same as the fast form, with a gradient for dummies (`jaxprs.equivalent_to`)."""

    @jax.custom_vjp
    def run(operands: Any, rest: Any, dummies: Any) -> jax.Array:
        del rest, dummies
        x, kernel, bias = operands
        return _forward(x, kernel, bias, padding, block)[0]

    def forward(operands: Any, rest: Any, dummies: Any) -> Any:
        del dummies
        x, kernel, bias = operands
        output, residuals = _forward(x, kernel, bias, padding, block)
        return output, (operands, residuals, rest)

    def pull_back(saved: Any, cotangent: jax.Array) -> Any:
        operands, residuals, rest = saved
        # The errors have two uses, for each of which XLA would compute them.
        gradients, product = _gradients(padding, block, residuals, cotangent, storing.stored)
        return gradients, None, backward(operands, rest, product)

    run.defvjp(forward, pull_back)
    return run(operands, rest, dummies)


def _gradients(
    padding: int, block: int, residuals: Any, cotangent: jax.Array, keep: Any
) -> tuple[Any, Any]:
    """Compute the operands' gradients, and rows, errors and place of the product."""
    x, kernel, patches, outputs, pooled = residuals
    *_, in_channels, out_channels = kernel.shape
    batch, in_height, in_width, _ = x.shape
    n, m, q, r = _grid(x.shape, kernel.shape, padding, block)
    half = block // _POOL
    height, width = _pooled(x.shape, kernel.shape, padding)
    cotangent = jnp.pad(cotangent, ((0, 0), (0, n * half - height), (0, m * half - width), (0, 0)))
    cotangent = _swap(cotangent, (batch, n, half, m, half, out_channels), pooled.shape)
    zero = jnp.zeros((), cotangent.dtype)
    cotangent = jnp.where(pooled > 0, cotangent, zero)
    d_bias = jnp.sum(jnp.sum(cotangent, axis=0).reshape(half * half, out_channels), axis=0)

    (first, second, third, _), peak = _peak(outputs)
    is_first = first == peak
    is_second = (second == peak) & ~is_first
    is_third = (third == peak) & ~(is_first | is_second)
    is_fourth = ~(is_first | is_second | is_third)
    winners = (is_first, is_second, is_third, is_fourth)
    d_outputs = keep(jnp.concatenate([jnp.where(w, cotangent, zero) for w in winners], axis=-1))

    spread, pull_back = jax.vjp(lambda k: _spread(k, block), kernel)
    (d_kernel,) = pull_back(lax.dot_general(patches, d_outputs, (((0,), (0,)), ((), ()))))
    size = block * block * in_channels
    d_patches = (d_outputs @ spread.T).reshape(batch, n, m, q * r * size)
    d_blocks = zero
    for i in range(q):
        for j in range(r):
            start = (i * r + j) * size
            place = ((0, 0, 0), (i, q - 1 - i, 0), (j, r - 1 - j, 0), (0, 0, 0))
            d_blocks = d_blocks + lax.pad(d_patches[..., start : start + size], zero, place)
    down, across = n + q - 1, m + r - 1
    d_x = _swap(
        d_blocks,
        (batch, down, across, block, block, in_channels),
        (batch, down * block, across * block, in_channels),
    )
    d_x = d_x[:, padding : padding + in_height, padding : padding + in_width]
    # Pixels that no pooling window sees may lie beyond the blocks.
    d_x = jnp.pad(
        d_x, ((0, 0), (0, in_height - d_x.shape[1]), (0, in_width - d_x.shape[2]), (0, 0))
    )
    return (d_x, d_kernel, d_bias), (patches, d_outputs, lambda matrix: pull_back(matrix)[0])


def _pooled(shape: tuple[int, ...], kernel: tuple[int, ...], padding: int) -> tuple[int, int]:
    """Compute the height and width of the pooled output."""
    height, width = (shape[i + 1] + 2 * padding - kernel[i] + 1 for i in range(2))
    return max(0, height // _POOL), max(0, width // _POOL)


def _grid(
    shape: tuple[int, ...], kernel: tuple[int, ...], padding: int, block: int
) -> tuple[int, int, int, int]:
    """Compute the blocks of outputs (down, across) and the blocks that each of them sees."""
    half = block // _POOL
    height, width = _pooled(shape, kernel, padding)
    q, r = (-(-(side + block - 1) // block) for side in kernel[:2])
    return -(-height // half), -(-width // half), q, r


def _to_blocks(x: jax.Array, padding: int, block: int, rows: int, columns: int) -> jax.Array:
    """Cut ``[B, H, W, C]`` into ``[B, rows, columns, block * block * C]``, padding or cropping."""
    batch, height, width, channels = x.shape
    down = padding, rows * block - height - padding
    across = padding, columns * block - width - padding
    return _swap(
        geometry.pad(x, (down, across)),
        (batch, rows, block, columns, block, channels),
        (batch, rows, columns, block * block * channels),
    )


def _spread(kernel: jax.Array, block: int) -> jax.Array:
    """Write the kernel once per output of a block, shifted: ``[q * r * s * s * C, s * s * O]``."""
    *sides, in_channels, out_channels = kernel.shape
    down, across = (_shifts(side, block, kernel.dtype) for side in sides)
    # Indices: q, i block and pixel down, j, k the same across; a, b place in the pooling window;
    # u, v window in the block. The place in the window comes first among the columns.
    spread = jnp.einsum("qiuay,yxco->qiuaxco", down, kernel)
    spread = jnp.einsum("rjvbx,qiuaxco->qrijcabuvo", across, spread)
    return spread.reshape(
        down.shape[0] * across.shape[0] * block * block * in_channels, block * block * out_channels
    )


def _shifts(side: int, block: int, dtype: Any) -> jax.Array:
    """Mark where tap `y` of output ``(u, a)`` of a block lies: 0 or 1, ``[q, s, s / 2, 2, y]``."""
    q = -(-(side + block - 1) // block)
    rows = np.arange(q * block)[:, None, None]
    outputs = np.arange(block)[None, :, None]
    taps = np.arange(side)[None, None]
    marks = rows == outputs + taps
    return jnp.asarray(marks.reshape(q, block, block // _POOL, _POOL, side), dtype)
