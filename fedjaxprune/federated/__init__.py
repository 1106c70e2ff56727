"""Clients and server; takes masks as given."""
