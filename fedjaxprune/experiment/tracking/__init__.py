"""Progress and trackers."""
