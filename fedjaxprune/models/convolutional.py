"""Plain convolutional networks of the papers' protocols: LeNet-5, AlexNet and small CNNs."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjaxprune.kernels import pooling, shapes
from fedjaxprune.models import adapters, layers
from fedjaxprune.registry import Part, call
from fedjaxprune.settings import Count, Counts, Fraction, Settings, setting
from fedjaxprune.types import Model


class SmallCnn(nn.Module):
    """Convolutions with ReLU and 2×2 max-pooling, then dense layers with ReLU."""

    kernel_size: int
    channels: Sequence[int]
    paddings: Sequence[int]
    hidden_sizes: Sequence[int]
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[B, H, W, C]`` to logits ``[B, num_classes]``."""
        for i, (width, padding) in enumerate(zip(self.channels, self.paddings, strict=True), 1):
            x = layers.ConvReluMaxPool(width, self.kernel_size, padding, name=f"conv_{i}")(x)
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
    module = SmallCnn(5, (6, 16), (2, 0), (120, 84), num_classes)
    return _checked("lenet5", module, input_shape, smallest=12)


def cnn(*, input_shape: Sequence[int], num_classes: int, hidden_size: int = 512) -> Model:
    """Make the two-layer CNN of the first federated-learning papers.

    Convolutions of 32 and 64 channels that keep the size, a dense layer of 512: 1,663,370
    parameters for 28×28×1 and 10 classes. With 2,048 hidden units it is LEAF's CNN for FEMNIST:
    6,603,710 for 62 classes. PyTorch's initialization. Arguments and errors are those of `lenet5`,
    for images of at least 4×4, and `hidden_size` is the width of the hidden dense layer.

    References:
      McMahan et al., `Communication-efficient learning of deep networks from decentralized data
      <https://arxiv.org/abs/1602.05629>`_, 2017; Caldas et al., `LEAF
      <https://arxiv.org/abs/1812.01097>`_, 2018.
    """
    module = SmallCnn(5, (32, 64), (2, 2), (hidden_size,), num_classes)
    return _checked("cnn", module, input_shape, smallest=4, hidden_size=(hidden_size,))


