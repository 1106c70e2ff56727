"""The four networks of the speed tables, in every contender's own way of writing them."""

import itertools
from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    """A network and the local work that is timed.

    Attributes:
      image: height, width and channels.
      num_classes: width of the output.
      batch_size: examples of a step.
      num_steps: local steps of a client, in a full measurement.
      norm: kind of normalization of a resnet.
    """

    image: tuple[int, int, int]
    num_classes: int
    batch_size: int
    num_steps: int
    norm: str | None = None


CASES = {
    "lenet5": Case((28, 28, 1), 10, 128, 40),
    "cnn": Case((28, 28, 1), 10, 32, 20),
    "resnet20": Case((32, 32, 3), 10, 32, 6, norm="group"),
    "resnet18": Case((32, 32, 3), 10, 64, 1, norm="batch"),
}
NUM_EXAMPLES = 2048  # a client's
LEARNING_RATE = 0.01


def examples(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Draw images ``[E, H, W, C]`` uint8 and labels ``[E]``."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (NUM_EXAMPLES, *case.image), dtype=np.uint8)
    labels = generator.integers(0, case.num_classes, NUM_EXAMPLES, dtype=np.int32)
    return images, labels


def ours(name: str) -> Any:
    """Make the built-in network, a `Model`."""
    from fedjaxprune import models

    case = CASES[name]
    options = {} if case.norm is None else {"norm": case.norm}
    return getattr(models, name)(input_shape=case.image, num_classes=case.num_classes, **options)


def training_flops(name: str) -> float:
    """Count the floating-point operations of training on one example, by the layers' plain sums."""
    import jax

    from fedjaxprune.costs import flops

    image = jax.ShapeDtypeStruct((1, *CASES[name].image), "float32")
    cost = flops.dense(flops.of_model(ours(name), None, image))
    return 2.0 * sum(cost)  # a multiply-add is two


def plain_flax(name: str, *, convolution: Any = None, max_pool: Any = None) -> Any:
    """Write the network as a flax user does, with flax's own layers; a linen module.

    Args:
      name: of the case.
      convolution: for ``nn.Conv(conv_general_dilated=...)``; flax's own by default.
      max_pool: of 2×2 windows; flax's own by default.
    """
    import functools

    import flax.linen as nn
    import jax.numpy as jnp

    case = CASES[name]
    conv = functools.partial(nn.Conv, conv_general_dilated=convolution)
    pool = max_pool or functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))

    class Small(nn.Module):
        channels: tuple[int, ...]
        padding: tuple[int, ...]
        hidden: tuple[int, ...]

        @nn.compact
        def __call__(self, x, train):
            for features, pad in zip(self.channels, self.padding, strict=True):
                x = nn.relu(conv(features, (5, 5), padding=pad)(x))
                x = pool(x)
            x = x.reshape(x.shape[0], -1)
            for features in self.hidden:
                x = nn.relu(nn.Dense(features)(x))
            return nn.Dense(case.num_classes)(x)

    def norm(x, train):
        if case.norm == "group":
            return nn.GroupNorm(num_groups=min(32, x.shape[-1] // 4))(x)
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

    class Residual(nn.Module):
        widths: tuple[int, ...]
        depth: int
        projection: bool

        @nn.compact
        def __call__(self, x, train):
            three = functools.partial(conv, kernel_size=(3, 3), padding=1, use_bias=False)
            x = nn.relu(norm(three(self.widths[0])(x), train))
            for i, width in enumerate(self.widths):
                for j in range(self.depth):
                    stride = 2 if i > 0 and j == 0 else 1
                    shortcut = x
                    if stride > 1 and self.projection:
                        one = conv(width, (1, 1), strides=stride, use_bias=False)
                        shortcut = norm(one(x), train)
                    elif stride > 1:
                        wider = width - x.shape[-1]
                        shortcut = jnp.pad(
                            x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (wider // 2, wider // 2))
                        )
                    y = nn.relu(norm(three(width, strides=stride)(x), train))
                    x = nn.relu(norm(three(width)(y), train) + shortcut)
            return nn.Dense(case.num_classes)(jnp.mean(x, axis=(1, 2)))

    return {
        "lenet5": lambda: Small((6, 16), (2, 0), (120, 84)),
        "cnn": lambda: Small((32, 64), (2, 2), (512,)),
        "resnet20": lambda: Residual((16, 32, 64), 3, False),
        "resnet18": lambda: Residual((64, 128, 256, 512), 2, True),
    }[name]()


def plain_torch(name: str) -> Any:
    """Write the network as a PyTorch user does; an ``nn.Module``."""
    import torch
    from torch import nn
    from torch.nn import functional

    case = CASES[name]

    def norm(width):
        if case.norm == "group":
            return nn.GroupNorm(min(32, width // 4), width)
        return nn.BatchNorm2d(width)

    def three(before, width, stride=1):
        return nn.Conv2d(before, width, 3, stride, 1, bias=False)

    class Block(nn.Module):
        def __init__(self, before, width, stride, projection):
            super().__init__()
            self.before, self.width, self.stride = before, width, stride
            self.conv_1, self.norm_1 = three(before, width, stride), norm(width)
            self.conv_2, self.norm_2 = three(width, width), norm(width)
            self.shortcut = None
            if stride > 1 and projection:
                one = nn.Conv2d(before, width, 1, stride, bias=False)
                self.shortcut = nn.Sequential(one, norm(width))

        def forward(self, x):
            shortcut = x
            if self.shortcut is not None:
                shortcut = self.shortcut(x)
            elif self.stride > 1:
                half = (self.width - self.before) // 2
                shortcut = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
            x = functional.relu(self.norm_1(self.conv_1(x)))
            return functional.relu(self.norm_2(self.conv_2(x)) + shortcut)

    def residual(widths, depth, projection):
        layers = [three(case.image[2], widths[0]), norm(widths[0]), nn.ReLU()]
        before = widths[0]
        for i, width in enumerate(widths):
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                layers.append(Block(before, width, stride, projection))
                before = width
        return nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, case.num_classes)
        )

    def small(channels, padding, hidden):
        layers, before = [], case.image[2]
        for features, pad in zip(channels, padding, strict=True):
            layers += [nn.Conv2d(before, features, 5, padding=pad), nn.ReLU(), nn.MaxPool2d(2)]
            before = features
        layers.append(nn.Flatten())
        for before, features in itertools.pairwise(hidden):
            layers += [nn.Linear(before, features), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(hidden[-1], case.num_classes))

    torch.manual_seed(0)
    return {
        "lenet5": lambda: small((6, 16), (2, 0), (400, 120, 84)),
        "cnn": lambda: small((32, 64), (2, 2), (3136, 512)),
        "resnet20": lambda: residual((16, 32, 64), 3, False),
        "resnet18": lambda: residual((64, 128, 256, 512), 2, True),
    }[name]()
