"""Networks and adapters."""
