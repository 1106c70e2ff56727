"""Networks read as programs: what is one channel, the smaller network, moments of layers."""

from fedjaxprune import namespace

__all__, __getattr__, __dir__ = namespace.offer(__name__, modules="channels compaction moments")
