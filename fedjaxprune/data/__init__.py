"""Data sets, partitions and batches that are gathered inside the jit."""

from fedjaxprune import namespace

__all__, __getattr__, __dir__ = namespace.offer(
    __name__,
    modules="batching datasets partitions sources splits transforms",
    names={"datasets": "Dataset load", "conversion": "as_dataset"},
)
