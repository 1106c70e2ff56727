"""Open the user's files, and say in one sentence why one cannot be read."""

import pathlib
from collections.abc import Callable
from typing import Any

from fedjaxprune.errors import DataError, first_line, near_miss


def find(path: str, *, folder: bool = False) -> pathlib.Path:
    """Find a file, or a folder.

    Raises:
      DataError: there is none; the nearest name beside it is suggested.
    """
    found = pathlib.Path(path).expanduser()
    kind, other = ("folder", "file") if folder else ("file", "folder")
    if found.exists() and found.is_dir() != folder:
        raise DataError(f"path must be a {kind}, but {path} is a {other}.")
    if not found.exists():
        beside = found.parent
        names = [entry.name for entry in beside.iterdir()] if beside.is_dir() else []
        raise DataError(f"there is no {kind} {path}{near_miss(found.name, names)}")
    return found


def read(path: pathlib.Path, reader: Callable[[pathlib.Path], Any], what: str) -> Any:
    """Call a reader.

    Raises:
      DataError: with the first line of what the reader raised.
    """
    try:
        return reader(path)
    except DataError:
        raise
    except Exception as error:  # readers raise errors of many types on damaged files
        raise DataError(f"{path} cannot be read as {what}: {first_line(error)}") from error


def column(name: str, names: list[str], setting: str, where: str) -> str:
    """Check that a named column or array exists.

    Raises:
      DataError: with the names that exist.
    """
    if name not in names:
        have = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise DataError(f"{setting}: {where} has no {name!r}, only {have}{near_miss(name, names)}")
    return name
