"""Networks read as programs: which indices are one channel, and the smaller network."""
