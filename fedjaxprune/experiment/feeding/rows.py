"""Row stores: what clients remember, kept in host memory or in files, and read a cohort at a time.

A row is a few bytes of each array: a boolean array has a bit for each entry. Until a client has
been written, its row is that of a client that never took part, and takes no memory. Of several
processes each has a store of the clients that are at home with it (`homes`).
"""

import math
import pathlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjaxprune.experiment.feeding import frozen as frozen_lib
from fedjaxprune.experiment.feeding import homes
from fedjaxprune.experiment.feeding.frozen import Frozen
from fedjaxprune.experiment.feeding.homes import Home


class Kept(NamedTuple):
    """The rows of all clients that are at home here, ``N'`` of them, as bytes.

    Attributes:
      arrays: for each leaf of a row ``[N', bytes]`` uint8, in memory or in a file.
      initial: for each leaf ``[bytes]`` uint8, of a client that was never written.
      is_written: ``[N']`` bool, clients that were.
      is_changed: ``[N']`` bool, those written since it was last set to False.
      num_clients: ``N``, of all homes.
      home: which one this is.
    """

    arrays: list[np.ndarray]
    initial: list[np.ndarray]
    is_written: np.ndarray
    is_changed: np.ndarray
    num_clients: int
    home: Home


class RowStore(NamedTuple):
    """Keeps clients' rows. Any thread may call these functions.

    Attributes:
      read: ``ids [C] -> rows``, tree of NumPy arrays ``[C, ...]``; zeros for clients that are at
        home elsewhere.
      write: ``(ids [C], rows)``; of an id that occurs twice the last row counts, and of a client
        that is at home elsewhere none.
      promise: ``(number, ids, rows)``: round `number` writes these rows, which may still be being
        computed.
      settle: ``(number)``: write what rounds up to `number` have promised, in their order.
      freeze: ``wanted [N'] -> Frozen``: keep these rows as they are until `Frozen.end`; one at a
        time.
      kept: the bytes.
    """

    read: Callable[[np.ndarray], Any]
    write: Callable[[np.ndarray, Any], None]
    promise: Callable[[int, tuple[np.ndarray, np.ndarray], Any], None]
    settle: Callable[[int], None]
    freeze: Callable[[np.ndarray], Frozen]
    kept: Kept


def make(
    row: Any,
    *,
    num_clients: int,
    folder: pathlib.Path | None = None,
    home: Home = Home(),  # noqa: B008 a tuple
) -> RowStore:
    """Make a store in which no client was written yet.

    Args:
      row: tree of arrays, of a client that never took part.
      num_clients: ``N``.
      folder: of the files, written over; None keeps rows in memory.
      home: whose clients it keeps; by default all.
    """
    leaves, structure = jax.tree.flatten(jax.device_get(row))
    leaves = [np.asarray(leaf) for leaf in leaves]
    initial = [_to_bytes(leaf[None])[0] for leaf in leaves]
    number = homes.count(home, num_clients)
    kept = Kept(
        arrays=[
            _array(folder, f"{index}.rows", (number, len(first)))
            for index, first in enumerate(initial)
        ],
        initial=initial,
        is_written=np.zeros(number, bool),
        is_changed=np.zeros(number, bool),
        num_clients=num_clients,
        home=home,
    )
    promised: dict[int, tuple[np.ndarray, np.ndarray, Any]] = {}
    lock = threading.Condition()  # with an RLock
    frozen: list[Frozen] = []

    def read_fn(ids):
        with lock:
            found = [_read(kept, index, ids) for index in range(len(leaves))]
        rows = [_from_bytes(one, like) for one, like in zip(found, leaves, strict=True)]
        return jax.tree.unflatten(structure, rows)

    def write_fn(ids, rows):
        here = _all_or(homes.is_own(home, ids))
        places = homes.places(home, ids[here])
        with lock:
            for one in frozen:
                one.keep(places)
            for array, leaf in zip(kept.arrays, jax.tree.leaves(rows), strict=True):
                if array.shape[1]:
                    array[places] = _to_bytes(np.asarray(leaf)[here])
            kept.is_written[places] = True
            kept.is_changed[places] = True

    def promise_fn(number, members, rows):
        promised[number] = (*members, rows)

    def settle_fn(number):
        with lock:
            lock.wait_for(lambda: not any(one.is_full() for one in frozen))
            for one in sorted(one for one in list(promised) if one <= number):
                ids, present, rows = promised.pop(one)
                host, took_part = jax.device_get(rows), _all_or(present)
                write_fn(ids[took_part], jax.tree.map(lambda leaf: leaf[took_part], host))  # noqa: B023

    def freeze_fn(wanted):
        with lock:
            frozen[:] = [frozen_lib.freeze(kept.arrays, wanted, kept.is_changed, lock)]
        return frozen[0]

    return RowStore(read_fn, write_fn, promise_fn, settle_fn, freeze_fn, kept)


def _all_or(flags: np.ndarray) -> Any:
    """Give an index of what is flagged, one that copies nothing if that is everything."""
    return slice(None) if flags.all() else flags


def num_bytes(row: Any) -> int:
    """Count the bytes of a client's row on a device; `row` is a tree of arrays or of shapes."""
    leaves = jax.tree.leaves(row)
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _array(folder: pathlib.Path | None, name: str, shape: tuple[int, int]) -> np.ndarray:
    """Make an array of zeros that takes memory, or room on a disk, only where it is written."""
    if folder is None or not shape[1]:
        return np.zeros(shape, np.uint8)
    return np.memmap(folder / name, np.uint8, mode="w+", shape=shape)


def _read(kept: Kept, index: int, ids: np.ndarray) -> np.ndarray:
    """Read a leaf of some clients, ``[C, bytes]``."""
    here = homes.is_own(kept.home, ids)
    places = homes.places(kept.home, ids[here])
    own = np.asarray(kept.arrays[index][places])
    own[~kept.is_written[places]] = kept.initial[index]
    if here.all():
        return own
    found = np.zeros((len(ids), own.shape[1]), np.uint8)
    found[here] = own
    return found


def _to_bytes(leaf: np.ndarray) -> np.ndarray:
    """Turn rows ``[C, ...]`` into bytes ``[C, bytes]``, eight booleans in each."""
    flat = np.ascontiguousarray(leaf).reshape(len(leaf), math.prod(leaf.shape[1:]))
    return np.packbits(flat, axis=1) if leaf.dtype == np.bool_ else flat.view(np.uint8)


def _from_bytes(found: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Turn bytes ``[C, bytes]`` into rows ``[C, ...]`` of one's type and shape."""
    if like.dtype == np.bool_:
        flat = np.unpackbits(found, axis=1, count=like.size).view(np.bool_)
    else:
        flat = found.view(like.dtype)
    return flat.reshape(len(found), *like.shape)
