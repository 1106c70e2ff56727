"""Masks of whole filters and channels, and the rules by which votes become one mask."""
