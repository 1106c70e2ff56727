"""Clients and server; takes masks as given and never makes one."""