class EmnistCnn(nn.Module):
    """Two 3×3 convolutions without padding, 2×2 max-pooling and two dense layers, with dropout."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[B, H, W, C]`` to logits ``[B, num_classes]``."""
        for i, width in enumerate((32, 64), start=1):
            conv = layers.Conv(width, 3, padding=0, bias="channel", start="torch", name=f"conv_{i}")
            x = nn.relu(conv(x))
        x = nn.Dropout(0.25, deterministic=not train)(pooling.max_pool(x))
        x = nn.relu(layers.Dense(128, name="dense_1")(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return layers.Dense(self.num_classes, name="dense_2")(x)


def emnist_cnn(*, input_shape: Sequence[int], num_classes: int) -> Model:
    """Make the CNN for EMNIST of adaptive federated optimization, also called CNN_DropOut.

    Convolutions of 32 and 64 channels, a dense layer of 128: 1,206,590 parameters for 28×28×1 and
    62 classes. PyTorch's initialization. Arguments and errors are those of `lenet5`, for images of
    at least 6×6.

    References:
      Reddi et al., `Adaptive federated optimization <https://arxiv.org/abs/2003.00295>`_, 2021.
    """
    return _checked("emnist_cnn", EmnistCnn(num_classes), input_shape, smallest=6)


class AlexNet(nn.Module):
    """Five 3×3 convolutions, three 2×2 max-poolings and three dense layers, with dropout."""

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
    are in the dense layers. PyTorch's initialization. Arguments and errors are those of `lenet5`,
    for images of at least 15×15.

    References:
      Long et al., `FedDIP <https://arxiv.org/abs/2309.06805>`_, 2023, and its public code.
    """
    return _checked("alexnet", AlexNet(num_classes), input_shape, smallest=15)


class TwoCnn(nn.Module):
    """Two 5×5 convolutions, each with 2×2 max-pooling, averaged to 7×7, and two dense layers.

    Convolutions and poolings have a border of one. Xavier's normal initialization, biases of zero.
    """

    width: int
    hidden_size: int
    num_classes: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[B, H, W, C]`` to logits ``[B, num_classes]``."""
        for i, width in enumerate((self.width, 2 * self.width), start=1):
            conv = layers.Conv(
                width, 5, padding=1, bias="channel", start="xavier", name=f"conv_{i}"
            )
            # After ReLU a border of zeros wins no maximum that counts.
            x = pooling.max_pool(jnp.pad(nn.relu(conv(x)), ((0, 0), (1, 1), (1, 1), (0, 0))))
        x = pooling.adaptive_average_pool(x, size=7)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(layers.Dense(self.hidden_size, "xavier", name="dense_1")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return layers.Dense(self.num_classes, "xavier", name="dense_2")(x)


def two_cnn(*, input_shape: Sequence[int], num_classes: int, width: int = 32) -> Model:
    """Make AutoFLIP's two-layer CNN.

    1,663,370 parameters for grey images and 10 classes, 1,664,970 for colour; with a width of 128,
    colour and 100 classes 7,303,524. The numbers do not depend on the images' size.

    Args:
      input_shape: height, width and channels of one example; at least 6×6.
      num_classes: width of the output.
      width: channels of the first convolution; the second has twice as many.

    Raises:
      ValueError: if the examples are no images, or too small, or a width is not positive.

    References:
      Internò et al., `AutoFLIP <https://arxiv.org/abs/2405.10271>`_, 2024, and its public code.
    """
    module = TwoCnn(width, 512, num_classes, dropout=0.0)
    return _checked("two_cnn", module, input_shape, smallest=6, width=(width,))


def femnist_cnn(*, input_shape: Sequence[int], num_classes: int, dropout: float = 0.1) -> Model:
    """Make AutoFLIP's CNN for FEMNIST: `two_cnn` of width 64 and 2,048 hidden units, with dropout.

    13,180,734 parameters for grey images and 62 classes. Arguments and errors are those of
    `two_cnn`, and `dropout` is the rate after the hidden dense layer, in [0, 1).
    """
    shapes.check_rate("dropout", dropout)
    module = TwoCnn(64, 2048, num_classes, dropout)
    return _checked("femnist_cnn", module, input_shape, smallest=6)


def pooled_cnn(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    channels: Sequence[int] = (32, 64, 32),
    hidden_size: int = 128,
) -> Model:
    """Make the small dense CNN that FedTiny's code sets beside its sparse networks.

    Its smaller siblings have channels (8, 16, 32), (8, 16, 16) and, with 64 hidden units,
    (8, 8, 8). PyTorch's initialization.

    Args:
      input_shape: height, width and channels of one example; each convolution halves the image.
      num_classes: width of the output.
      channels: of the convolutions.
      hidden_size: width of the hidden dense layer.

    Raises:
      ValueError: if the examples are no images, or too small, or a size is not positive.

    References:
      Huang et al., `FedTiny <https://arxiv.org/abs/2212.01977>`_, 2023, and its public code.
    """
    sizes = {"channels": channels, "hidden_size": (hidden_size,)}
    module = SmallCnn(3, tuple(channels), (1,) * len(channels), (hidden_size,), num_classes)
    return _checked("pooled_cnn", module, input_shape, smallest=2 ** len(channels), **sizes)


def _checked(
    name: str, module: Any, input_shape: Sequence[int], *, smallest: int, **sizes: Sequence[int]
) -> Model:
    """Refuse sizes that are not positive and images that are too small, or make a model."""
    shapes.check_sizes(module.num_classes, input_shape=input_shape, **sizes)
    shapes.check_image(name, input_shape, smallest=smallest)
    return adapters.from_linen(module, input_shape=input_shape)


class CnnSettings(Settings):
    """Settings of `cnn`."""

    hidden_size: Count = setting(
        512, "Width of the hidden dense layer; LEAF's for FEMNIST has 2048.", unit="units"
    )


class TwoCnnSettings(Settings):
    """Settings of `two_cnn`."""

    width: Count = setting(
        32, "Channels of the first convolution; the second has twice as many.", unit="channels"
    )


class FemnistCnnSettings(Settings):
    """Settings of `femnist_cnn`."""

    dropout: Fraction = setting(0.1, "Dropout rate after the hidden layer.", unit="fraction")


class PooledCnnSettings(Settings):
    """Settings of `pooled_cnn`."""

    channels: Counts = setting((32, 64, 32), "Channels of the convolutions.", unit="channels")
    hidden_size: Count = setting(128, "Width of the hidden dense layer.", unit="units")


PARTS = {
    "lenet5": Part(call(lenet5), summary="two convolutions, three dense layers"),
    "cnn": Part(call(cnn), CnnSettings, summary="two 5x5 convolutions, 512 hidden units"),
    "emnist_cnn": Part(
        call(emnist_cnn), summary="two 3x3 convolutions, 128 hidden units, dropout (EMNIST)"
    ),
    "alexnet": Part(call(alexnet), summary="CIFAR form, 23 million weights (FedDIP)"),
    "two_cnn": Part(
        call(two_cnn),
        TwoCnnSettings,
        summary="two 5x5 convolutions averaged to 7x7, 512 hidden units (AutoFLIP)",
    ),
    "femnist_cnn": Part(
        call(femnist_cnn),
        FemnistCnnSettings,
        summary="two_cnn of width 64, 2,048 hidden units and dropout (AutoFLIP)",
    ),
    "pooled_cnn": Part(
        call(pooled_cnn),
        PooledCnnSettings,
        summary="three 3x3 convolutions, 128 hidden units (FedTiny's small dense network)",
    ),
}
