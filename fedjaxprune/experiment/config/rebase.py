"""Relative paths in a YAML file, which are seen from the file and not from the working folder."""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedjaxprune.data.sources import is_path
from fedjaxprune.registry import locate

_PYTHON = re.compile(r"(?P<path>[^:]+\.py)(?P<name>:\w+)?")
_DATA = "data.dataset"
_FILES = ("path", "test_path", "data_dir", "source")  # settings of data sets that name a file
_CASES, _PRESET = "cases", "preset"  # of a sweep


def rebase(values: Mapping[str, Any], folders: Sequence[pathlib.Path]) -> dict[str, Any]:
    """Write the relative paths in settings as they are seen from the working folder.

    Args:
      values: nested settings or such by dotted path, of a run or a sweep.
      folders: from which a path may be seen; the first in which there is something counts, and a
        path that leads to nothing in any of them stays as it is.
    """
    return {name: _moved(value, name, folders) for name, value in values.items()}


def is_same(one: Any, other: Any) -> bool:
    """Tell whether two texts name the same file, and the same in it."""
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    first, second = (_PYTHON.fullmatch(text) for text in (one, other))
    if (first and first["name"]) != (second and second["name"]):
        return False
    places = [locate(two["path"] if two else text) for two, text in ((first, one), (second, other))]
    return all(map(os.path.exists, places)) and os.path.samefile(*places)


def _moved(value: Any, path: str, folders: Sequence[pathlib.Path]) -> Any:
    if isinstance(value, Mapping):
        inside = "" if path == _CASES else f"{path}."
        return {key: _moved(one, f"{inside}{key}", folders) for key, one in value.items()}
    if isinstance(value, list):
        return [_moved(one, path, folders) for one in value]
    if not isinstance(value, str):
        return value
    if python := _PYTHON.fullmatch(value):
        return _seen(python["path"], folders) + (python["name"] or "")
    owner, _, name = path.removesuffix(".name").rpartition(".")
    is_file = owner == _DATA and name in _FILES
    is_file |= f"{owner}.{name}" == _DATA and is_path(value)
    is_file |= path == _PRESET and value.endswith((".yaml", ".yml"))
    return _seen(value, folders) if is_file else value


def _seen(text: str, folders: Sequence[pathlib.Path]) -> str:
    """Write a path as it is seen from here, if it is relative and there is something."""
    if os.path.isabs(text) or text.startswith("~"):
        return text
    for folder in folders:
        there = folder / text
        if os.path.exists(there):
            if os.path.samefile(folder, os.curdir):
                return text
            short = os.path.relpath(there)
            is_inside = os.pardir not in pathlib.PurePath(short).parts
            return os.path.join(os.curdir, short) if is_inside else os.path.abspath(there)
    return text
