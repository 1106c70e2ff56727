"""Stub of a method without settings."""

from typing import Any

from fedjaxprune.method import Method
from fedjaxprune.settings import Settings


def build(settings: Any, task: Any) -> Any:
    """Build nothing."""
    return settings, task


METHOD = Method(build=build, settings=Settings, default_model="gated_resnet8")
