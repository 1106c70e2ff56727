"""A two-dimensional convolution that stays fast in loops and under ``vmap`` on CPU.

XLA's CPU back end has one fast convolution, the plain forward form; inside a loop it may take the
gradients for something else and run them up to a hundred times slower, and under ``vmap`` over
kernels it makes a grouped convolution. So here both gradients are written in forward forms. The
input's is a convolution with the flipped kernel; under a stride one such convolution for each
place in a stride, with the taps that reach it, and nothing is multiplied by the zeros of a dilated
image. The kernel's is a convolution with batch and channels swapped, a few images at a time where
that keeps them in the cache; for wide layers with a stride one matrix product per tap. Large
layers of stride 1 go Winograd's way in all three. Groups are convolved one after the other, a
depthwise convolution is a sum over its taps. Which form serves which shape was measured
(docs/lab/performance.md). Under ``vmap`` clients follow each other.
On other platforms this is XLA's own convolution (`side_by_side` says what it is under ``vmap``).
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fedjaxprune.kernels import bilinear, depthwise, side_by_side, winograd
from fedjaxprune.kernels import strides as geometry
from fedjaxprune.kernels.strides import Pads
from fedjaxprune.structure import jaxprs

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_MOST_GROUPS = 32  # that are convolved one after the other; of one channel each any number
# Where the forms of the kernel's gradient change over, as measured on CPU.
_SOME_WEIGHTS, _SOME_PIXELS = 2048, 64  # per tap, of an image: above, a few images at a time
_GROUP, _MAX_GROUPS = 16, 4  # images at a time; groups at most
_MANY_WEIGHTS = 2**15  # per tap, with a stride: above, one product per tap
# XLA's fast convolution wants channels, which few channels get from neighbours in a row.
_ENOUGH_IN, _ENOUGH_OUT, _ENOUGH_OUT_OF_COLOURS, _FEW_TAPS = 24, 32, 48, 7


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
    out_sharding: Any = None,
) -> jax.Array:
    """Convolve as ``jax.lax.conv_general_dilated`` does, with gradients that are fast in loops.

    It fits ``Conv(conv_general_dilated=...)`` of ``flax.linen`` and ``flax.nnx``. It serves
    two-dimensional NHWC images without dilation; anything else goes to XLA unchanged. The form is
    chosen when a program is lowered: for a CPU the fast one, in float32 and in at most 32 groups or
    depthwise, else XLA's own; for other platforms XLA's own, and for several clients with kernels
    of their own one of `side_by_side.WAYS`. All derivatives are there, of any order, forward and
    reverse.
    """
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    is_served = (
        lhs.ndim == 4
        and numbers == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUT)
        and all(d == 1 for dilation in (lhs_dilation, rhs_dilation) for d in _given(dilation))
        and len(window_strides) == 2
        and batch_group_count == 1
        and lhs.dtype == rhs.dtype
        and jnp.issubdtype(lhs.dtype, jnp.floating)
        and precision is None
        and preferred_element_type in (None, lhs.dtype)
        and out_sharding is None
    )
    if not is_served:
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
            out_sharding,
        )
    strides = (int(window_strides[0]), int(window_strides[1]))
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    (top, bottom), (left, right) = padding
    pads = (top, bottom), (left, right)
    return conv(lhs, rhs, strides=strides, padding=pads, groups=feature_group_count)


def _given(values: Sequence[int] | None) -> Sequence[int]:
    return () if values is None else values


def conv(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], padding: Pads, groups: int = 1
) -> jax.Array:
    """Convolve ``[B, H, W, C]`` with ``[kh, kw, C / G, O]`` in the form that the platform wants.

    A kernel has taps down and across, channels in of a group and channels out of all ``G`` groups;
    each makes ``O / G`` outputs from ``C / G`` inputs. Negative padding crops.
    """
    plain = _xlas(strides, padding, groups)
    if not _is_served(x, kernel, strides, padding):
        return plain(x, kernel)
    output = unmarked(x, kernel, strides, padding, groups, side_by_side.current())
    return jaxprs.equivalent_to(output, plain, x, kernel)


def unmarked(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Pads,
    groups: int,
    way: side_by_side.Way,
) -> jax.Array:
    """Do the same inside of a form that says itself what it stands for."""
    plain = _xlas(strides, padding, groups)
    if not _is_served(x, kernel, strides, padding):
        return plain(x, kernel)
    if groups > 1:
        jax.eval_shape(plain, x, kernel)  # refuses groups that do not divide the channels
    family = _family(x.shape, kernel.shape, x.dtype, strides, padding, groups, way)
    return bilinear.apply(family, x, kernel)


def _is_served(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Pads) -> bool:
    """Tell whether there is something to compute, and no size is the symbol of an export."""
    sizes = (*x.shape, *kernel.shape, *geometry.outputs(x.shape, kernel.shape, strides, padding))
    return all(isinstance(size, int) for size in sizes) and min(sizes) > 0


def _xlas(strides: tuple[int, int], padding: Pads, groups: int) -> Any:
    return functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=_LAYOUT,
        feature_group_count=groups,
    )


@functools.cache
def _family(
    x: tuple[int, ...],
    kernel: tuple[int, ...],
    dtype: Any,
    strides: tuple[int, int],
    padding: Pads,
    groups: int,
    way: side_by_side.Way,
) -> bilinear.Family:
    """Make the forms of a convolution of these shapes."""
    shapes = jax.ShapeDtypeStruct(x, dtype), jax.ShapeDtypeStruct(kernel, dtype)
    other = together = bilinear.transposed(_xlas(strides, padding, groups), *shapes)
    is_fast = dtype == jnp.float32 and (groups <= _MOST_GROUPS or groups == x[3])
    if way == "patches":
        product = functools.partial(
            side_by_side.by_patches, strides=strides, padding=padding, groups=groups
        )
        together = bilinear.transposed(product, *shapes)
    return bilinear.Family(
        shapes=(x, kernel, (x[0], *geometry.outputs(x, kernel, strides, padding), kernel[3])),
        cpu=_fast_forms(*shapes, strides, padding, groups) if is_fast else other,
        other=other,
        together=together,
        in_turn=way == "sequential",
    )


def _fast_forms(
    x: jax.ShapeDtypeStruct,
    kernel: jax.ShapeDtypeStruct,
    strides: tuple[int, int],
    padding: Pads,
    groups: int,
) -> bilinear.Forms:
    """Make the forms that are fast on CPU."""
    if groups == 1:
        return _of_one_group(x, kernel, strides, padding)
    if groups == x.shape[3]:
        return bilinear.Forms(
            output=lambda x, kernel: depthwise.conv(x, kernel, strides, padding),
            first=lambda cotangent, kernel: depthwise.input_gradient(
                kernel, cotangent, x.shape, strides, padding
            ),
            second=lambda x, cotangent: depthwise.kernel_gradient(
                x, cotangent, kernel.shape, strides, padding
            ),
        )
    *lead, channels = x.shape
    *taps, out_channels = kernel.shape
    alone = _of_one_group(
        jax.ShapeDtypeStruct((*lead, channels // groups), x.dtype),
        jax.ShapeDtypeStruct((*taps, out_channels // groups), x.dtype),
        strides,
        padding,
    )

    def each(form: bilinear.Form) -> bilinear.Form:
        def run(first: jax.Array, second: jax.Array) -> jax.Array:
            parts = (jnp.split(operand, groups, axis=3) for operand in (first, second))
            return jnp.concatenate([form(*pair) for pair in zip(*parts, strict=True)], axis=3)

        return run

    return bilinear.Forms(*map(each, alone))


def _of_one_group(
    x: jax.ShapeDtypeStruct,
    kernel: jax.ShapeDtypeStruct,
    strides: tuple[int, int],
    padding: Pads,
) -> bilinear.Forms:
    if kernel.shape[:2] == (1, 1):

        def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
            pixels = geometry.pad(x, padding)
            pixels = pixels[:, :: strides[0], :: strides[1]]
            return lax.dot_general(pixels, kernel[0, 0], (((3,), (0,)), ((), ())))

        return bilinear.transposed(product, x, kernel)

    def convolve(cotangent: jax.Array, taps: jax.Array, pads: Pads) -> jax.Array:
        return _plain(cotangent, jnp.flip(taps, (0, 1)).transpose(0, 1, 3, 2), (1, 1), pads)

    return bilinear.Forms(
        output=lambda x, kernel: _plain(x, kernel, strides, padding),
        first=lambda cotangent, kernel: geometry.input_gradient(
            convolve, kernel, cotangent, x.shape[1:3], strides, padding
        ),
        second=lambda x, cotangent: _kernel_gradient(
            x, cotangent, kernel.shape[:2], strides, padding
        ),
    )


def _kernel_gradient(
    x: jax.Array,
    cotangent: jax.Array,
    size: tuple[int, ...],
    strides: tuple[int, int],
    padding: Pads,
) -> jax.Array:
    """Convolve the images with the cotangent, channels as batch and batch as channels."""
    batch, height, width, out_channels = cotangent.shape
    shape = (*size, x.shape[3], out_channels)
    if strides == (1, 1) and winograd.pays(
        x.shape, shape, (height, width), fewest=winograd.GRADIENT
    ):
        return _one_by_one(
            lambda x, cotangent: winograd.kernel_gradient(x, cotangent, size[0], padding),
            is_by_image=False,
        )(x, cotangent)
    weights_per_tap = x.shape[3] * out_channels
    # Crop what no tap of the kernel reaches.
    down, across = (
        (before, size[i] + strides[i] * (cotangent.shape[i + 1] - 1) - x.shape[i + 1] - before)
        for i, (before, _) in enumerate(padding)
    )
    pads = down, across
    if strides != (1, 1) and weights_per_tap >= _MANY_WEIGHTS:
        return _kernel_gradient_by_taps(geometry.pad(x, pads), cotangent, size, strides)
    is_large = weights_per_tap >= _SOME_WEIGHTS and height * width >= _SOME_PIXELS
    num_groups = max(1, min(_MAX_GROUPS, batch // _GROUP)) if is_large else 1
    ends = [batch * i // num_groups for i in range(num_groups + 1)]
    parts = [
        _plain(
            x[begin:end].transpose(3, 1, 2, 0),
            cotangent[begin:end].transpose(1, 2, 0, 3),
            (1, 1),
            pads,
            dilation=strides,
        )
        for begin, end in itertools.pairwise(ends)
    ]
    return functools.reduce(jnp.add, parts).transpose(1, 2, 0, 3)


def _kernel_gradient_by_taps(
    x: jax.Array, cotangent: jax.Array, size: tuple[int, ...], strides: tuple[int, int]
) -> jax.Array:
    """Multiply for each tap the pixels of padded images that it meets with the cotangent."""
    flat = cotangent.reshape(-1, cotangent.shape[3])

    def one(i: int, j: int) -> jax.Array:
        met = geometry.met(x, (i, j), strides, cotangent.shape[1:3])
        return met.reshape(-1, x.shape[3]).T @ flat

    return jnp.stack([jnp.stack([one(i, j) for j in range(size[1])]) for i in range(size[0])])


def _plain(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Any,
    *,
    dilation: tuple[int, int] = (1, 1),
) -> jax.Array:
    """Run a forward convolution, Winograd's or XLA's; under ``vmap`` over kernels in sequence."""

    def convolve(x, kernel):
        outputs = geometry.outputs(x.shape, kernel.shape, strides, padding)
        if strides == dilation == (1, 1) and winograd.pays(
            x.shape, kernel.shape, outputs, fewest=winograd.CONVOLVE
        ):
            return winograd.convolve(x, kernel, padding)
        x, pads = _crop(x, padding)
        if dilation == (1, 1) and (number := _neighbours(kernel.shape, outputs[1])) > 1:
            return _side_by_side(x, kernel, strides, pads, number)
        return lax.conv_general_dilated(
            x, kernel, strides, pads, rhs_dilation=dilation, dimension_numbers=_LAYOUT
        )

    return _one_by_one(convolve, is_by_image=True)(x, kernel)


def _crop(x: jax.Array, padding: Pads) -> tuple[jax.Array, Pads]:
    """Pad by itself where the padding crops at the start, or crops all.

    There XLA's CPU convolution reads past the images, and gives what it finds (openxla/xla#48713).
    """
    first, rest = (
        tuple(
            (0, 0) if is_first != (low < 0 or size + high <= 0) else (low, high)
            for size, (low, high) in zip(x.shape[1:3], padding, strict=True)
        )
        for is_first in (True, False)
    )
    if any(map(any, first)):
        x = geometry.pad(x, (first[0], first[1]))
    return x, (rest[0], rest[1])


def _neighbours(kernel: tuple[int, ...], width: int) -> int:
    """Choose how many outputs of a row are computed as one: 1, 2 or 4."""
    _, taps, in_channels, out_channels = kernel
    if in_channels >= _ENOUGH_IN or taps > _FEW_TAPS:
        return 1
    enough = _ENOUGH_OUT_OF_COLOURS if in_channels in (2, 3) else _ENOUGH_OUT
    number = next((n for n in (1, 2) if n * out_channels >= enough), 4)
    while width % number:
        number //= 2
    return number


def _side_by_side(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Any, number: int
) -> jax.Array:
    """Compute `number` neighbours in a row as channels of one output, by a wider kernel.

    Its copies of the taps are shifted by a stride each, and what they do not reach is zero.
    """
    down, across = strides
    copies = [
        jnp.pad(kernel, ((0, 0), (i * across, (number - 1 - i) * across), (0, 0), (0, 0)))
        for i in range(number)
    ]
    output = lax.conv_general_dilated(
        x,
        jnp.concatenate(copies, axis=3),
        (down, number * across),
        padding,
        dimension_numbers=_LAYOUT,
    )
    batch, height, width, _ = output.shape
    return output.reshape(batch, height, number * width, kernel.shape[3])


def _one_by_one(function: Any, *, is_by_image: bool) -> Any:
    """Map a function of images and something else under ``vmap`` client by client.

    If each image has its own output, images alone under ``vmap`` become one larger batch.
    """

    def rule(axis_size, in_batched, x, other):
        x_batched, other_batched = in_batched
        if not other_batched and is_by_image:
            outputs = run(x.reshape(axis_size * x.shape[1], *x.shape[2:]), other)
            return outputs.reshape(axis_size, x.shape[1], *outputs.shape[1:]), True
        if not x_batched:
            return lax.map(lambda other: run(x, other), other), True
        if not other_batched:
            return lax.map(lambda x: run(x, other), x), True
        return lax.map(lambda pair: run(*pair), (x, other)), True

    run = jax.custom_batching.custom_vmap(function)
    run.def_vmap(rule)
    return run
