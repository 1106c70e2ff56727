"""Arrays that may be larger than memory: looked at in parts, and copied only where they must be."""

import mmap
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

_AT_ONCE = 2**24  # values that are looked at together, or bytes of a file


def as_type(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Copy an array as another type; a memory-mapped one that has it already is not copied."""
    if values.dtype == dtype and _is_mapped(values):
        return values
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def blocks(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Walk through an array by some examples at a time: the number of the first, and these."""
    step = max(1, _AT_ONCE // max(1, values[:1].size))
    return ((start, values[start : start + step]) for start in range(0, len(values), step))


def advise(values: Any, *, order: Literal["any", "forward"]) -> None:
    """Tell the system how a memory-mapped array is read next; of others nothing is known.

    Read in any order, nothing beside what is read is fetched from the file.
    """
    file = _file(values)
    advice = {"any": "MADV_RANDOM", "forward": "MADV_SEQUENTIAL"}[order]
    if file is not None and hasattr(mmap, advice):  # on Windows there is none
        file.madvise(getattr(mmap, advice))


def checksum(arrays: Iterable[Any]) -> int:
    """Sum up arrays with their shapes and types, reading files from their beginnings."""
    total = 0
    for array in map(np.asarray, arrays):
        advise(array, order="forward")
        total = zlib.crc32(f"{array.shape} {array.dtype}".encode(), total)
        total = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, total)
    return total


def checksum_of_file(path: pathlib.Path) -> int:
    """Sum up a file's bytes; OSError if it cannot be read."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(_AT_ONCE):
            total = zlib.crc32(block, total)
    return total


def _is_mapped(values: Any) -> bool:
    """Tell whether an array is a view of a memory-mapped file."""
    return _file(values) is not None


def _file(values: Any) -> mmap.mmap | None:
    """Find the memory-mapped file that an array is a view of."""
    while isinstance(values, np.ndarray):
        values = values.base
    return values if isinstance(values, mmap.mmap) else None
