"""Copies of arrays that the next round overwrites, for whoever writes them in the background.

Large arrays are copied to a file without a name, block by block, and are read from there: the copy
is in the system's cache of files, which it can write out, and not in the memory of the process.
"""

import pathlib
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

_BLOCK = 2**24  # bytes
_SMALL = 2**22  # bytes of an array that is copied in memory


class Kept(np.ndarray):
    """An array that nobody writes to, of which orbax need not make a copy of its own."""

    def __deepcopy__(self, memo: Any) -> "Kept":
        del memo
        return self


def take(leaf: jax.Array, folder: pathlib.Path) -> Kept:
    """Copy an array now.

    Args:
      leaf: one that devices share is put together, some rows at a time.
      folder: where a file without a name may lie.

    Raises:
      OSError: the file cannot be written.
    """
    if leaf.nbytes <= _SMALL:
        return np.array(leaf, copy=True).view(Kept)
    here = leaf.addressable_data(0) if leaf.is_fully_replicated else leaf
    is_host = here is not leaf and all(device.platform == "cpu" for device in here.devices())
    with tempfile.TemporaryFile(dir=folder) as file:
        # A CPU's arrays are looked at where they lie; others come over block by block.
        for block in _blocks(np.asarray(here) if is_host else here):
            file.write(block)
        file.flush()
        return np.memmap(file, leaf.dtype, "r", shape=leaf.shape).view(Kept)


def checksum(array: np.ndarray) -> int:
    """Sum up the contents of an array, without a copy of it."""
    total = 0
    for block in _blocks(array):
        total = zlib.crc32(block, total)
    return total


def _blocks(array: Any) -> Iterator[memoryview]:
    """Give the bytes of an array in turn, by some of its rows at a time."""
    rows = array[None] if array.ndim == 0 else array
    step = max(1, _BLOCK * len(rows) // max(1, array.nbytes))
    for begin in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[begin : begin + step])
        yield part.reshape(-1).view(np.uint8).data
