"""Wide residual networks, whose blocks normalize before they convolve."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import pydantic

from fedjaxprune.kernels import pooling, shapes
from fedjaxprune.models import adapters, layers, resnet
from fedjaxprune.registry import Part, call
from fedjaxprune.settings import Count, Fraction, setting
from fedjaxprune.types import Model

_NARROW = 16  # channels of the stem, and of the first stage with a width of 1


class Block(nn.Module):
    """Normalization, ReLU and a 3×3 convolution, twice, around a shortcut.

    A shortcut that changes the width is a 1×1 convolution of the normalized input, named
    ``shortcut``.
    """

    features: int
    stride: int
    norm: resnet.Norm
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Map ``[B, H, W, C]`` to ``[B, H / stride, W / stride, features]``."""
        active = resnet.NormLayer(self.norm, name="norm_1")(x, train, mask)
        active = layers.computed_once(nn.relu(active))
        if x.shape[-1] != self.features:
            x = layers.Conv(self.features, 1, self.stride, name="shortcut")(active)
        out = layers.Conv(self.features, 3, self.stride, name="conv_1")(active)
        out = nn.relu(resnet.NormLayer(self.norm, name="norm_2")(out, train, mask))
        out = nn.Dropout(self.dropout, deterministic=not train)(layers.computed_once(out))
        return layers.computed_once(layers.Conv(self.features, 3, name="conv_2")(out) + x)


class WideResNet(nn.Module):
    """A convolution, three stages of blocks, normalization, a global average and a dense layer."""

    widths: Sequence[int]
    depth: int
    num_classes: int
    norm: resnet.Norm
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Map ``[B, H, W, C]`` to logits ``[B, num_classes]``."""
        x = layers.Conv(_NARROW, 3, name="conv_1")(x)
        for i, width in enumerate(self.widths):
            for j in range(self.depth):
                stride = 2 if i > 0 and j == 0 else 1
                name = f"stage_{i + 1}_block_{j + 1}"
                x = Block(width, stride, self.norm, self.dropout, name=name)(x, train, mask)
        x = nn.relu(resnet.NormLayer(self.norm, name="norm_1")(x, train, mask))
        return layers.Dense(self.num_classes, name="dense_1")(pooling.global_average_pool(x))


def wide_resnet(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    norm: resnet.Norm,
    depth: int = 28,
    width: int = 2,
    dropout: float = 0.0,
) -> Model:
    """Make a wide ResNet of so many layers, with so many times 16, 32 and 64 channels.

    Parameters for 10 classes by depth and width: 2,748,890 (16, 4), 10,961,370 (16, 8), 1,467,610
    (28, 2) and 36,479,194 (28, 10). Convolutions start as He's normal by fan-out, the dense layer
    as in PyTorch.

    Args:
      input_shape: height, width and channels of one example; at least 4×4.
      num_classes: width of the output.
      norm: ``"batch"`` or ``"group"``.
      depth: 4 more than a multiple of 6: 10, 16, 22, 28, 34, 40, ...
      width: factor of the channels.
      dropout: rate between the convolutions of a block.

    Raises:
      ValueError: if the examples are no images, or too small, or an option is out of range.

    References:
      Zagoruyko and Komodakis, `Wide residual networks <https://arxiv.org/abs/1605.07146>`_, 2016.
    """
    shapes.check_sizes(num_classes, input_shape=input_shape, width=(width,))
    resnet.check_norm(norm)
    shapes.check_rate("dropout", dropout)
    shapes.check_image("wide_resnet", input_shape, smallest=4)
    widths = [width * _NARROW * 2**i for i in range(3)]
    module = WideResNet(widths, (_known(depth) - 4) // 6, num_classes, norm, dropout)
    return adapters.from_linen(module, input_shape=input_shape)


def _known(depth: Any) -> int:
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"depth must be one of 10, 16, 22, 28, 34, 40, ..., got {depth}.")
    return depth


class WideResNetSettings(resnet.SmallSettings):
    """Settings of wide ResNets."""

    depth: Count = setting(28, "Layers: 10, 16, 22, 28, 34, 40, ...", unit="layers", le=1000)
    width: Count = setting(2, "Factor of the channels of the stages, 16, 32 and 64.", le=1000)
    dropout: Fraction = setting(0.0, "Dropout rate inside the blocks.", unit="fraction")

    _is_known = pydantic.field_validator("depth")(_known)


PARTS = {
    "wide_resnet": Part(
        call(wide_resnet),
        WideResNetSettings,
        summary="pre-activation residual 28-2, 1.5 million weights; any depth and width",
    )
}
