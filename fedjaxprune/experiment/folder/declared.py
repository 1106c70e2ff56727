"""What the files of a checkpoint say of their arrays, checked before one of them is read.

TensorStore takes the memory that a file declares, and ends the process where there is none.
"""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import tensorstore

from fedjaxprune.experiment import reading

_ABOUT = (".zarray", "zarr.json")  # files that describe an array, in either version of zarr
_LARGEST_TYPE = 16  # bytes of a number
_FREE = 2**28  # bytes of arrays that files of any size may hold
_RATIO = 10_000  # bytes of an array that a byte of a file may stand for beyond that


def check(folder: pathlib.Path, kinds: Mapping[str, Sequence[Any]]) -> None:
    """Check that the arrays in a folder are of the given kinds, ``[dtype, shape]`` each.

    Raises:
      ValueError: they are not.
    """
    wanted = sorted(list(shape) for _, shape in kinds.values() if math.prod(shape))
    found = []
    for text in _descriptions(folder):
        about = reading.from_json(text)
        grid = about.get("chunk_grid", {}).get("configuration", {})
        dtype, shape = about.get("dtype", about.get("data_type")), about["shape"]
        chunk = about["chunks"] if "chunks" in about else grid["chunk_shape"]
        if not isinstance(dtype, str) or jax.numpy.dtype(dtype).itemsize > _LARGEST_TYPE:
            raise ValueError("the type of an array is none of ours")
        if not all(isinstance(size, int) and size >= 0 for size in (*shape, *chunk)):
            raise ValueError("the shape of an array is none")
        if math.prod(chunk) > max(1, math.prod(shape)):
            raise ValueError("an array is stored in pieces that are larger than it is")
        found.append(shape)
    if sorted(found) != wanted:
        raise ValueError("its arrays are not those that its description lists")


def check_room(folder: pathlib.Path, num_bytes: int) -> None:
    """Check that the files in a folder are large enough to hold arrays of so many bytes.

    Raises:
      ValueError: they are not.
    """
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if num_bytes > _FREE + _RATIO * held:
        raise ValueError(f"{held:,} bytes cannot hold arrays of {num_bytes:,} bytes")


def _descriptions(folder: pathlib.Path) -> Iterator[str]:
    """Read what describes the arrays: in OCDBT, as we write it, and as files of their own."""
    base = {"driver": "file", "path": f"{folder.absolute()}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    for key in store.list().result():
        if key.decode().endswith(_ABOUT):
            yield store.read(key).result().value.decode()
    for name in _ABOUT:
        for path in folder.rglob(name):
            yield reading.text(path, may_link=False)
