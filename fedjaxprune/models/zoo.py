"""The built-in networks under one name."""

from fedjaxprune.models.convolutional import SmallCnn, cnn, lenet5
from fedjaxprune.models.perceptron import Mlp, mlp
from fedjaxprune.models.resnet import resnet8, resnet18, resnet20, resnet32, resnet34, resnet50

__all__ = [
    "Mlp",
    "SmallCnn",
    "cnn",
    "lenet5",
    "mlp",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet50",
]
