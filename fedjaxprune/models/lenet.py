"""Two 5×5 convolutions with max-pooling: LeNet-5 and the CNN of the first federated papers."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from fedjaxprune.kernels import shapes
from fedjaxprune.models import adapters, layers
from fedjaxprune.registry import Part, call
from fedjaxprune.types import Model


class SmallCnn(nn.Module):
    """Two 5×5 convolutions, each with ReLU and 2×2 max-pooling, then dense layers with ReLU.

    Attributes:
      channels: of the two convolutions.
      paddings: zeros on each side, of the two convolutions.
      hidden_sizes: widths of the hidden dense layers.
      num_classes: width of the output.
    """

    channels: tuple[int, int]
    paddings: tuple[int, int]
    hidden_sizes: Sequence[int]
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[B, H, W, C]`` to logits ``[B, num_classes]``."""
        for i in range(2):
            x = layers.ConvReluMaxPool(self.channels[i], 5, self.paddings[i], name=f"conv_{i + 1}")(
                x
            )
        x = x.reshape(x.shape[0], -1)
        for i, size in enumerate(self.hidden_sizes, start=1):
            x = nn.relu(layers.Dense(size, name=f"dense_{i}")(x))
        return layers.Dense(self.num_classes, name=f"dense_{len(self.hidden_sizes) + 1}")(x)


def lenet5(*, input_shape: Sequence[int], num_classes: int) -> Model:
    """Make LeNet-5 with ReLU and max-pooling, as federated pruning papers use it.

    Convolutions of 6 (padding 2) and 16 (no padding) channels, dense layers of 120 and 84: 61,706
    parameters for 28×28×1 and 10 classes, of which 61,470 are kernels. PyTorch's initialization.

    Args:
      input_shape: height, width and channels of one example; at least 12×12.
      num_classes: width of the output.

    Raises:
      ValueError: if the examples are no images, or too small.

    References:
      LeCun et al., Gradient-based learning applied to document recognition, 1998.
    """
    shapes.check_sizes(num_classes, input_shape=input_shape)
    shapes.check_image("lenet5", input_shape, smallest=12)
    module = SmallCnn(
        channels=(6, 16), paddings=(2, 0), hidden_sizes=(120, 84), num_classes=num_classes
    )
    return adapters.from_linen(module, input_shape=input_shape)


def cnn(*, input_shape: Sequence[int], num_classes: int) -> Model:
    """Make the two-layer CNN of the first federated-learning papers.

    Convolutions of 32 and 64 channels that keep the size, a dense layer of 512: 1,663,370
    parameters for 28×28×1 and 10 classes. PyTorch's initialization.

    Args:
      input_shape: height, width and channels of one example; at least 4×4.
      num_classes: width of the output.

    Raises:
      ValueError: if the examples are no images, or too small.

    References:
      McMahan et al., `Communication-efficient learning of deep networks from decentralized data
      <https://arxiv.org/abs/1602.05629>`_, 2017.
    """
    shapes.check_sizes(num_classes, input_shape=input_shape)
    shapes.check_image("cnn", input_shape, smallest=4)
    module = SmallCnn(
        channels=(32, 64), paddings=(2, 2), hidden_sizes=(512,), num_classes=num_classes
    )
    return adapters.from_linen(module, input_shape=input_shape)


PARTS = {
    "lenet5": Part(call(lenet5), summary="two convolutions, three dense layers"),
    "cnn": Part(call(cnn), summary="two 5x5 convolutions, 512 hidden units"),
}
