"""Networks read as programs: which indices are one channel, and the smaller network."""

from fedjaxprune import namespace

__all__, __getattr__, __dir__ = namespace.offer(__name__, modules="channels compaction")
