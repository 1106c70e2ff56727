"""Stubs of the kind optimizer."""

from fedjaxprune.registry import Part
from fedjaxprune.settings import Fraction, NonNegative, Positive, Settings, setting


def build(settings, *args, **context):
    """Build nothing."""
    return settings


class Adam(Settings):
    """Adam."""

    learning_rate: Positive = setting(0.1, "Step size.", unit="factor")
    weight_decay: NonNegative = setting(0.0, "Multiple of the weights.", unit="factor")


class Sgd(Adam):
    """SGD."""

    momentum: Fraction = setting(0.0, "Momentum.", unit="factor")


PARTS = {
    "sgd": Part(build=build, settings=Sgd, summary="steps"),
    "adam": Part(build=build, settings=Adam, summary="scaled steps"),
}
