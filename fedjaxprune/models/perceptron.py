"""Multi-layer perceptrons."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjaxprune.kernels import shapes
from fedjaxprune.models import adapters, layers
from fedjaxprune.registry import Part, call
from fedjaxprune.settings import Counts, Settings, setting
from fedjaxprune.types import Model


class Mlp(nn.Module):
    """Dense layers with ReLU between them."""

    hidden_sizes: Sequence[int]
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[B, ...]`` to logits ``[B, num_classes]``."""
        if jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"mlp reads numbers, not tokens, which are integers, got {x.dtype}.")
        x = x.reshape(x.shape[0], -1)
        for i, size in enumerate(self.hidden_sizes, start=1):
            x = nn.relu(layers.Dense(size, name=f"dense_{i}")(x))
        return layers.Dense(self.num_classes, name=f"dense_{len(self.hidden_sizes) + 1}")(x)


def mlp(
    *, input_shape: Sequence[int], num_classes: int, hidden_sizes: Sequence[int] = (200, 100)
) -> Model:
    """Make a multi-layer perceptron with ReLU and PyTorch's initialization.

    Args:
      input_shape: of one example, any rank.
      num_classes: width of the output.
      hidden_sizes: widths of the hidden layers.

    Raises:
      ValueError: if a size is not positive.
    """
    shapes.check_sizes(num_classes, input_shape=input_shape, hidden_sizes=hidden_sizes)
    module = Mlp(hidden_sizes=tuple(hidden_sizes), num_classes=num_classes)
    return adapters.from_linen(module, input_shape=input_shape)


class MlpSettings(Settings):
    """Settings of `mlp`."""

    hidden_sizes: Counts = setting((200, 100), "Widths of the hidden layers.", unit="units")


PARTS = {"mlp": Part(call(mlp), MlpSettings, summary="two hidden layers; any numeric input")}
