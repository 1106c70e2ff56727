"""The message format: what a client sends, as bytes."""

from fedjaxprune import namespace

__all__, __getattr__, __dir__ = namespace.offer(__name__, modules="codings format messages")
