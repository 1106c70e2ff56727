"""ShuffleNetV2: halves of the channels that take turns, mixed by a shuffle between blocks."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import pydantic

from fedjaxprune.kernels import pooling, shapes
from fedjaxprune.models import adapters, layers, resnet
from fedjaxprune.registry import Part, call
from fedjaxprune.settings import Positive, setting
from fedjaxprune.types import Model

# Channels of the three stages and of the last convolution, by the factor of the widths.
WIDTHS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
_STEM = 24
_DEPTHS = (3, 7, 3)  # blocks of each stage after the one that halves the image


def shuffle(x: jax.Array) -> jax.Array:
    """Let the two halves of the channels of ``[B, H, W, C]`` take turns."""
    *outer, channels = x.shape
    return x.reshape(*outer, 2, channels // 2).swapaxes(-1, -2).reshape(x.shape)


class Unit(nn.Module):
    """A convolution, normalization and, unless it is ``linear``, ReLU."""

    features: int
    norm: resnet.Norm
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    linear: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Map ``[B, H, W, C]`` to ``[B, H', W', features]``."""
        size, stride = self.kernel_size, self.stride
        x = layers.Conv(self.features, size, stride, groups=self.groups, name="conv")(x)
        x = resnet.NormLayer(self.norm, name="norm")(x, train, mask)
        return x if self.linear else layers.computed_once(nn.relu(x))


def depthwise(x: jax.Array, norm: resnet.Norm, *, stride: int, linear: bool, name: str) -> Unit:
    """Make a 3×3 unit with a kernel of its own for each channel of `x`."""
    channels = x.shape[-1]
    return Unit(channels, norm, 3, stride, groups=channels, linear=linear, name=name)


class Block(nn.Module):
    """Half of the channels passes by, or in a block that halves the image both are convolved."""

    features: int
    stride: int
    norm: resnet.Norm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Map ``[B, H, W, C]`` to ``[B, H / stride, W / stride, features]``."""
        half = self.features // 2
        if self.stride == 1:
            first, x = jnp.split(x, 2, axis=-1)
        else:
            unit = depthwise(x, self.norm, stride=2, linear=True, name="left_depthwise")
            first = unit(x, train, mask)
            first = Unit(half, self.norm, name="left_pointwise")(first, train, mask)
        x = Unit(half, self.norm, name="pointwise_1")(x, train, mask)
        unit = depthwise(x, self.norm, stride=self.stride, linear=True, name="depthwise")
        x = Unit(half, self.norm, name="pointwise_2")(unit(x, train, mask), train, mask)
        return shuffle(jnp.concatenate([first, x], axis=-1))


class ShuffleNetV2(nn.Module):
    """A convolution, stages of blocks that each halve the image, a 1×1 convolution and an average.

    The stem ``"cifar"`` is a 3×3 convolution, ``"imagenet"`` one of stride 2 with 3×3 max-pooling
    of stride 2 after it.
    """

    widths: Sequence[int]
    depths: Sequence[int]
    num_classes: int
    norm: resnet.Norm
    stem: resnet.Stem

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Map ``[B, H, W, C]`` to logits ``[B, num_classes]``."""
        stride = 2 if self.stem == "imagenet" else 1
        x = Unit(_STEM, self.norm, 3, stride, name="stem")(x, train, mask)
        if self.stem == "imagenet":
            x = pooling.max_pool_3(x)
        *widths, last = self.widths
        for i, (width, depth) in enumerate(zip(widths, self.depths, strict=True), start=1):
            for j in range(1 + depth):
                block = Block(width, 1 if j else 2, self.norm, name=f"stage_{i}_block_{j + 1}")
                x = block(x, train, mask)
        x = Unit(last, self.norm, name="last")(x, train, mask)
        return layers.Dense(self.num_classes, name="dense_1")(pooling.global_average_pool(x))


def shufflenet_v2(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    norm: resnet.Norm,
    width: float = 0.5,
    stem: resnet.Stem = "cifar",
) -> Model:
    """Make ShuffleNetV2, by default in its CIFAR form: a stem of stride 1 without pooling.

    352,042 parameters for 10 classes with a `width` of 0.5, of which 333,840 are kernels of
    convolutions; 1,263,854 with 1. Depthwise kernels have 9 weights a channel: a sparsity that is
    the same in all layers leaves most channels one weight or none there. Convolutions start as He's
    normal by fan-out, the dense layer as in PyTorch.

    Args:
      input_shape: height, width and channels of one example; at least 8×8, 32×32 with the ImageNet
        stem.
      num_classes: width of the output.
      norm: ``"batch"`` or ``"group"``.
      width: factor of the widths: 0.5, 1, 1.5 or 2.
      stem: ``"cifar"``, or ``"imagenet"`` for a stride of 2 and a max-pooling, as torchvision has
        them: a fourteenth of the arithmetic on images of 32×32.

    Raises:
      ValueError: if the examples are no images, or too small, or an option is unknown.

    References:
      Ma et al., `ShuffleNet V2 <https://arxiv.org/abs/1807.11164>`_, 2018. The CIFAR form is that
      of public code (kuangliu/pytorch-cifar), with the paper's 244 channels for the factor 2.
    """
    shapes.check_sizes(num_classes, input_shape=input_shape)
    resnet.check_options(norm, stem)
    shapes.check_image("shufflenet_v2", input_shape, smallest=32 if stem == "imagenet" else 8)
    module = ShuffleNetV2(WIDTHS[_known(width)], _DEPTHS, num_classes, norm, stem)
    return adapters.from_linen(module, input_shape=input_shape)


def _known(width: float) -> float:
    if width not in WIDTHS:
        raise ValueError(f"width must be one of {', '.join(map(str, WIDTHS))}, got {width}.")
    return width


class ShuffleNetSettings(resnet.LargeSettings):
    """Settings of ShuffleNetV2."""

    stem: resnet.Stem = setting(
        "cifar", "First layers: a 3x3 convolution, or one of stride 2 with max-pooling."
    )
    width: Positive = setting(0.5, "Factor of the widths: 0.5, 1, 1.5 or 2.")

    _is_known = pydantic.field_validator("width")(_known)


PARTS = {
    "shufflenet_v2": Part(
        call(shufflenet_v2),
        ShuffleNetSettings,
        summary="depthwise convolutions and shuffled channels, CIFAR form, 0.35 million weights",
    )
}
