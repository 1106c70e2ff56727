"""Stubs of the kind aggregator."""

from fedjaxprune.registry import Part
from fedjaxprune.settings import Settings, setting


def build(settings, *args, **context):
    """Build nothing."""
    return settings


class Trimmed(Settings):
    """A mean without extremes."""

    fraction: float = setting(0.1, "Share cut off.", unit="fraction", ge=0, lt=0.5)


PARTS = {
    "weighted_mean": Part(build=build),
    "trimmed_mean": Part(build=build, settings=Trimmed),
}
