"""Stubs of the kind correction."""

from fedjaxprune.registry import Part


def build(settings, *args, **context):
    """Build nothing."""
    return settings


PARTS = {"none": Part(build=build), "scaffold": Part(build=build)}
