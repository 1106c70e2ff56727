"""Stubs of the kind attack."""

from fedjaxprune.registry import Part


def build(settings, *args, **context):
    """Build nothing."""
    return settings


PARTS = {"none": Part(build=build), "sign_flip": Part(build=build)}
