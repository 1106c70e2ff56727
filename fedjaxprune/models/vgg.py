"""VGG networks, with and without normalization, and with heads from small to the papers'."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import flax.linen as nn
import jax

from fedjaxprune.kernels import pooling, shapes
from fedjaxprune.models import adapters, layers, resnet
from fedjaxprune.registry import Part, call
from fedjaxprune.settings import Count, Counts, Fraction, Settings, setting
from fedjaxprune.types import Model

VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

Norm = Literal["none", "batch", "group"]


class Head(NamedTuple):
    """Dense layers at the end of a network of images, of which they see `pool` times `pool`."""

    pool: int
    hidden_sizes: tuple[int, ...]
    num_classes: int
    dropout: float


class Vgg(nn.Module):
    """3×3 convolutions in stages, 2×2 max-pooling after each, and dense layers.

    Convolutions start as He's normal by fan-out. They have a bias only where no normalization
    follows, which would cancel it.
    """

    plan: Sequence[Sequence[int]]
    head: Head
    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Map ``[B, H, W, C]`` to logits ``[B, classes]``."""
        number = 0
        for stage in self.plan:
            for width in stage:
                number += 1
                bias = "channel" if self.norm == "none" else "none"
                x = layers.Conv(width, 3, bias=bias, name=f"conv_{number}")(x)
                if self.norm != "none":
                    x = resnet.NormLayer(self.norm, name=f"norm_{number}")(x, train, mask)
                x = nn.relu(x)
            x = pooling.max_pool(x)
        return apply_head(self.head, x, train)


class Vgg9(nn.Module):
    """Three pairs of 3×3 convolutions with max-pooling after each, and three dense layers.

    Dropout takes whole channels after the second pair, and units before the hidden layers.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[B, H, W, C]`` to logits ``[B, num_classes]``."""
        for i, width in enumerate((32, 64, 128, 128, 256, 256), start=1):
            x = nn.relu(layers.Conv(width, 3, bias="channel", name=f"conv_{i}")(x))
            if i % 2 == 0:
                x = pooling.max_pool(x)
            if i == 4:
                x = nn.Dropout(0.05, broadcast_dims=(1, 2), deterministic=not train)(x)
        x = x.reshape(x.shape[0], -1)
        for i in (1, 2):
            x = nn.Dropout(0.1, deterministic=not train)(x)
            x = nn.relu(layers.Dense(512, name=f"dense_{i}")(x))
        return layers.Dense(self.num_classes, name="dense_3")(x)


def apply_head(head: Head, x: jax.Array, train: bool) -> jax.Array:
    """Map images ``[B, H, W, C]`` to logits; to be called inside a module."""
    x = pooling.adaptive_average_pool(x, size=head.pool)
    x = x.reshape(x.shape[0], -1)
    for i, size in enumerate(head.hidden_sizes, start=1):
        x = nn.relu(layers.Dense(size, name=f"dense_{i}")(x))
        x = nn.Dropout(head.dropout, deterministic=not train)(x)
    return layers.Dense(head.num_classes, name=f"dense_{len(head.hidden_sizes) + 1}")(x)


def make_head(
    name: str, input_shape: Sequence[int], num_classes: int, hidden_sizes, *, pool, dropout
) -> Head:
    """Check what a VGG is asked for, and describe its head."""
    shapes.check_sizes(
        num_classes, input_shape=input_shape, hidden_sizes=hidden_sizes, pool=(pool,)
    )
    shapes.check_image(name, input_shape, smallest=32)
    shapes.check_rate("dropout", dropout)
    return Head(pool, tuple(hidden_sizes), num_classes, dropout)


