"""Rows as they were after a round, to be saved while later rounds write theirs.

Nothing is copied when a snapshot is begun. A row that is overwritten before it was read is kept
until then. If these are many, whoever writes waits for whoever reads.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_PART = 0.1  # of the rows to be read, how many may be kept besides


class Frozen(NamedTuple):
    """The rows of a store as they were.

    Attributes:
      read: ``(leaf, places [n]) -> [n, bytes]`` uint8. Leaves are read in turn, the places of each
        in ascending order, each place once.
      keep: ``(places)``: these are about to be overwritten; to be called with the lock held.
      is_full: ``() -> bool``: whether to wait, on the lock, before more is overwritten.
      end: ``(is_whole)``: no more is read. If the rows are saved, and no others are needed to
        restore them, those that were overwritten since are all that have changed.
    """

    read: Callable[[int, np.ndarray], np.ndarray]
    keep: Callable[[np.ndarray], None]
    is_full: Callable[[], bool]
    end: Callable[[bool], None]


def freeze(
    arrays: list[np.ndarray],
    wanted: np.ndarray,
    is_changed: np.ndarray,
    lock: threading.Condition,
) -> Frozen:
    """Keep rows as they are now.

    Args:
      arrays: for each leaf ``[N', bytes]`` uint8, into which newer rows will be written.
      wanted: ``[N']`` bool, rows that will be read.
      is_changed: ``[N']`` bool, is set at the end.
      lock: guards the arrays; it is told when there is room again.
    """
    is_new = np.zeros_like(wanted)
    begins = [0] * len(arrays)  # of each leaf, places before which all are read
    old: list[dict[int, np.ndarray]] = [{} for _ in arrays]
    most = _PART * int(np.count_nonzero(wanted))
    is_over = False

    def read_fn(leaf, places):
        with lock:
            found = np.asarray(arrays[leaf][places])
            for i in np.flatnonzero(is_new[places]):
                found[i] = old[leaf].pop(int(places[i]))
            begins[leaf] = int(places[-1]) + 1
            lock.notify_all()
        return found

    def keep_fn(places):
        if is_over:
            return
        first = np.unique(places[~is_new[places]])
        is_new[first] = True
        first = first[wanted[first]]
        for leaf, array in enumerate(arrays):
            unread = first[first >= begins[leaf]]
            old[leaf].update(zip(unread.tolist(), array[unread], strict=True))

    def end_fn(is_whole):
        nonlocal is_over
        with lock:
            is_over = True
            for kept in old:
                kept.clear()
            if is_whole:
                is_changed[:] = is_new
            lock.notify_all()

    return Frozen(read_fn, keep_fn, lambda: max(map(len, old), default=0) > most, end_fn)
