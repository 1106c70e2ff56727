"""Masks to masks; has never heard of a client."""
