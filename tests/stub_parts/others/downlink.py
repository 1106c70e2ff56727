"""Stubs of the kind downlink."""

from fedjaxprune.registry import Part
from fedjaxprune.settings import Settings, setting


def build(settings, *args, **context):
    """Build nothing."""
    return settings


class Changes(Settings):
    """A share of the entries."""

    fraction: float = setting(0.1, "Share that changes.", unit="fraction", gt=0, le=1)


PARTS = {
    "identity": Part(build=build, summary="all"),
    "top_k": Part(build=build, settings=Changes, summary="the largest changes"),
}
