"""Layers of the built-in networks, as flax modules whose convolutions stay fast on CPU."""

import math
from typing import Literal

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from fedjaxprune import live_weights
from fedjaxprune.kernels import blocked, convolution, dense, pooling, storing
from fedjaxprune.models import precision

uniform_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what PyTorch draws, and the papers' code with it."""


def uniform_bias(fan_in: int) -> nn.initializers.Initializer:
    """Make the initializer of the bias beside a `uniform_kernel`, with the same bounds."""

    def init_fn(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init_fn


def param(
    module: nn.Module, name: str, start: nn.initializers.Initializer, shape: tuple[int, ...]
) -> jax.Array:
    """Give a module's parameter, which `start` draws where there is none yet.

    What flax's own `param` does, but that traces the draw again wherever a parameter is read, for
    its shape alone: half of the time that it takes to trace a network.

    Raises:
      ScopeParamShapeError: the parameter there has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, start, shape)
    value = module.get_variable("params", name)
    if jnp.shape(value) != shape:
        where = "/".join(module.path)
        raise flax.errors.ScopeParamShapeError(name, where, jnp.shape(value), shape)
    return value


def computed_once(x: jax.Array) -> jax.Array:
    """Return ``[B, ...]`` as an array that XLA stores (`storing.stored`).

    Else each block of a residual network repeats all blocks before it, and every kernel's gradient
    repeats them, too.
    """
    return storing.stored(x)


Start = Literal["he", "torch", "xavier", "normal"]


def _start(kind: Start, fan_in: int) -> tuple[nn.initializers.Initializer, ...]:
    """Choose how kernel and bias start: `Conv` says what the kinds are."""
    if kind == "torch":
        return uniform_kernel, uniform_bias(fan_in)
    if kind == "normal":
        return nn.initializers.normal(0.02), nn.initializers.zeros
    he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    return he if kind == "he" else nn.initializers.xavier_normal(), nn.initializers.zeros


class Dense(nn.Module):
    """A dense layer."""

    features: int
    start: Start = "torch"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[..., F]`` to ``[..., features]``."""
        fan_in = x.shape[-1]
        kernel_start, bias_start = _start(self.start, fan_in)
        kernel = param(self, "kernel", kernel_start, (fan_in, self.features))
        bias = param(self, "bias", bias_start, (self.features,))
        product = dense.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        return product + bias.reshape(*[1] * (x.ndim - 1), -1)


def _convolve(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: int, groups: int = 1
) -> jax.Array:
    return convolution.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


class ConvReluMaxPool(nn.Module):
    """A convolution, ReLU and 2×2 max-pooling with stride 2, with PyTorch's initialization."""

    features: int
    kernel_size: int
    padding: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[B, H, W, C]`` to ``[B, H', W', features]``."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        fan_in = self.kernel_size**2 * x.shape[-1]
        kernel = param(self, "kernel", uniform_kernel, shape)
        bias = param(self, "bias", uniform_bias(fan_in), (self.features,))
        # Blocks pay where channels are few; measured on 28×28×1 and 14×14×6 against 14×14×32.
        if x.shape[-1] < 16:
            block = 4 if x.shape[-1] * self.features <= 16 else 2
            return blocked.conv_relu_max_pool(x, kernel, bias, padding=self.padding, block=block)
        x = _convolve(x, kernel, stride=1, padding=self.padding)
        # The bias and ReLU commute with the maximum, and cost a quarter after it.
        return nn.relu(pooling.max_pool(x) + bias[None, None, None])


class Conv(nn.Module):
    """A square convolution.

    Attributes:
      features: channels of the output.
      kernel_size: side of the kernel.
      stride: both down and across.
      padding: zeros on each side; None takes half the kernel, which keeps the image's size.
      bias: ``"none"`` where normalization follows, ``"channel"`` for one a channel.
      start: initialization: ``"he"`` draws He's normal by fan-out, ``"xavier"`` Xavier's normal and
        ``"normal"`` one of deviation 0.02, all with biases of zero, ``"torch"`` what PyTorch does
        by default.
      groups: of channels that are convolved by themselves; as many as channels: depthwise.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int | None = None
    bias: Literal["none", "channel"] = "none"
    start: Start = "he"
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[B, H, W, C]`` to ``[B, H', W', features]``."""
        inputs = x.shape[-1] // self.groups
        shape = (self.kernel_size, self.kernel_size, inputs, self.features)
        kernel_start, bias_start = _start(self.start, self.kernel_size**2 * inputs)
        kernel = param(self, "kernel", kernel_start, shape)
        padding = self.kernel_size // 2 if self.padding is None else self.padding
        x = _convolve(x, kernel, stride=self.stride, padding=padding, groups=self.groups)
        if self.bias == "none":
            return x
        return x + param(self, "bias", bias_start, (self.features,))[None, None, None]


# A ReLU of a normal number of variance 1 has variance (1 - 1 / pi) / 2, which this undoes.
RELU_GAIN = (2.0 / (1.0 - 1.0 / math.pi)) ** 0.5


class NormalizedConv(nn.Module):
    """A square convolution with normalized live weights, and a gain and a bias a channel.

    Attributes:
      features: channels of the output.
      kernel_size: side of the kernel; zeros around the image keep its size.
      stride: both down and across.
      gain: at the start; 0 closes a branch, as is usual in residual networks that do not normalize.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[B, H, W, C]`` to ``[B, H', W', features]``."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        start = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        kernel = self.param("kernel", start, shape)
        live = self.variable(live_weights.COLLECTION, "kernel", jnp.ones, shape).value
        gain = self.param("gain", nn.initializers.constant(self.gain), (self.features,))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = live_weights.normalize(kernel, live)
        x = _convolve(x, kernel, stride=self.stride, padding=self.kernel_size // 2)
        return x * gain[None, None, None] + bias[None, None, None]


class BatchNorm(nn.Module):
    """Batch normalization over the examples that count.

    Statistics are taken in float32, whatever the images are in.
    Filling (weight 0) enters neither the batch's statistics nor the running ones, and a single
    value of a channel, which has no variance, leaves the running variance alone. The running
    statistics start at mean 0 and variance 1, live in the collection ``batch_stats`` and follow the
    batch's with momentum 0.9; like PyTorch's, their variance is the unbiased one.

    Attributes:
      epsilon: added to the variance.
      momentum: share of the old running statistics that a step keeps.

    References:
      Ioffe and Szegedy, `Batch normalization <https://arxiv.org/abs/1502.03167>`_, 2015.
    """

    epsilon: float = 1e-5
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Normalize the channels of ``[B, H, W, C]``; `mask` is ``[B]`` bool, False for filling."""
        shape = x.shape[-1:]
        scale = param(self, "scale", nn.initializers.ones, shape)
        bias = param(self, "bias", nn.initializers.zeros, shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        dtype = x.dtype
        x, scale, bias = (precision.widen(array) for array in (x, scale, bias))
        if not train:
            factor = scale * lax.rsqrt(running_var.value + self.epsilon)
            shift = bias - running_mean.value * factor
            return (x * factor[None, None, None] + shift[None, None, None]).astype(dtype)
        if mask is None:
            mask = jnp.ones(x.shape[:1], jnp.bool_)
        count = (jnp.sum(mask, dtype=jnp.int32) * (x.shape[1] * x.shape[2])).astype(x.dtype)
        share = jnp.where(mask, jnp.ones((), x.dtype) / jnp.maximum(count, 1), 0)
        share = share[:, None, None, None]
        mean = jnp.sum(x * share, axis=(0, 1, 2))
        centred = x - mean[None, None, None]
        var = jnp.sum(jnp.square(centred) * share, axis=(0, 1, 2))
        any_counts = count > 0
        if not self.is_initializing():
            unbiased = var * (count / jnp.maximum(count - 1, 1))
            for running, value, least in ((running_mean, mean, 1), (running_var, unbiased, 2)):
                moved = self.momentum * running.value + (1 - self.momentum) * value
                running.value = jnp.where(count >= least, moved, running.value)
        # A batch that is all filling has no variance, and must not grow from layer to layer.
        factor = jnp.where(any_counts, scale * lax.rsqrt(var + self.epsilon), 0)
        return (centred * factor[None, None, None] + bias[None, None, None]).astype(dtype)


class GroupNorm(nn.Module):
    """Group normalization: each example by itself, so that filling and clients cannot leak.

    Statistics are taken in float32, whatever the images are in.

    Attributes:
      num_groups: of neighbouring channels; must divide their number.
      epsilon: added to the variance.

    References:
      Wu and He, `Group normalization <https://arxiv.org/abs/1803.08494>`_, 2018.
    """

    num_groups: int
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize ``[B, H, W, C]`` over height, width and the channels of a group."""
        batch, height, width, channels = x.shape
        scale = param(self, "scale", nn.initializers.ones, (channels,))
        bias = param(self, "bias", nn.initializers.zeros, (channels,))
        dtype = x.dtype
        x, scale, bias = (precision.widen(array) for array in (x, scale, bias))
        groups = (batch, self.num_groups, channels // self.num_groups)
        size = height * width * groups[-1]
        # Sums over the image first: they keep the channels in their vectors.
        sums = jnp.sum(x, axis=(1, 2)).reshape(groups)
        mean = jnp.sum(sums, axis=-1, keepdims=True) / size
        mean = jnp.broadcast_to(mean, groups).reshape(batch, 1, 1, channels)
        centred = x - mean
        squares = jnp.sum(jnp.square(centred), axis=(1, 2)).reshape(groups)
        var = jnp.sum(squares, axis=-1, keepdims=True) / size
        factor = jnp.broadcast_to(lax.rsqrt(var + self.epsilon), groups)
        factor = factor.reshape(batch, 1, 1, channels) * scale[None, None, None]
        return (centred * factor + bias[None, None, None]).astype(dtype)


class LayerNorm(nn.Module):
    """Normalization of each position by itself, over its channels, with float32 statistics.

    Attributes:
      epsilon: added to the variance.

    References:
      Ba, Kiros and Hinton, `Layer normalization <https://arxiv.org/abs/1607.06450>`_, 2016.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize ``[..., C]`` over its last axis."""
        shape, lead = x.shape[-1:], [1] * (x.ndim - 1)
        scale = param(self, "scale", nn.initializers.ones, shape)
        bias = param(self, "bias", nn.initializers.zeros, shape)
        dtype = x.dtype
        x, scale, bias = (precision.widen(array) for array in (x, scale, bias))
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        var = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        x = centred * lax.rsqrt(var + self.epsilon)
        return (x * scale.reshape(*lead, -1) + bias.reshape(*lead, -1)).astype(dtype)
