"""Networks whose layers choose, for every example, which of their channels it needs.

The gate of a layer looks at the layer's input, averaged over the image, and gives each output
channel a saliency; the most salient ones are kept and scaled by it, the others are zero for this
example. So the gradient reaches only what an example kept. How many are kept and how a method reads
and steers that is the business of `fedjaxprune.models.gates`.

There is no penalty on the saliencies, as in the public code (and unlike in the paper of the gates).

References:
  Yu, Nguyen, Anwar and Jannesari, `Adaptive dynamic pruning <https://arxiv.org/abs/2106.06921>`_,
  2021, and its public code; where that code starts the gates of ResNets at a bias of 0 by accident,
  they start at 1 here. Gao et al., `Dynamic channel pruning: feature boosting and suppression
  <https://arxiv.org/abs/1810.05331>`_, 2019, for the gate.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjaxprune.kernels import pooling, shapes
from fedjaxprune.models import adapters, gated_layers, gates, layers, resnet, vgg
from fedjaxprune.models.gated_layers import Choice
from fedjaxprune.registry import Part, call
from fedjaxprune.settings import Counts, Positive, Probability, Settings, Share, setting
from fedjaxprune.types import Model


class GatedBlock(nn.Module):
    """Two gated 3×3 convolutions around a shortcut without parameters."""

    features: int
    stride: int
    norm: resnet.Norm
    choice: Choice
    gate_scale: float

    @nn.compact
    def __call__(
        self, x: jax.Array, density: jax.Array, train: bool, mask: jax.Array | None
    ) -> jax.Array:
        """Map ``[B, H, W, C]`` to ``[B, H', W', features]``."""
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = resnet.subsample(x, features=self.features, stride=self.stride)
        for i, stride in enumerate((self.stride, 1), start=1):
            gate = ("none", self.choice, self.gate_scale)
            conv = gated_layers.GatedConv(self.features, self.norm, stride, *gate, name=f"conv_{i}")
            x = conv(x, density, train, mask)
            x = layers.computed_once(nn.relu(x + shortcut if i == 2 else x))
        return x


class GatedResNet(nn.Module):
    """He's ResNet for CIFAR with a gate on every convolution of its blocks, but not on the first.

    Its stages have one depth; the density is that of the start.
    """

    widths: Sequence[int]
    depth: int
    num_classes: int
    norm: resnet.Norm
    density: float
    choice: Choice
    gate_scale: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Map ``[B, H, W, C]`` to logits ``[B, num_classes]``."""
        density = _density(self, self.density)
        x = layers.Conv(self.widths[0], 3, name="conv_1")(x)
        x = layers.computed_once(
            nn.relu(resnet.NormLayer(self.norm, name="norm_1")(x, train, mask))
        )
        for i, width in enumerate(self.widths):
            for j in range(self.depth):
                stride = 2 if i > 0 and j == 0 else 1
                name = f"stage_{i + 1}_block_{j + 1}"
                block = GatedBlock(
                    width, stride, self.norm, self.choice, self.gate_scale, name=name
                )
                x = block(x, density, train, mask)
        return layers.Dense(self.num_classes, name="dense_1")(pooling.global_average_pool(x))


