"""What a run really costs: bits on the wire, written and counted."""
