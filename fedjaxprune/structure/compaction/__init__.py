"""Take dead channels out of a network for good, whatever the network is."""

from fedjaxprune import namespace

__all__, __getattr__, __dir__ = namespace.offer(__name__, modules="compact")
