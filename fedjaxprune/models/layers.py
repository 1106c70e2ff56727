"""Layers of the built-in networks, as flax modules whose convolutions stay fast on CPU."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from fedjaxprune.models import blocked

uniform_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what PyTorch draws, and the papers' code with it."""


def uniform_bias(fan_in: int) -> nn.initializers.Initializer:
    """Make the initialiser of the bias beside a `uniform_kernel`, with the same bounds."""

    def init_fn(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init_fn


class Dense(nn.Module):
    """A dense layer with PyTorch's initialisation.

    Attributes:
      features: width of the output.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[B, F]`` to ``[B, features]``."""
        fan_in = x.shape[-1]
        kernel = self.param("kernel", uniform_kernel, (fan_in, self.features))
        bias = self.param("bias", uniform_bias(fan_in), (self.features,))
        return x @ kernel + bias[None]


class ConvReluMaxPool(nn.Module):
    """A convolution, ReLU and 2×2 max-pooling with stride 2, with PyTorch's initialisation.

    Attributes:
      features: channels of the output.
      kernel_size: side of the kernel.
      padding: zeros added on each side.
    """

    features: int
    kernel_size: int
    padding: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[B, H, W, C]`` to ``[B, H', W', features]``."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        fan_in = self.kernel_size**2 * x.shape[-1]
        kernel = self.param("kernel", uniform_kernel, shape)
        bias = self.param("bias", uniform_bias(fan_in), (self.features,))
        if jax.default_backend() == "cpu":
            block = 4 if x.shape[-1] * self.features <= 16 else 2
            return blocked.conv_relu_max_pool(x, kernel, bias, padding=self.padding, block=block)
        x = lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(1, 1),
            padding=[(self.padding, self.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return nn.max_pool(nn.relu(x + bias[None, None, None]), (2, 2), strides=(2, 2))
