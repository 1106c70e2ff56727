"""What it costs: arithmetic, memory and coverage, counted from the graph and the masks."""
