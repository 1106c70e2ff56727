"""Compute new masks from masks; does not depend on `federated`."""
