"""Parts by name: built-in ones, those of installed packages and those of a user's own files."""

from fedjaxprune.registry.finding import Found, find
from fedjaxprune.registry.imports import as_started_in, locate
from fedjaxprune.registry.listing import KINDS, Kind, Listed, Origin, names
from fedjaxprune.registry.parts import Part, call, part
from fedjaxprune.settings import describe_settings

__all__ = [
    "KINDS",
    "Found",
    "Kind",
    "Listed",
    "Origin",
    "Part",
    "as_started_in",
    "call",
    "describe_settings",
    "find",
    "locate",
    "names",
    "part",
]
