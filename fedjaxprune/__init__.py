"""Federated pruning as pure functions over parameter trees and mask trees."""

__version__ = "0.1.0"
