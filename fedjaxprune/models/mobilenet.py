"""MobileNetV2: narrow images between blocks, wide depthwise convolutions inside them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import flax.linen as nn
import jax

from fedjaxprune.kernels import pooling, shapes
from fedjaxprune.models import adapters, layers, resnet, shufflenet
from fedjaxprune.registry import Part, call
from fedjaxprune.settings import setting
from fedjaxprune.types import Model

Form = Literal["cifar", "paper"]


class Row(NamedTuple):
    """Blocks of one width: factor of the inner width, number, and stride of the first."""

    expansion: int
    width: int
    depth: int
    stride: int


_STEM, _LAST = 32, 1280
_ROWS = (
    Row(1, 16, 1, 1),
    Row(6, 24, 2, 1),
    Row(6, 32, 3, 2),
    Row(6, 64, 4, 2),
    Row(6, 96, 3, 1),
    Row(6, 160, 3, 2),
    Row(6, 320, 1, 1),
)


class Block(nn.Module):
    """A 1×1, a depthwise 3×3 and a linear 1×1 convolution, around a shortcut where sizes allow.

    In the form ``"cifar"``, a shortcut that changes the width is a 1×1 convolution with
    normalization, named ``shortcut``, and a block that does not widen has its first convolution
    all the same. In the form ``"paper"`` there is neither.
    """

    expansion: int
    features: int
    stride: int
    norm: resnet.Norm
    form: Form

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Map ``[B, H, W, C]`` to ``[B, H / stride, W / stride, features]``."""
        unit, norm, channels = shufflenet.Unit, self.norm, x.shape[-1]
        shortcut = None
        if self.stride == 1 and channels == self.features:
            shortcut = x
        elif self.stride == 1 and self.form == "cifar":
            shortcut = layers.Conv(self.features, 1, name="shortcut")(x)
            shortcut = resnet.NormLayer(norm, name="shortcut_norm")(shortcut, train, mask)
        if self.expansion > 1 or self.form == "cifar":
            x = unit(self.expansion * channels, norm, name="pointwise_1")(x, train, mask)
        wide = shufflenet.depthwise(x, norm, stride=self.stride, linear=False, name="depthwise")
        x = wide(x, train, mask)
        x = unit(self.features, norm, linear=True, name="pointwise_2")(x, train, mask)
        return layers.computed_once(x if shortcut is None else x + shortcut)


class MobileNetV2(nn.Module):
    """A convolution, rows of blocks, a 1×1 convolution, a global average and a dense layer."""

    stem_width: int
    rows: Sequence[Row]
    last_width: int
    num_classes: int
    norm: resnet.Norm
    stem: resnet.Stem
    form: Form

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Map ``[B, H, W, C]`` to logits ``[B, num_classes]``."""
        unit, is_large = shufflenet.Unit, self.stem == "imagenet"
        x = unit(self.stem_width, self.norm, 3, 2 if is_large else 1, name="stem")(x, train, mask)
        for i, row in enumerate(self.rows, start=1):
            first = 2 if is_large and i == 2 else row.stride
            for j in range(row.depth):
                block = Block(
                    row.expansion,
                    row.width,
                    1 if j else first,
                    self.norm,
                    self.form,
                    name=f"stage_{i}_block_{j + 1}",
                )
                x = block(x, train, mask)
        x = unit(self.last_width, self.norm, name="last")(x, train, mask)
        return layers.Dense(self.num_classes, name="dense_1")(pooling.global_average_pool(x))


def mobilenet_v2(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    norm: resnet.Norm,
    stem: resnet.Stem = "cifar",
    blocks: Form = "cifar",
) -> Model:
    """Make MobileNetV2 with ReLU, by default in its CIFAR form: strides of 1 in the first rows.

    2,296,922 parameters for 10 classes, of which 2,249,024 are kernels of convolutions. The CIFAR
    form has two things that the paper's network lacks: a projection on the four blocks of stride 1
    that change the width, and a first convolution in the block that does not widen. Without both,
    with the paper's `blocks`, there are 2,236,682 parameters. Convolutions start as He's normal by
    fan-out, the dense layer as in PyTorch.

    Args:
      input_shape: height, width and channels of one example; at least 8×8, 32×32 with the ImageNet
        stem.
      num_classes: width of the output.
      norm: ``"batch"`` or ``"group"``.
      stem: ``"cifar"``, or ``"imagenet"`` for strides of 2 in the stem and the second row.
      blocks: ``"cifar"`` or ``"paper"``, as above.

    Raises:
      ValueError: if the examples are no images, or too small, or an option is unknown.

    References:
      Sandler et al., `MobileNetV2 <https://arxiv.org/abs/1801.04381>`_, 2018. The CIFAR form is
      that of public code (kuangliu/pytorch-cifar).
    """
    shapes.check_sizes(num_classes, input_shape=input_shape)
    resnet.check_options(norm, stem)
    if blocks not in ("cifar", "paper"):
        raise ValueError(f'blocks must be "cifar" or "paper", got {blocks!r}.')
    shapes.check_image("mobilenet_v2", input_shape, smallest=32 if stem == "imagenet" else 8)
    module = MobileNetV2(_STEM, _ROWS, _LAST, num_classes, norm, stem, blocks)
    return adapters.from_linen(module, input_shape=input_shape)


class MobileNetSettings(resnet.LargeSettings):
    """Settings of MobileNetV2."""

    stem: resnet.Stem = setting(
        "cifar", "Strides of the stem and the second row: 1, or ImageNet's 2."
    )
    blocks: Form = setting(
        "cifar",
        "Shortcuts that change the width: convolutions, as in public code for CIFAR, or none, "
        "as in the paper.",
    )


PARTS = {
    "mobilenet_v2": Part(
        call(mobilenet_v2),
        MobileNetSettings,
        summary="inverted residuals, CIFAR form, 2.3 million weights",
    )
}
