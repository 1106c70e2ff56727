"""Compare runs: tables, plots, the report."""
