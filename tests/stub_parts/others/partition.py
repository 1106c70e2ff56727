"""Stubs of the kind partition."""

from fedjaxprune.registry import Part
from fedjaxprune.settings import Positive, Settings, setting


def build(settings, *args, **context):
    """Build nothing."""
    return settings


class Dirichlet(Settings):
    """Uneven labels."""

    alpha: Positive = setting(0.5, "Concentration.", unit="no unit")


class ByKey(Settings):
    """One client for each key."""

    key: str | None = setting(None, "Column.")


PARTS = {
    "iid": Part(build=build, summary="alike"),
    "dirichlet": Part(build=build, settings=Dirichlet, summary="uneven"),
    "by_key": Part(build=build, settings=ByKey, summary="natural"),
}
