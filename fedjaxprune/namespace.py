"""Namespaces that import what they offer when it is first used."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def offer(
    package: str, *, modules: str = "", names: Mapping[str, str] | None = None
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Make `__all__`, `__getattr__` and `__dir__` of a package.

    Args:
      package: its ``__name__``.
      modules: its public modules, separated by spaces.
      names: other public names, separated by spaces, by the module below the package that defines
        them.
    """
    places = {name: module for module, offered in (names or {}).items() for name in offered.split()}
    public = sorted([*modules.split(), *places])

    def find(name: str) -> Any:
        """Import a public name when it is first used."""
        if name in places:
            found = getattr(importlib.import_module(f"{package}.{places[name]}"), name)
        elif name in public:
            return importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, found)
        return found

    return public, find, lambda: public
