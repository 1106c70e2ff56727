"""Corrections of client drift, around any method."""

from fedjaxprune import namespace

__all__, __getattr__, __dir__ = namespace.offer(__name__, modules="fednova scaffold")
