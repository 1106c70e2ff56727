"""Hold a federated method to laws that every method keeps: `laws_of`.

The laws run on a client with a known answer (`scenario`), in seconds on a processor.
"""

from fedjaxprune.testing.conformance import laws_of

__all__ = ["laws_of"]
