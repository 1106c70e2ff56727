"""Structured pruning: whole filters and channels."""

from fedjaxprune import namespace

__all__, __getattr__, __dir__ = namespace.offer(__name__, modules="channel_pruning filters voting")
