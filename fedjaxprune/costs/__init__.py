"""What a run really costs: bits on the wire, written and counted."""

from fedjaxprune import namespace

__all__, __getattr__, __dir__ = namespace.offer(
    __name__, modules="coverage flops hardware ledger storage_models"
)
