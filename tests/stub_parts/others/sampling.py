"""Stubs of the kind sampling."""

from fedjaxprune.registry import Part


def build(settings, *args, **context):
    """Build nothing."""
    return settings


PARTS = {"uniform": Part(build=build), "weighted": Part(build=build)}
