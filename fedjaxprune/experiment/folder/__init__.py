"""The run folder: record, checkpoints, lock."""
