"""Build a run from its config and train."""
