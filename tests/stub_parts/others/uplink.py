"""Stubs of the kind uplink."""

from fedjaxprune.registry import Part
from fedjaxprune.settings import Settings, setting


def build(settings, *args, **context):
    """Build nothing."""
    return settings


class Share(Settings):
    """A share of the entries."""

    fraction: float = setting(0.1, "Share that is sent.", unit="fraction", gt=0, le=1)


class Bits(Settings):
    """Bits of a value."""

    bits: int = setting(8, "Bits of a value.", unit="bits", ge=1, le=16)


PARTS = {
    "identity": Part(build=build, summary="all"),
    "top_k": Part(build=build, settings=Share, summary="the largest"),
    "quantize": Part(build=build, settings=Bits, summary="few bits"),
}
