"""Devices and the number of clients that a device trains at once."""
