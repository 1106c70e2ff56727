"""Residual networks in their CIFAR forms, with batch or group normalisation."""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjaxprune.models import layers, pooling

Norm = Literal["batch", "group"]


class NormLayer(nn.Module):
    """Batch normalisation, or group normalisation of up to 32 groups with at least 4 channels each.

    Attributes:
      kind: which.
    """

    kind: Norm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Normalise ``[B, H, W, C]``."""
        if self.kind == "batch":
            return layers.BatchNorm(name="batch")(x, train, mask)
        return layers.GroupNorm(num_groups=min(32, x.shape[-1] // 4), name="group")(x)


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut.

    Attributes:
      features: channels of the output.
      stride: of the first convolution.
      norm: kind of normalisation.
      projection: whether a shortcut that changes shape is a 1×1 convolution with normalisation
        (He's option B), named ``shortcut``; else it takes every other pixel and adds channels of
        zeros (option A).
    """

    features: int
    stride: int
    norm: Norm
    projection: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        """Map ``[B, H, W, C]`` to ``[B, H', W', features]``."""
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            if self.projection:
                shortcut = layers.Conv(self.features, 1, self.stride, name="shortcut")(x)
                shortcut = NormLayer(self.norm, name="shortcut_norm")(shortcut, train, mask)
            else:
                missing = self.features - x.shape[-1]
                shortcut = jnp.pad(
                    x[:, :: self.stride, :: self.stride],
                    ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)),
                )
        x = layers.Conv(self.features, 3, self.stride, name="conv_1")(x)
        x = layers.computed_once(nn.relu(NormLayer(self.norm, name="norm_1")(x, train, mask)))
        x = layers.Conv(self.features, 3, name="conv_2")(x)
        x = NormLayer(self.norm, name="norm_2")(x, train, mask)
        return layers.computed_once(nn.relu(x + shortcut))


class ResNet(nn.Module):
    """A 3×3 convolution, stages of blocks, a global average and a dense layer.

    Attributes:
      widths: channels of each stage; every stage but the first halves the image.
      depths: blocks of each stage.
      num_classes: width of the output.
      norm: kind of normalisation.
      projection: as in `Block`.
    """

    widths: Sequence[int]
    depths: Sequence[int]
    num_classes: int
    norm: Norm
    projection: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Map ``[B, H, W, C]`` to logits ``[B, num_classes]``."""
        x = layers.Conv(self.widths[0], 3, name="conv_1")(x)
        x = layers.computed_once(nn.relu(NormLayer(self.norm, name="norm_1")(x, train, mask)))
        for i, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                block = Block(
                    width, stride, self.norm, self.projection, name=f"stage_{i + 1}_block_{j + 1}"
                )
                x = block(x, train, mask)
        return layers.Dense(self.num_classes, name="dense_1")(pooling.global_average_pool(x))
