"""One module for each kind."""
