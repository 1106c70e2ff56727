"""Runs whose examples, or whose clients' rows, are not on the device."""
