"""The convolution is XLA's in value and gradients, and leaves no grouped one under vmap."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from fedjaxprune.costs import flops
from fedjaxprune.kernels import convolution
from tests import draws

KEY = jax.random.key(0)
LAYOUT = ("NHWC", "HWIO", "NHWC")
CASES = [
    # images, kernel, stride, padding
    ((2, 6, 7, 3), (3, 3, 3, 4), 1, "SAME"),
    ((2, 6, 7, 3), (3, 3, 3, 4), 2, "SAME"),
    ((2, 8, 8, 2), (3, 3, 2, 3), 2, [(1, 1), (1, 1)]),
    ((2, 9, 8, 2), (5, 5, 2, 3), 1, "VALID"),
    ((2, 9, 12, 2), (5, 3, 2, 3), 2, "VALID"),
    ((1, 8, 8, 2), (7, 7, 2, 2), 2, [(3, 3), (3, 3)]),
    ((2, 6, 6, 3), (1, 1, 3, 4), 1, "VALID"),
    ((2, 7, 6, 3), (1, 1, 3, 4), 2, "SAME"),
    ((2, 5, 5, 2), (2, 2, 2, 3), 2, [(0, 1), (1, 0)]),
    ((2, 7, 8, 2), (2, 2, 2, 3), 3, "VALID"),  # places that no tap reaches
    ((2, 8, 9, 2), (4, 3, 2, 3), (1, 2), [(2, 0), (-1, 1)]),
    ((2, 6, 8, 16), (3, 3, 16, 16), 1, "SAME"),  # two outputs of a row as one
    ((2, 6, 8, 1), (5, 5, 1, 6), 1, "SAME"),  # four
    ((2, 6, 24, 3), (3, 5, 3, 8), (1, 3), [(0, 1), (2, 0)]),  # four, three pixels apart
    ((32, 8, 8, 32), (3, 2, 32, 64), 1, "SAME"),  # kernel's gradient a few images at a time
    ((3, 6, 5, 128), (3, 3, 128, 256), 2, "SAME"),  # and by taps
    ((2, 5, 9, 8), (2, 2, 8, 2), 1, [(0, 0), (-3, 1)]),  # cropped and padded
    ((2, 5, 6, 8), (1, 2, 8, 3), 1, [(0, 0), (4, -1)]),  # more padding than taps
    ((2, 4, 4, 3), (5, 3, 3, 4), 2, [(0, 0), (1, 1)]),  # no outputs
    ((0, 6, 8, 3), (3, 3, 3, 4), 1, "SAME"),  # no images
]


def padded_first(x, kernel, strides, padding, *, dimension_numbers, feature_group_count=1):
    """Convolve by XLA, which on a CPU reads past the images where it is to crop their start."""
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    (top, bottom), (left, right) = padding
    config = [(0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0)]
    x = lax.pad(x, jnp.zeros((), x.dtype), config)
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        "VALID",
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
    )


def both_ways(function, x, kernel, stride, padding):
    strides = stride if isinstance(stride, tuple) else (stride, stride)

    def run(x, kernel):
        outputs, pull_back = jax.vjp(
            lambda x, k: function(x, k, strides, padding, dimension_numbers=LAYOUT),
            x,
            kernel,
        )
        cotangent = jax.random.normal(jax.random.fold_in(KEY, 2), outputs.shape)
        return outputs, pull_back(cotangent)

    return run(x, kernel)


def groups_in(function, *args, platform="cpu"):
    """List how many groups the convolutions of a lowered program have."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return set(map(int, re.findall(r"(?:feature|batch)_group_count = (\d+)", text)))


def check_close(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.max(np.abs(b), initial=0)))


@pytest.mark.usual(
    "shape0-kernel_shape0-1-SAME",
    "shape2-kernel_shape2-2-padding2",
    "shape3-kernel_shape3-1-VALID",
    "shape8-kernel_shape8-2-padding8",
    "shape10-kernel_shape10-stride10-padding10",
    "shape14-kernel_shape14-1-SAME",
    "shape17-kernel_shape17-1-padding17",
)
@pytest.mark.parametrize(("shape", "kernel_shape", "stride", "padding"), CASES)
def test_it_is_xlas_convolution(shape, kernel_shape, stride, padding):
    x = draws.normal(0, *shape)
    kernel = draws.normal(1, *kernel_shape)

    @jax.jit
    def pair(x, kernel):
        return [
            both_ways(function, x, kernel, stride, padding)
            for function in (convolution.conv_general_dilated, padded_first)
        ]

    check_close(*pair(x, kernel))


@pytest.mark.usual("0-axes0", "1-axes1", "7-axes2")
@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)])
@pytest.mark.parametrize("case", [0, 1, 7])
def test_under_vmap_it_is_one_client_after_the_other(axes, case):
    shape, kernel_shape, stride, padding = CASES[case]
    x = draws.normal(0, *((2, *shape) if axes[0] == 0 else shape))
    kernel = draws.normal(1, *((2, *kernel_shape) if axes[1] == 0 else kernel_shape))

    def one(x, kernel):
        return both_ways(convolution.conv_general_dilated, x, kernel, stride, padding)

    together = jax.vmap(one, axes)
    assert groups_in(together, x, kernel) <= {1}
    first = jax.jit(one)(x[0] if axes[0] == 0 else x, kernel[0] if axes[1] == 0 else kernel)
    check_close(jax.tree.map(lambda leaf: leaf[0], jax.jit(together)(x, kernel)), first)


