"""Data sets, partitions and batches that are gathered inside the jit."""
