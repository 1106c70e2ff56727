"""Residual networks in their CIFAR and ImageNet forms, normalized by batches, groups or weights."""

from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjaxprune.kernels import pooling, shapes
from fedjaxprune.models import adapters, layers
from fedjaxprune.registry import Part, call
from fedjaxprune.settings import Settings, setting
from fedjaxprune.types import Model

Norm = Literal["batch", "group"]
AnyNorm = Literal["batch", "group", "live_weights"]
Stem = Literal["cifar", "imagenet"]
BlockKind = Literal["plain", "projection", "bottleneck"]

_EXPANSION = 4  # of a bottleneck's output over its inner width
_NARROW, _WIDE = (16, 32, 64), (64, 128, 256, 512)
# Channels and blocks of each stage.
_PLANS: dict[str, tuple[tuple[int, ...], tuple[int, ...], BlockKind]] = {
    "resnet8": (_NARROW, (1, 1, 1), "plain"),
    "resnet20": (_NARROW, (3, 3, 3), "plain"),
    "resnet32": (_NARROW, (5, 5, 5), "plain"),
    "resnet18": (_WIDE, (2, 2, 2, 2), "projection"),
    "resnet34": (_WIDE, (3, 4, 6, 3), "projection"),
    "resnet50": (_WIDE, (3, 4, 6, 3), "bottleneck"),
}


def check_norm(norm: str) -> None:
    """Refuse a kind of normalization that there is not."""
    if norm not in ("batch", "group"):
        raise ValueError(f'norm must be "batch" or "group", got {norm!r}.')


def check_options(norm: str, stem: str) -> None:
    """Refuse a kind of normalization or of stem that there is not."""
    check_norm(norm)
    _check_stem(stem)


def _check_stem(stem: str) -> None:
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f'stem must be "cifar" or "imagenet", got {stem!r}.')


