"""Residual networks in their CIFAR and ImageNet forms, with batch or group normalization."""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjaxprune.kernels import pooling
from fedjaxprune.models import layers

Norm = Literal["batch", "group"]
Stem = Literal["cifar", "imagenet"]
BlockKind = Literal["plain", "projection", "bottleneck"]

_EXPANSION = 4  # of a bottleneck's output over its inner width


def check_norm(norm: str) -> None:
    """Refuse a kind of normalization that there is not.

    Raises:
      ValueError: naming what was given and what is allowed.
    """
    if norm not in ("batch", "group"):
        raise ValueError(f'norm must be "batch" or "group", got {norm!r}.')


class NormLayer(nn.Module):
    """Batch normalization, or group normalization of up to 32 groups with at least 4 channels each.

    Attributes:
      kind: which.
    """

    kind: Norm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Normalize ``[B, H, W, C]``."""
        if self.kind == "batch":
            return layers.BatchNorm(name="batch")(x, train, mask)
        return layers.GroupNorm(num_groups=min(32, x.shape[-1] // 4), name="group")(x)


def subsample(x: jax.Array, *, features: int, stride: int) -> jax.Array:
    """Take every `stride`-th pixel and add channels of zeros on both sides (He's option A)."""
    missing = features - x.shape[-1]
    return jnp.pad(
        x[:, ::stride, ::stride],
        ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)),
    )


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut, or a 3×3 one between two 1×1 ones.

    Attributes:
      features: channels inside, and of the output; a bottleneck's output has four times as many.
      stride: of the first 3×3 convolution.
      norm: kind of normalization.
      kind: ``"projection"`` makes a shortcut that changes shape a 1×1 convolution with
        normalization (He's option B), named ``shortcut``; ``"plain"`` takes every other pixel and
        adds channels of zeros (option A); ``"bottleneck"`` is the one between two, with option B.
    """

    features: int
    stride: int
    norm: Norm
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
                shortcut = layers.Conv(width, 1, self.stride, name="shortcut")(x)
                shortcut = NormLayer(self.norm, name="shortcut_norm")(shortcut, train, mask)
        for i, (features, size, stride) in enumerate(plan, start=1):
            x = layers.Conv(features, size, stride, name=f"conv_{i}")(x)
            x = NormLayer(self.norm, name=f"norm_{i}")(x, train, mask)
            if i < len(plan):
                x = layers.computed_once(nn.relu(x))
        return layers.computed_once(nn.relu(x + shortcut))


class ResNet(nn.Module):
    """A convolution, stages of blocks, a global average and a dense layer.

    Attributes:
      widths: channels of each stage; every stage but the first halves the image.
      depths: blocks of each stage.
      num_classes: width of the output.
      norm: kind of normalization.
      block: as in `Block`.
      stem: ``"cifar"`` begins with a 3×3 convolution, ``"imagenet"`` with a 7×7 one of stride 2 and
        a 3×3 max-pooling of stride 2.
    """

    widths: Sequence[int]
    depths: Sequence[int]
    num_classes: int
    norm: Norm
    block: BlockKind
    stem: Stem = "cifar"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Map ``[B, H, W, C]`` to logits ``[B, num_classes]``."""
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = layers.Conv(self.widths[0], size, stride, name="conv_1")(x)
        x = layers.computed_once(nn.relu(NormLayer(self.norm, name="norm_1")(x, train, mask)))
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
