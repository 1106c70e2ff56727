"""AlexNet in its CIFAR form."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from fedjaxprune.kernels import pooling, shapes
from fedjaxprune.models import adapters, layers
from fedjaxprune.registry import Part, call
from fedjaxprune.types import Model


class AlexNet(nn.Module):
    """Five 3×3 convolutions, three 2×2 max-poolings and three dense layers, with dropout.

    Attributes:
      num_classes: width of the output.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[B, H, W, C]`` to logits ``[B, num_classes]``."""
        for i, width in enumerate((64, 192, 384, 256, 256), start=1):
            stride = 2 if i == 1 else 1
            x = layers.Conv(width, 3, stride, bias="channel", start="torch", name=f"conv_{i}")(x)
            x = nn.relu(pooling.max_pool(x) if i in (1, 2, 5) else x)  # they commute
        x = pooling.adaptive_average_pool(x, size=2)
        x = x.reshape(x.shape[0], -1)
        for i in (1, 2):
            x = nn.Dropout(0.5, deterministic=not train)(x)
            x = nn.relu(layers.Dense(4096, name=f"dense_{i}")(x))
        return layers.Dense(self.num_classes, name="dense_3")(x)


def alexnet(*, input_shape: Sequence[int], num_classes: int) -> Model:
    """Make AlexNet in the CIFAR form of FedDIP's code.

    23,272,266 parameters for 32×32×3 and 10 classes, of which 23,262,912 are kernels; nine tenths
    are in the dense layers. PyTorch's initialization.

    Args:
      input_shape: height, width and channels of one example; at least 15×15.
      num_classes: width of the output.

    Raises:
      ValueError: if the examples are no images, or too small.

    References:
      Long et al., `FedDIP <https://arxiv.org/abs/2309.06805>`_, 2023, and its public code.
    """
    shapes.check_sizes(num_classes, input_shape=input_shape)
    shapes.check_image("alexnet", input_shape, smallest=15)
    return adapters.from_linen(AlexNet(num_classes=num_classes), input_shape=input_shape)


PARTS = {
    "alexnet": Part(call(alexnet), summary="CIFAR form, 23 million weights (FedDIP)"),
}
