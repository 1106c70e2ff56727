"""Winograd's convolution is the plain one, to rounding, and serves only where it pays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedjaxprune.kernels import convolution, winograd

KEY = jax.random.key(0)
LAYOUT = ("NHWC", "HWIO", "NHWC")
CASES = [
    # images, kernel, padding
    ((2, 8, 8, 5), (3, 3, 5, 4), ((1, 1), (1, 1))),
    ((2, 14, 9, 3), (5, 5, 3, 4), ((2, 2), (2, 2))),
    ((1, 6, 7, 2), (3, 3, 2, 3), ((0, 0), (0, 2))),
    ((3, 9, 11, 2), (5, 5, 2, 3), ((0, 3), (-1, 1))),
    ((2, 3, 4, 2), (3, 3, 2, 2), ((1, 0), (1, 1))),  # fewer rows than a tile
]


def plain(x, kernel, padding):
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=LAYOUT)


def relative_error(value, expected):
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    assert value.shape == expected.shape
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


def drawn(shape, number):
    return jax.random.normal(jax.random.fold_in(KEY, number), shape)


@pytest.mark.parametrize("taps", [3, 5])
def test_the_matrices_convolve_exactly(taps):
    matrices = winograd.transforms(taps)
    generator = np.random.default_rng(0)
    signal = generator.integers(-9, 9, winograd.TILE + taps - 1).astype(float)
    kernel = generator.integers(-9, 9, taps).astype(float)
    result = matrices.outputs @ ((matrices.kernel @ kernel) * (matrices.images @ signal))
    np.testing.assert_allclose(result, np.correlate(signal, kernel, "valid"), rtol=0, atol=1e-10)


@pytest.mark.usual(
    "shape0-kernel_shape0-padding0-1",
    "shape1-kernel_shape1-padding1-2",
    "shape3-kernel_shape3-padding3-1",
    "shape4-kernel_shape4-padding4-2",
)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("shape", "kernel_shape", "padding"), CASES)
def test_it_is_the_plain_convolution(shape, kernel_shape, padding, parts, monkeypatch):
    if parts > 1:  # a batch too large for the cache is cut into parts
        monkeypatch.setattr(winograd, "_MANY_BYTES", 0)
        monkeypatch.setattr(winograd, "_CACHED_BYTES", 64)
        shape = (6, *shape[1:])
    x, kernel = drawn(shape, 0), drawn(kernel_shape, 1)
    expected, pull_back = jax.vjp(lambda kernel: plain(x, kernel, padding), kernel)
    outputs = jax.jit(winograd.convolve, static_argnums=2)(x, kernel, padding)
    assert relative_error(outputs, expected) < 5e-6
    cotangent = drawn(expected.shape, 2)
    gradient = jax.jit(winograd.kernel_gradient, static_argnums=(2, 3))(
        x, cotangent, kernel_shape[0], padding
    )
    assert relative_error(gradient, pull_back(cotangent)[0]) < 5e-6


def test_all_directions_of_a_large_layer_go_winograds_way():
    x, kernel = drawn((32, 14, 14, 32), 0), 0.03 * drawn((5, 5, 32, 64), 1)  # outputs about 1

    def run(function, x, kernel):
        outputs, pull_back = jax.vjp(function, x, kernel)
        return outputs, pull_back(jnp.cos(outputs))

    def ours(x, kernel):
        return convolution.conv(x, kernel, strides=(1, 1), padding=((2, 2), (2, 2)))

    graph = str(jax.make_jaxpr(lambda x, k: run(ours, x, k))(x, kernel))
    assert "= conv_general_dilated[" not in graph
    expected = jax.jit(lambda x, k: run(lambda x, k: plain(x, k, ((2, 2), (2, 2))), x, k))(
        x, kernel
    )
    result = jax.jit(lambda x, k: run(ours, x, k))(x, kernel)
    for value, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert relative_error(value, other) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [(0, 0), *(pytest.param(a, marks=pytest.mark.slow) for a in ((None, 0), (0, None)))]
)
def test_under_vmap_the_gradient_follows_client_by_client(axes):
    x = drawn((2, 32, 14, 14, 32) if axes[0] == 0 else (32, 14, 14, 32), 0)
    kernel = 0.03 * drawn((2, 5, 5, 32, 64) if axes[1] == 0 else (5, 5, 32, 64), 1)

    def loss(x, kernel):
        outputs = convolution.conv(x, kernel, strides=(1, 1), padding=((2, 2), (2, 2)))
        return jnp.mean(jnp.sin(outputs))

    gradients = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)), axes))(x, kernel)
    for i in range(2):
        one = jax.jit(jax.grad(loss, argnums=(0, 1)))(
            x[i] if axes[0] == 0 else x, kernel[i] if axes[1] == 0 else kernel
        )
        for value, other in zip(gradients, one, strict=True):
            assert relative_error(value[i], other) < 1e-5


@pytest.mark.parametrize(
    ("x", "kernel", "outputs"),
    [
        ((64, 16, 16, 64), (1, 3, 64, 64), (16, 14)),  # not square
        ((64, 16, 16, 64), (7, 7, 64, 64), (16, 16)),  # no transforms for 7 taps
        ((64, 16, 16, 3), (3, 3, 3, 64), (16, 16)),  # too few channels
        ((1024, 5, 5, 64), (3, 3, 64, 64), (5, 5)),  # tiles mostly of filling
        ((1, 16, 16, 512), (3, 3, 512, 512), (16, 16)),  # too few tiles
        ((16, 16, 16, 32), (3, 3, 32, 32), (16, 16)),  # too little work
        ((64, 32, 32, 16), (3, 3, 16, 16), (32, 32)),  # so few channels want more work
        ((64, 4, 4, 64), (3, 3, 64, 64), (-16, -16)),  # cropped to nothing
    ],
)
def test_it_does_not_serve_where_it_does_not_pay(x, kernel, outputs):
    assert not winograd.pays(x, kernel, outputs, fewest=winograd.GRADIENT)


@pytest.mark.parametrize(
    ("x", "kernel", "outputs"),
    [
        ((64, 16, 16, 64), (3, 3, 64, 64), (16, 16)),
        ((32, 8, 8, 64), (3, 3, 64, 64), (8, 8)),  # less work, more channels
        ((64, 32, 32, 16), (5, 5, 16, 32), (32, 32)),  # few channels, much work
    ],
)
def test_it_serves_where_it_pays(x, kernel, outputs):
    assert winograd.pays(x, kernel, outputs, fewest=winograd.CONVOLVE)
