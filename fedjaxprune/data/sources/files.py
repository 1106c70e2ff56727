"""Open the user's files, and say in one sentence why one cannot be read."""

import pathlib
from collections.abc import Callable
from typing import Any

from fedjaxprune.errors import DataError, first_line, near_miss


def find(path: str) -> pathlib.Path:
    """Find a file.

    Raises:
      DataError: there is none; the nearest name beside it is suggested.
    """
    found = _find(path, "file")
    if found.is_dir():
        raise DataError(f"path must be a file, but {path} is a folder.")
    return found


def find_folder(path: str) -> pathlib.Path:
    """Find a folder; errors are those of `find`."""
    found = _find(path, "folder")
    if not found.is_dir():
        raise DataError(f"path must be a folder, but {path} is a file.")
    return found


def _find(path: str, kind: str) -> pathlib.Path:
    found = pathlib.Path(path).expanduser()
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
        shown = names if len(names) <= 12 else [*names[:8], "...", *names[-3:]]
        have = ", ".join(shown)
        raise DataError(f"{setting}: {where} has no {name!r}, only {have}{near_miss(name, names)}")
    return name
