"""Configuration: sections, files, validation, identity."""
