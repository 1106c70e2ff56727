"""Stubs of the kind server_optimizer."""

from fedjaxprune.registry import Part
from fedjaxprune.settings import Positive, Settings, setting


def build(settings, *args, **context):
    """Build nothing."""
    return settings


class Rate(Settings):
    """A step size."""

    server_learning_rate: Positive = setting(1.0, "Step size.", unit="factor")


class Needed(Settings):
    """A step size without default."""

    server_learning_rate: Positive = setting(..., "Step size.", unit="factor")


PARTS = {
    "fedavg": Part(build=build, settings=Rate, summary="the mean"),
    "fedadam": Part(build=build, settings=Needed, summary="scaled"),
}