def vgg11(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    norm: Norm,
    hidden_sizes: Sequence[int] = (),
    pool: int = 1,
    dropout: float = 0.5,
) -> Model:
    """Make VGG-11: eight convolutions, 9,217,728 kernel weights, and by default one dense layer.

    The papers' dense layers outweigh their convolutions many times, and sparse convolutions then
    save little traffic; so the default is none hidden, and theirs are options:
    ``hidden_sizes=(4096, 4096), pool=7`` is torchvision's, which FedDIP, FedTiny and MPFL take
    (129,176,036 parameters for 100 classes without normalization); ``hidden_sizes=(512, 512)`` the
    dense reference of adaptive dynamic pruning.

    Args:
      input_shape: height, width and channels of one example; at least 32×32.
      num_classes: width of the output.
      norm: ``"none"``, ``"batch"`` or ``"group"``.
      hidden_sizes: widths of the hidden dense layers.
      pool: side of the image that the dense layers see.
      dropout: rate after each hidden layer.

    Raises:
      ValueError: if the examples are no images, or too small, or an option is out of range.

    References:
      Simonyan and Zisserman, `Very deep convolutional networks
      <https://arxiv.org/abs/1409.1556>`_, 2015.
    """
    return _vgg("vgg11", VGG11, input_shape, num_classes, norm, hidden_sizes, pool, dropout)


def vgg16(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    norm: Norm,
    hidden_sizes: Sequence[int] = (),
    pool: int = 1,
    dropout: float = 0.5,
) -> Model:
    """Make VGG-16, with 13 convolutions; all else as in `vgg11`."""
    return _vgg("vgg16", VGG16, input_shape, num_classes, norm, hidden_sizes, pool, dropout)


def vgg9(*, input_shape: Sequence[int], num_classes: int) -> Model:
    """Make VGG-9 of the federated benchmarks: six convolutions and two hidden layers of 512.

    3,491,530 parameters for 32×32×3 and 10 classes; two thirds of them are in the first dense
    layer. Convolutions start as He's normal by fan-out, dense layers as in PyTorch.

    Args:
      input_shape: height, width and channels of one example; at least 8×8.
      num_classes: width of the output.

    Raises:
      ValueError: if the examples are no images, or too small.

    References:
      Wang et al., `FedMA <https://arxiv.org/abs/2002.06440>`_, 2020; Li et al., `Federated Learning
      on Non-IID Data Silos <https://arxiv.org/abs/2102.02079>`_, 2022.
    """
    shapes.check_sizes(num_classes, input_shape=input_shape)
    shapes.check_image("vgg9", input_shape, smallest=8)
    return adapters.from_linen(Vgg9(num_classes), input_shape=input_shape)


def _vgg(name, plan, input_shape, num_classes, norm, hidden_sizes, pool, dropout) -> Model:
    head = make_head(name, input_shape, num_classes, hidden_sizes, pool=pool, dropout=dropout)
    if norm not in ("none", "batch", "group"):
        raise ValueError(f'norm must be "none", "batch" or "group", got {norm!r}.')
    module = Vgg(plan=plan, head=head, norm=norm)
    return adapters.from_linen(module, input_shape=input_shape)


class VggSettings(Settings):
    """Settings of VGGs."""

    norm: Norm = setting("batch", "Normalization layers.")
    hidden_sizes: Counts = setting(
        (), "Widths of the hidden dense layers; torchvision's are 4096 and 4096.", unit="units"
    )
    pool: Count = setting(1, "Side of the image that the dense layers see.", unit="pixels")
    dropout: Fraction = setting(0.5, "Dropout rate after each hidden layer.", unit="fraction")


class PlainVggSettings(VggSettings):
    """Settings of a VGG without normalization by default."""

    norm: Norm = setting("none", "Normalization layers.")


PARTS = {
    "vgg9": Part(
        call(vgg9), summary="6 convolutions, 512 and 512 hidden units, 3.5 million weights"
    ),
    "vgg11": Part(
        call(vgg11),
        PlainVggSettings,
        summary="8 convolutions without normalization, 9.2 million weights",
    ),
    "vgg11_bn": Part(
        call(vgg11), VggSettings, summary="8 convolutions with normalization, 9.2 million weights"
    ),
    "vgg16_bn": Part(
        call(vgg16), VggSettings, summary="13 convolutions with normalization, 14.7 million weights"
    ),
}