GROUPED = [
    # images, kernel, stride, padding, groups
    ((2, 6, 7, 6), (3, 3, 1, 6), 1, "SAME", 6),
    ((2, 7, 6, 4), (3, 3, 1, 8), 2, "SAME", 4),  # two outputs of each channel
    ((2, 9, 8, 3), (5, 3, 1, 3), (1, 2), [(2, 1), (-1, 2)], 3),
    ((2, 7, 8, 3), (2, 2, 1, 3), 3, "VALID", 3),  # places that no tap reaches
    ((2, 5, 5, 4), (1, 1, 1, 4), 2, "SAME", 4),
    ((2, 3, 3, 4), (5, 5, 1, 4), 1, "VALID", 4),  # no outputs
    ((0, 6, 6, 4), (3, 3, 1, 4), 1, "SAME", 4),  # no images
    ((2, 6, 7, 6), (3, 3, 3, 4), 1, "SAME", 2),
    ((2, 8, 6, 8), (3, 3, 2, 8), 2, [(1, 1), (0, 1)], 4),
    ((2, 6, 6, 6), (1, 1, 2, 9), 1, "VALID", 3),
    ((1, 4, 4, 66), (3, 3, 2, 33), 1, "SAME", 33),  # too many: XLA's own
]


@pytest.mark.usual(
    "shape0-kernel_shape0-1-SAME-6",
    "shape2-kernel_shape2-stride2-padding2-3",
    "shape3-kernel_shape3-3-VALID-3",
    "shape10-kernel_shape10-1-SAME-33",
)
@pytest.mark.parametrize(("shape", "kernel_shape", "stride", "padding", "groups"), GROUPED)
def test_in_groups_it_is_xlas_convolution(shape, kernel_shape, stride, padding, groups):
    x = draws.normal(0, *shape)
    kernel = draws.normal(1, *kernel_shape)

    @jax.jit
    def pair(x, kernel):
        return [
            both_ways(
                functools.partial(function, feature_group_count=groups), x, kernel, stride, padding
            )
            for function in (convolution.conv_general_dilated, padded_first)
        ]

    check_close(*pair(x, kernel))


@pytest.mark.parametrize("case", [1, 8])
def test_groups_under_vmap_are_clients_by_themselves(case):
    shape, kernel_shape, stride, padding, groups = GROUPED[case]
    x = draws.normal(0, 3, *shape)
    kernel = draws.normal(1, 3, *kernel_shape)
    function = functools.partial(convolution.conv_general_dilated, feature_group_count=groups)

    def one(x, kernel):
        return both_ways(function, x, kernel, stride, padding)

    together = jax.vmap(one)
    assert groups_in(together, x, kernel) <= {1}
    alone = jax.jit(one)(x[1], kernel[1])
    check_close(jax.tree.map(lambda leaf: leaf[1], jax.jit(together)(x, kernel)), alone)


def test_groups_cost_what_they_stand_for():
    x, kernel = jnp.ones((1, 7, 6, 4)), jnp.ones((3, 3, 1, 8))

    def run(convolve):
        def function(kernel, x):
            return convolve(
                x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT, feature_group_count=4
            )

        return flops.dense(flops.of_function(function, kernel, x))

    assert run(convolution.conv_general_dilated) == run(lax.conv_general_dilated)


@pytest.mark.parametrize("kernel_shape", [(3, 3, 2, 4), (3, 3, 1, 6)])
def test_groups_that_do_not_divide_the_channels_are_refused(kernel_shape):
    x, kernel = jnp.ones((1, 6, 6, 4)), jnp.ones(kernel_shape)
    with pytest.raises((ValueError, TypeError), match="feature_group_count"):
        convolution.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT, feature_group_count=4
        )


def test_under_vmap_there_may_be_no_images():
    def one(x, kernel):
        return both_ways(convolution.conv_general_dilated, x, kernel, 1, "SAME")

    outputs, (_, gradient) = jax.vmap(one, (0, None))(
        jnp.ones((2, 0, 6, 8, 3)), jnp.ones((3, 3, 3, 4))
    )
    assert outputs.shape == (2, 0, 6, 8, 4)
    np.testing.assert_array_equal(gradient, 0)


def test_what_it_does_not_serve_goes_to_xla():
    x = jnp.ones((1, 6, 6, 4))
    kernel = jnp.ones((3, 3, 2, 4))

    def run(function):
        return function(
            x,
            kernel,
            (1, 1),
            "SAME",
            rhs_dilation=(2, 2),
            dimension_numbers=LAYOUT,
            feature_group_count=2,
        )

    check_close(run(convolution.conv_general_dilated), run(lax.conv_general_dilated))


def test_strides_that_xla_refuses_are_refused():
    operands = jnp.ones((1, 6, 6, 4)), jnp.ones((3, 3, 4, 2)), (1, 1, 1), [(1, 1)] * 2
    for function in (convolution.conv_general_dilated, lax.conv_general_dilated):
        with pytest.raises((ValueError, TypeError)):
            function(*operands, dimension_numbers=LAYOUT)


@pytest.mark.parametrize("library", [nn, nnx])
def test_it_serves_the_convolutions_of_flax(library):
    x = draws.normal(0, 2, 7, 6, 3)

    def run(**options):
        if library is nnx:
            return nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0), **options)(x)
        layer = nn.Conv(4, (3, 3), **options)
        return layer.apply(layer.init(KEY, x), x)

    check_close(
        jax.jit(lambda: run(conv_general_dilated=convolution.conv_general_dilated))(),
        jax.jit(run)(),
    )
