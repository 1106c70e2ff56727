"""Export a trained network."""
