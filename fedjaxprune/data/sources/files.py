"""Open the user's files, and say in one sentence why one cannot be read."""

import pathlib
from collections.abc import Callable
from typing import Any, Literal

from fedjaxprune.errors import DataError, first_line, near_file, near_miss
from fedjaxprune.registry import locate


def find(path: str, *, kind: Literal["file", "folder"] = "file") -> pathlib.Path:
    """Find a file or a folder."""
    found = locate(path)
    if not found.exists():
        raise DataError(f"there is no {kind} {path}{near_file(found)}")
    if found.is_dir() != (kind == "folder"):
        other = "folder" if kind == "file" else "file"
        raise DataError(f"path must be a {kind}, but {path} is a {other}.")
    if kind == "file" and not found.is_file():  # a pipe would be waited for without end
        raise DataError(f"path must be a regular file, but {path} is a pipe or a device.")
    return found


def read(path: pathlib.Path, reader: Callable[[pathlib.Path], Any], what: str) -> Any:
    """Call a reader; an error of its own becomes one sentence."""
    try:
        return reader(path)
    except DataError:
        raise
    except Exception as error:  # readers raise errors of many types on damaged files
        raise DataError(f"{path} cannot be read as {what}: {first_line(error)}") from error


def column(name: str, names: list[str], setting: str, where: str) -> str:
    """Check that a named column or array exists."""
    if name not in names:
        shown = names if len(names) <= 12 else [*names[:8], "...", *names[-3:]]
        have = ", ".join(shown) + near_miss(name, names)
        raise DataError(f"{setting}: {where} has no {name!r}, only {have}")
    return name
