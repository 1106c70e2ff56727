"""The message format: what a client sends, as bytes."""
