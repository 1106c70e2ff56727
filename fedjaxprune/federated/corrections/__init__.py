"""Remedies against client drift: parts that go around the local training of any method."""
