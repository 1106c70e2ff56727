"""No correction: clients train and are averaged plainly."""

from typing import Any

from fedjaxprune.registry import Part
from fedjaxprune.settings import Settings
from fedjaxprune.types import Batcher


def build(settings: Settings, *, batcher: Batcher, optimizer_settings: Any) -> None:
    """Leave the protocol without a correction."""
    del settings, batcher, optimizer_settings  # nothing is corrected


PARTS = {"none": Part(build=build)}
