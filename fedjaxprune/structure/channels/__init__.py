"""Which channels of which leaves are one and the same, found by walking the jaxpr of a network."""

from fedjaxprune import namespace

__all__, __getattr__, __dir__ = namespace.offer(__name__, modules="groups")
