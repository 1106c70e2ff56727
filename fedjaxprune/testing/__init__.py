"""Hold a federated method to laws that every method keeps: `laws.laws_of`.

The laws run on a client with a known answer (`scenario`), in seconds on a processor.
"""

from fedjaxprune.testing.laws import laws_of

__all__ = ["laws_of"]