class GatedVgg(nn.Module):
    """VGG with a gate on every convolution, the first included, that starts at the density."""

    plan: Sequence[Sequence[int]]
    head: vgg.Head
    norm: resnet.Norm
    density: float
    choice: Choice
    gate_scale: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Map ``[B, H, W, C]`` to logits ``[B, classes]``."""
        density = _density(self, self.density)
        number = 0
        for stage in self.plan:
            for width in stage:
                number += 1
                name = f"conv_{number}"
                conv = gated_layers.GatedConv(
                    width, self.norm, 1, "sigmoid", self.choice, self.gate_scale, name=name
                )
                x = nn.relu(conv(x, density, train, mask))
            x = pooling.max_pool(x)
        return vgg.apply_head(self.head, x, train)


def _density(module: nn.Module, density: float) -> jax.Array:
    """Keep the density in the state."""
    return module.variable(gates.COLLECTION, "density", lambda: jnp.float32(density)).value


class GatedSettings(Settings):
    """Settings of a gated ResNet."""

    norm: resnet.Norm = setting("batch", "Kind of normalization.")
    density: Share = setting(
        0.7,
        "Channels that every gate keeps for an example. With 1 it is a squeeze-and-excitation "
        "network. A method may change it from round to round.",
        unit="fraction",
    )
    choice: Choice = setting(
        "salient", "Which channels a gate keeps: the most salient, or random ones (a control)."
    )
    gate_scale: Positive = setting(
        0.1,
        "Scale of the gates' kernels at the start. The public code has 1, with which saliencies "
        "and residual stream multiply one another up from block to block.",
        unit="multiples of He's normal",
    )


class GatedVggSettings(GatedSettings):
    """Settings of a gated VGG."""

    gate_scale: Positive = setting(
        1.0,
        "Scale of the gates' kernels at the start; the gates see a sigmoid of their input.",
        unit="multiples of He's normal",
    )
    hidden_sizes: Counts = setting(
        (), "Widths of the hidden dense layers (paper's code: 4096, 4096).", unit="units"
    )
    dropout: Probability = setting(
        0.5, "Probability of dropout before each hidden dense layer.", unit="fraction"
    )


def gated_resnet32(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    norm: resnet.Norm,
    density: float,
    choice: Choice = "salient",
    gate_scale: float = 0.1,
) -> Model:
    """Make ResNet-32 with gates on the 30 convolutions of its blocks.

    For 10 classes 461,872 weights of convolutions and the dense layer, 2,272 of normalization,
    52,320 of gates. Options are those of `GatedSettings`.

    Args:
      input_shape: height, width and channels of one example; at least 4×4.
      num_classes: width of the output.
      norm: ``"batch"`` or ``"group"``.
      density: fraction of channels that each gate keeps (rho), in (0, 1]; a method may change it
        later, by `gates.with_density`.
      choice: ``"salient"`` channels, or ``"random"`` ones for a control.
      gate_scale: of the gates' kernels at the start. With the public code's 1 the loss on 8×8
        digits starts above ten million, and the second step is not a number.

    Raises:
      ValueError: if the examples are no images, or too small, or an option is out of range.
    """
    options = (norm, density, choice, gate_scale)
    return _residual("gated_resnet32", 5, input_shape, num_classes, *options)


def gated_resnet8(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    norm: resnet.Norm,
    density: float,
    choice: Choice = "salient",
    gate_scale: float = 0.1,
) -> Model:
    """Make ResNet-8 with gates on the 6 convolutions of its blocks, for small images and CPUs.

    Arguments and errors are those of `gated_resnet32`.
    """
    options = (norm, density, choice, gate_scale)
    return _residual("gated_resnet8", 1, input_shape, num_classes, *options)


def _residual(name, depth, input_shape, num_classes, norm, density, choice, gate_scale) -> Model:
    shapes.check_sizes(num_classes, input_shape=input_shape)
    shapes.check_image(name, input_shape, smallest=4)
    _check(norm, density, choice, gate_scale)
    module = GatedResNet((16, 32, 64), depth, num_classes, norm, density, choice, gate_scale)
    return adapters.from_linen(module, input_shape=input_shape)


def gated_vgg16(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    norm: resnet.Norm,
    density: float,
    choice: Choice = "salient",
    hidden_sizes: Sequence[int] = (),
    dropout: float = 0.5,
    gate_scale: float = 1.0,
) -> Model:
    """Make VGG-16 with normalization and gates on its 13 convolutions.

    Args:
      input_shape: height, width and channels of one example; at least 32×32.
      num_classes: width of the output.
      norm: ``"batch"`` or ``"group"``.
      density: as in `gated_resnet32`.
      choice: as in `gated_resnet32`.
      hidden_sizes: as in `vgg.vgg16`; the paper's code has (4096, 4096).
      dropout: as in `vgg.vgg16`.
      gate_scale: as in `gated_resnet32`; here the gates see a sigmoid, and the code's 1 is sound.

    Raises:
      ValueError: if the examples are no images, or too small, or an option is out of range.
    """
    head = vgg.make_head(
        "gated_vgg16", input_shape, num_classes, hidden_sizes, pool=1, dropout=dropout
    )
    _check(norm, density, choice, gate_scale)
    module = GatedVgg(vgg.VGG16, head, norm, density, choice, gate_scale)
    return adapters.from_linen(module, input_shape=input_shape)


def _check(norm: str, density: float, choice: str, gate_scale: float) -> None:
    resnet.check_norm(norm)
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1], got {density}.")
    if choice not in ("salient", "random"):
        raise ValueError(f'choice must be "salient" or "random", got {choice!r}.')
    if not 0.0 < gate_scale < float("inf"):
        raise ValueError(f"gate_scale must be positive and finite, got {gate_scale}.")


PARTS = {
    "gated_resnet8": Part(
        call(gated_resnet8),
        GatedSettings,
        summary="resnet8 whose layers choose their channels for every example",
    ),
    "gated_resnet32": Part(
        call(gated_resnet32),
        GatedSettings,
        summary="resnet32 whose layers choose their channels for every example",
    ),
    "gated_vgg16": Part(
        call(gated_vgg16),
        GatedVggSettings,
        summary="vgg16_bn whose layers choose their channels for every example",
    ),
}
