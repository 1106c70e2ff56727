"""Methods: one file, one paper."""