class NormLayer(nn.Module):
    """Batch normalization, or group normalization of up to 32 groups of at least 4 channels."""

    kind: Norm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Normalize ``[B, H, W, C]``."""
        if self.kind == "batch":
            return layers.BatchNorm(name="batch")(x, train, mask)
        channels = x.shape[-1]
        groups = next(g for g in range(max(min(32, channels // 4), 1), 0, -1) if channels % g == 0)
        return layers.GroupNorm(num_groups=groups, name="group")(x)


def _unit(
    norm: AnyNorm, features: int, size: int, stride: int, names: tuple[str, str], gain: float
) -> Callable[..., jax.Array]:
    """Make ``(x, train, mask) -> x``: a convolution, and normalization unless it is in it.

    Args:
      names: of the two layers.
      gain: of a convolution that normalizes its weights, at the start.
    """
    if norm == "live_weights":
        conv = layers.NormalizedConv(features, size, stride, gain, name=names[0])
        return lambda x, train, mask: conv(x)
    plain = layers.Conv(features, size, stride, name=names[0])
    layer = NormLayer(norm, name=names[1])
    return lambda x, train, mask: layer(plain(x), train, mask)


def subsample(x: jax.Array, *, features: int, stride: int) -> jax.Array:
    """Take every `stride`-th pixel and add channels of zeros on both sides (He's option A)."""
    missing = features - x.shape[-1]
    return jnp.pad(
        x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2))
    )


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut, or a 3×3 one between two 1×1 ones.

    A ``"projection"`` makes a shortcut that changes shape a 1×1 convolution with normalization
    (He's option B), named ``shortcut``; ``"plain"`` takes every other pixel and adds channels of
    zeros (option A). A ``"bottleneck"`` is the 3×3 one between two, with option B; its output has
    four times as many channels as it has inside.
    """

    features: int
    stride: int
    norm: AnyNorm
    kind: BlockKind

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Map ``[B, H, W, C]`` to the shape of the output."""
        plan = [(self.features, 3, self.stride), (self.features, 3, 1)]
        if self.kind == "bottleneck":
            plan = [
                (self.features, 1, 1),
                (self.features, 3, self.stride),
                (_EXPANSION * self.features, 1, 1),
            ]
        width = plan[-1][0]
        shortcut = x
        if self.stride != 1 or x.shape[-1] != width:
            if self.kind == "plain":
                shortcut = subsample(x, features=width, stride=self.stride)
            else:
                names = ("shortcut", "shortcut_norm")
                unit = _unit(self.norm, width, 1, self.stride, names, layers.RELU_GAIN)
                shortcut = unit(x, train, mask)
        for i, (features, size, stride) in enumerate(plan, start=1):
            is_last = i == len(plan)
            names, gain = (f"conv_{i}", f"norm_{i}"), 0.0 if is_last else layers.RELU_GAIN
            x = _unit(self.norm, features, size, stride, names, gain)(x, train, mask)
            if not is_last:
                x = layers.computed_once(nn.relu(x))
        return layers.computed_once(nn.relu(x + shortcut))


class ResNet(nn.Module):
    """A convolution, stages of blocks, a global average and a dense layer.

    Every stage but the first halves the image. The stem ``"cifar"`` is a 3×3 convolution,
    ``"imagenet"`` a 7×7 one of stride 2 and a 3×3 max-pooling of stride 2.
    """

    widths: Sequence[int]
    depths: Sequence[int]
    num_classes: int
    norm: AnyNorm
    block: BlockKind
    stem: Stem = "cifar"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Map ``[B, H, W, C]`` to logits ``[B, num_classes]``."""
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        unit = _unit(self.norm, self.widths[0], size, stride, ("conv_1", "norm_1"), 1.0)
        x = layers.computed_once(nn.relu(unit(x, train, mask)))
        if self.stem == "imagenet":
            x = pooling.max_pool_3(x)
        for i, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                block = Block(
                    width, stride, self.norm, self.block, name=f"stage_{i + 1}_block_{j + 1}"
                )
                x = block(x, train, mask)
        return layers.Dense(self.num_classes, name="dense_1")(pooling.global_average_pool(x))


def resnet18(
    *, input_shape: Sequence[int], num_classes: int, norm: AnyNorm, stem: Stem = "cifar"
) -> Model:
    """Make ResNet-18, by default in its CIFAR form: 3×3 stem without pooling, widths 64 to 512.

    11,220,132 parameters for 100 classes. Shortcuts that change shape are 1×1 convolutions with
    normalization; their kernels' paths end in ``shortcut/kernel``, for those who exempt them.
    Convolutions start as He's normal by fan-out, the dense layer as in PyTorch.

    Args:
      input_shape: height, width and channels of one example; at least 8×8, 32×32 with the ImageNet
        stem.
      num_classes: width of the output.
      norm: ``"batch"``, ``"group"``, or ``"live_weights"`` for none: convolutions normalize their
        live weights (`live_weights.normalize`), with a gain and a bias a channel, and the last one
        of each branch starts at a gain of 0.
      stem: ``"cifar"``, or ``"imagenet"`` for a 7×7 convolution of stride 2 and a max-pooling,
        which leave a sixteenth of the pixels.

    Raises:
      ValueError: if the examples are no images, or too small, or an option is unknown.

    References:
      He et al., `Deep residual learning for image recognition
      <https://arxiv.org/abs/1512.03385>`_, 2016.
    """
    return _resnet("resnet18", input_shape, num_classes, norm, stem)


def resnet34(
    *, input_shape: Sequence[int], num_classes: int, norm: AnyNorm, stem: Stem = "cifar"
) -> Model:
    """Make ResNet-34: `resnet18` with 3, 4, 6 and 3 blocks, 21 million kernel weights."""
    return _resnet("resnet34", input_shape, num_classes, norm, stem)


def resnet50(
    *, input_shape: Sequence[int], num_classes: int, norm: AnyNorm, stem: Stem = "cifar"
) -> Model:
    """Make ResNet-50: `resnet34` with bottlenecks; 23,705,252 parameters for 100 classes."""
    return _resnet("resnet50", input_shape, num_classes, norm, stem)


def resnet8(*, input_shape: Sequence[int], num_classes: int, norm: AnyNorm) -> Model:
    """Make the smallest of He's ResNets for CIFAR: as `resnet20`, with one block each.

    75,290 parameters for 32×32×3 and 10 classes.

    Args:
      input_shape: height, width and channels of one example; at least 4×4.
      num_classes: width of the output.
      norm: ``"batch"``, ``"group"``, or ``"live_weights"`` for none: convolutions normalize their
        live weights (`live_weights.normalize`), with a gain and a bias a channel, and the last one
        of each branch starts at a gain of 0.

    Raises:
      ValueError: if the examples are no images, or too small, or `norm` is unknown.

    References:
      He et al., `Deep residual learning for image recognition
      <https://arxiv.org/abs/1512.03385>`_, 2016.
    """
    return _resnet("resnet8", input_shape, num_classes, norm)


def resnet20(*, input_shape: Sequence[int], num_classes: int, norm: AnyNorm) -> Model:
    """Make He's ResNet-20 for CIFAR: widths 16, 32 and 64, three blocks each.

    Shortcuts have no parameters (option A of section 4.2); 0.27 million parameters for 10 classes.
    Arguments and errors are those of `resnet8`.
    """
    return _resnet("resnet20", input_shape, num_classes, norm)


def resnet32(*, input_shape: Sequence[int], num_classes: int, norm: AnyNorm) -> Model:
    """Make He's ResNet-32 for CIFAR: as `resnet20`, with five blocks each; 0.46 million parameters.

    Arguments and errors are those of `resnet8`.
    """
    return _resnet("resnet32", input_shape, num_classes, norm)


def _resnet(
    name: str, input_shape: Sequence[int], num_classes: int, norm: AnyNorm, stem: Stem = "cifar"
) -> Model:
    shapes.check_sizes(num_classes, input_shape=input_shape)
    if norm != "live_weights":
        check_norm(norm)
    _check_stem(stem)
    widths, depths, block = _PLANS[name]
    smallest = 32 if stem == "imagenet" else 2 ** (len(widths) - 1)
    shapes.check_image(name, input_shape, smallest=smallest)
    module = ResNet(widths, depths, num_classes, norm, block, stem)
    return adapters.from_linen(module, input_shape=input_shape)


class SmallSettings(Settings):
    """Settings of the smaller ResNets."""

    norm: AnyNorm = setting(
        "batch",
        "Normalization: layers over batches or groups of channels, or convolutions that normalize "
        "their live weights.",
    )


class LargeSettings(SmallSettings):
    """Settings of the larger ResNets."""

    stem: Stem = setting(
        "cifar", "First layers: a 3x3 convolution, or ImageNet's 7x7 of stride 2 with max-pooling."
    )


PARTS = {
    "resnet8": Part(
        call(resnet8), SmallSettings, summary="residual, CIFAR form, 75 thousand weights"
    ),
    "resnet18": Part(
        call(resnet18), LargeSettings, summary="residual, CIFAR form, 11 million weights"
    ),
    "resnet20": Part(
        call(resnet20), SmallSettings, summary="residual, CIFAR form, 0.27 million weights"
    ),
    "resnet32": Part(
        call(resnet32), SmallSettings, summary="residual, CIFAR form, 0.46 million weights"
    ),
    "resnet34": Part(
        call(resnet34), LargeSettings, summary="residual, CIFAR form, 21 million weights"
    ),
    "resnet50": Part(
        call(resnet50), LargeSettings, summary="residual with bottlenecks, 24 million weights"
    ),
}
