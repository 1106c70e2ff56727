"""Copies of arrays that the next round overwrites, for whoever writes them in the background.

Large arrays are copied to a file without a name, block by block, and are read from there: the copy
is in the system's cache of files, which it can write out, and not in the memory of the process. The
file is used again: to copy into pages that are in the cache takes a tenth of the time that new ones
take, for which the system may also wait for the disk.
"""

import pathlib
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

_BLOCK = 2**24  # bytes
_SMALL = 2**22  # bytes of an array that is copied in memory
_LARGE = 2**27  # bytes that take long to copy to new pages
_PAGE = 2**12  # bytes to which copies are aligned


class Kept(np.ndarray):
    """An array that nobody writes to, of which orbax need not make a copy of its own."""

    def __deepcopy__(self, memo: Any) -> "Kept":
        del memo
        return self


class Scratch(NamedTuple):
    """Room for copies, most of it in a file that is made when it is first needed.

    Attributes:
      take: ``array -> Kept``: copy an array now. One that devices share is put together, some rows
        at a time.
      reuse: ``()``: the copies that were taken until now are not needed any more.
      prepare: ``shapes``: make room for copies of such arrays, if they are large.
      close: ``()``: remove the file.

    All but `close` raise an OSError if the file cannot be written.
    """

    take: Callable[[jax.Array], Kept]
    reuse: Callable[[], None]
    prepare: Callable[[list[Any]], None]
    close: Callable[[], None]


def scratch(folder: pathlib.Path) -> Scratch:
    """Make room for copies; the file without a name is in `folder`."""
    file, end = None, 0

    def write(blocks: Iterator[Any], begin: int) -> Any:
        nonlocal file
        if file is None:
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 closed by `close_fn`
        file.seek(begin)
        for block in blocks:
            file.write(block)
        file.flush()
        return file

    def take_fn(leaf):
        nonlocal end
        if _num_bytes(leaf) <= _SMALL:
            return np.array(leaf, copy=True).view(Kept)
        here = leaf.addressable_data(0) if leaf.is_fully_replicated else leaf
        is_host = here is not leaf and all(device.platform == "cpu" for device in here.devices())
        # A CPU's arrays are looked at where they lie; others come over block by block.
        blocks = _blocks(np.asarray(here) if is_host else here)
        begin, end = end, _after(end, leaf)
        made = write(blocks, begin)
        return np.memmap(made, leaf.dtype, "r", begin, leaf.shape).view(Kept)

    def reuse_fn():
        nonlocal end
        end = 0

    def prepare_fn(leaves):
        number = 0
        for leaf in leaves:
            number = _after(number, leaf) if _num_bytes(leaf) > _SMALL else number
        if number >= _LARGE:
            zeros = np.zeros(_BLOCK, np.uint8).data
            sizes = (min(_BLOCK, number - begin) for begin in range(0, number, _BLOCK))
            write((zeros[:size] for size in sizes), 0)

    def close_fn():
        if file is not None:
            file.close()

    return Scratch(take_fn, reuse_fn, prepare_fn, close_fn)


def _after(begin: int, leaf: Any) -> int:
    """Tell where the next copy begins."""
    return begin + -(-_num_bytes(leaf) // _PAGE) * _PAGE


def _num_bytes(leaf: Any) -> int:
    """Count the bytes of an array or a shape."""
    return leaf.size * leaf.dtype.itemsize


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
