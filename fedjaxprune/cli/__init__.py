"""The command ``fedjaxprune``: the only part of the package that prints."""
