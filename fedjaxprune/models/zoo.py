"""Built-in networks: factories of `Model` from an example's shape and the number of classes."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from fedjaxprune.kernels import shapes
from fedjaxprune.models import adapters, layers, resnet
from fedjaxprune.types import Model

_WIDE = (64, 128, 256, 512)  # channels of the four stages of the larger ResNets


class Mlp(nn.Module):
    """Dense layers with ReLU between them.

    Attributes:
      hidden_sizes: widths of the hidden layers.
      num_classes: width of the output.
    """

    hidden_sizes: Sequence[int]
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[B, ...]`` to logits ``[B, num_classes]``."""
        x = x.reshape(x.shape[0], -1)
        for i, size in enumerate(self.hidden_sizes, start=1):
            x = nn.relu(layers.Dense(size, name=f"dense_{i}")(x))
        return layers.Dense(self.num_classes, name=f"dense_{len(self.hidden_sizes) + 1}")(x)


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


def mlp(
    *, input_shape: Sequence[int], num_classes: int, hidden_sizes: Sequence[int] = (200, 100)
) -> Model:
    """Make a multi-layer perceptron with ReLU and PyTorch's initialization.

    Args:
      input_shape: of one example, any rank.
      num_classes: width of the output.
      hidden_sizes: widths of the hidden layers.

    Raises:
      ValueError: if a size is not positive.
    """
    shapes.check_sizes(num_classes, input_shape=input_shape, hidden_sizes=hidden_sizes)
    module = Mlp(hidden_sizes=tuple(hidden_sizes), num_classes=num_classes)
    return adapters.from_linen(module, input_shape=input_shape)


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


def resnet18(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    norm: resnet.Norm,
    stem: resnet.Stem = "cifar",
) -> Model:
    """Make ResNet-18, by default in its CIFAR form: 3×3 stem without pooling, widths 64 to 512.

    11,220,132 parameters for 100 classes. Shortcuts that change shape are 1×1 convolutions with
    normalization; their kernels' paths end in ``shortcut/kernel``, for those who exempt them.
    Convolutions start as He's normal by fan-out, the dense layer as in PyTorch.

    Args:
      input_shape: height, width and channels of one example; at least 8×8, 32×32 with the ImageNet
        stem.
      num_classes: width of the output.
      norm: ``"batch"`` or ``"group"``.
      stem: ``"cifar"``, or ``"imagenet"`` for a 7×7 convolution of stride 2 and a max-pooling,
        which leave a sixteenth of the pixels.

    Raises:
      ValueError: if the examples are no images, or too small, or an option is unknown.

    References:
      He et al., `Deep residual learning for image recognition
      <https://arxiv.org/abs/1512.03385>`_, 2016.
    """
    return _resnet("resnet18", input_shape, num_classes, norm, _WIDE, (2, 2, 2, 2), stem=stem)


def resnet34(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    norm: resnet.Norm,
    stem: resnet.Stem = "cifar",
) -> Model:
    """Make ResNet-34: `resnet18` with 3, 4, 6 and 3 blocks, 21 million kernel weights."""
    return _resnet("resnet34", input_shape, num_classes, norm, _WIDE, (3, 4, 6, 3), stem=stem)


def resnet50(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    norm: resnet.Norm,
    stem: resnet.Stem = "cifar",
) -> Model:
    """Make ResNet-50: `resnet34` with bottlenecks; 23,705,252 parameters for 100 classes."""
    return _resnet(
        "resnet50", input_shape, num_classes, norm, _WIDE, (3, 4, 6, 3), "bottleneck", stem=stem
    )


def resnet8(*, input_shape: Sequence[int], num_classes: int, norm: resnet.Norm) -> Model:
    """Make the smallest of He's ResNets for CIFAR: as `resnet20`, with one block each.

    75,290 parameters for 32×32×3 and 10 classes.

    Args:
      input_shape: height, width and channels of one example; at least 4×4.
      num_classes: width of the output.
      norm: ``"batch"`` or ``"group"``.

    Raises:
      ValueError: if the examples are no images, or too small, or `norm` is neither.

    References:
      He et al., `Deep residual learning for image recognition
      <https://arxiv.org/abs/1512.03385>`_, 2016.
    """
    return _resnet("resnet8", input_shape, num_classes, norm, (16, 32, 64), (1, 1, 1), "plain")


def resnet20(*, input_shape: Sequence[int], num_classes: int, norm: resnet.Norm) -> Model:
    """Make He's ResNet-20 for CIFAR: widths 16, 32 and 64, three blocks each.

    Shortcuts have no parameters (option A of section 4.2); 0.27 million parameters for 10 classes.

    Args:
      input_shape: height, width and channels of one example; at least 4×4.
      num_classes: width of the output.
      norm: ``"batch"`` or ``"group"``.

    Raises:
      ValueError: if the examples are no images, or too small, or `norm` is neither.

    References:
      He et al., `Deep residual learning for image recognition
      <https://arxiv.org/abs/1512.03385>`_, 2016.
    """
    return _resnet("resnet20", input_shape, num_classes, norm, (16, 32, 64), (3, 3, 3), "plain")


def resnet32(*, input_shape: Sequence[int], num_classes: int, norm: resnet.Norm) -> Model:
    """Make He's ResNet-32 for CIFAR: as `resnet20`, with five blocks each; 0.46 million parameters.

    Args:
      input_shape: height, width and channels of one example; at least 4×4.
      num_classes: width of the output.
      norm: ``"batch"`` or ``"group"``.

    Raises:
      ValueError: if the examples are no images, or too small, or `norm` is neither.

    References:
      He et al., `Deep residual learning for image recognition
      <https://arxiv.org/abs/1512.03385>`_, 2016.
    """
    return _resnet("resnet32", input_shape, num_classes, norm, (16, 32, 64), (5, 5, 5), "plain")


def _resnet(
    name: str,
    input_shape: Sequence[int],
    num_classes: int,
    norm: resnet.Norm,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    block: resnet.BlockKind = "projection",
    *,
    stem: resnet.Stem = "cifar",
) -> Model:
    shapes.check_sizes(num_classes, input_shape=input_shape)
    resnet.check_norm(norm)
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f'stem must be "cifar" or "imagenet", got {stem!r}.')
    smallest = 32 if stem == "imagenet" else 2 ** (len(widths) - 1)
    shapes.check_image(name, input_shape, smallest=smallest)
    module = resnet.ResNet(
        widths=widths, depths=depths, num_classes=num_classes, norm=norm, block=block, stem=stem
    )
    return adapters.from_linen(module, input_shape=input_shape)
