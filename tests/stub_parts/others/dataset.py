"""Stubs of the kind dataset."""

from fedjaxprune.registry import Part
from fedjaxprune.settings import Settings, setting


def build(settings, *args, **context):
    """Build nothing."""
    return settings


class Prepared(Settings):
    """A prepared set."""

    tfds_name: str = setting(..., "Name of the set.", min_length=1)
    data_dir: str | None = setting(None, "Folder of prepared sets.", unset="~/data", min_length=1)


class Table(Settings):
    """A file."""

    path: str = setting(..., "The file.")
    key: str | None = setting(None, "Column of client ids.")


PARTS = {
    "digits": Part(build=build, summary="scanned digits"),
    "tfds": Part(build=build, settings=Prepared, summary="a prepared set"),
    "table": Part(build=build, settings=Table, summary="a table"),
}
