"""What the loop of a run asks for, whether its rounds are fed or all is on the device."""

import contextlib
import errno
import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fedjaxprune.errors import RunFolderError
from fedjaxprune.experiment.feeding import feed as feed_lib
from fedjaxprune.experiment.feeding import homes, rows, saved_rows
from fedjaxprune.experiment.feeding.feed import Feed, StepFn
from fedjaxprune.experiment.feeding.homes import Home
from fedjaxprune.experiment.folder import layout
from fedjaxprune.rounds.simulation import Simulation
from fedjaxprune.types import Population

_WORKING = "working"  # folder of the files that rows are kept in, for each process
_PAGE = 4096  # bytes that a row takes at most beside its own


class Feeder(NamedTuple):
    """Feeds a run.

    Attributes:
      step: ``(index of a stage, compiled round, numbers of the rounds) -> step`` (`feed.step`).
      lacks: says why clients' rows after so many rounds cannot be restored; nothing if they can.
      restore: these rows.
      save: ``(number of rounds, numbers to keep) -> write``: begin to save the rows as they are
        now. `write` does so, in any thread, before the next save, and then forgets all that were
        saved but those to keep. Each process saves its own.
    """

    step: Callable[[int, Callable[..., Any], range], StepFn]
    lacks: Callable[[int], str]
    restore: Callable[[int], None]
    save: Callable[[int, Collection[int]], saved_rows.WriteFn]


def _nothing_to_write() -> None:
    """Do nothing: rows are saved with all else that is on the device."""


RESIDENT = Feeder(
    step=lambda index, compiled, rounds: compiled,
    lacks=lambda number: "",
    restore=lambda number: None,
    save=lambda number, keep: _nothing_to_write,
)


def has_store(feed: Feed | None) -> bool:
    """Tell whether clients' rows are kept off the device."""
    return feed is not None and feed.rows != "device"


def on_device(feed: Feed | None, population: Population) -> Any:
    """Give what of a population is to be on the device for all rounds: all of it, or nothing."""
    return population if feed is None or feed.pantries is None else ()


def without_rows(feed: Feed | None, begun: Simulation) -> tuple[Simulation, Any]:
    """Take the row of a client that never took part out of a simulation, where a store has all.

    A simulation of shapes gives shapes.
    """
    if not has_store(feed):
        return begun, ()
    take = functools.partial(jax.tree.map, lambda leaf: leaf[0])
    is_shape = isinstance(jax.tree.leaves(begun)[0], jax.ShapeDtypeStruct)
    row = jax.eval_shape(take, begun.rows) if is_shape else take(begun.rows)
    return begun._replace(rows=()), row  # pyright: ignore[reportArgumentType]


@contextlib.contextmanager
def feeder(
    feed: Feed | None,
    row: Callable[[], Any],
    *,
    num_clients: int,
    folder: pathlib.Path,
    fingerprint: int,
    mesh: Mesh | None,
    home: Home = Home(),  # noqa: B008 a tuple
) -> Iterator[Feeder]:
    """Begin to feed a run.

    Args:
      feed: what the rounds are fed; None where all is on the device.
      row: makes that of a client that never took part.
      num_clients: ``N``.
      folder: of the run.
      fingerprint: of the run's config.
      mesh: the devices that share a cohort; None for one.
      home: whose rows this process keeps; by default all.
    """
    if feed is None:
        yield RESIDENT
        return
    saved = folder / layout.ROWS
    working = homes.folder(saved / _WORKING, home)
    store = None
    if feed.rows != "device":
        _remove_stale(saved / _WORKING, home)
        is_file = feed.rows == "disk"
        if is_file:
            _check_room(feed, row(), folder)
            working.mkdir(parents=True, exist_ok=True)
        place_of_files = working if is_file else None
        store = rows.make(row(), num_clients=num_clients, folder=place_of_files, home=home)
    try:
        with feed_lib.hands(mesh, store) as by:
            yield _fed(feed, by, saved, fingerprint)
    finally:
        shutil.rmtree(working, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process may not have ended
            (saved / _WORKING).rmdir()


def _remove_stale(working: pathlib.Path, home: Home) -> None:
    """Remove the files of a run that was killed: one's own, and those of other numbers of homes."""
    shutil.rmtree(homes.folder(working, home), ignore_errors=True)
    if home.process == 0 and working.is_dir():
        for place in working.iterdir():
            if not place.name.endswith(f"-of-{home.number}"):
                shutil.rmtree(place) if place.is_dir() else place.unlink()


def _check_room(feed: Feed, row: Any, folder: pathlib.Path) -> None:
    """Refuse a run whose rows, and the copy of a checkpoint, may fill the disk."""
    needed, free = 2 * feed.num_written * rows.num_bytes(row), shutil.disk_usage(folder).free
    if needed > free:
        raise RunFolderError(
            f"execution.client_rows disk may take {needed:,} bytes of files in {str(folder)!r}, "
            f"where {free:,} are free: take another folder, fewer rounds or a smaller cohort."
        )


def _check_left(feed: Feed, store: rows.RowStore, folder: pathlib.Path) -> None:
    """Refuse to save rows where those that are still to be written would find the disk full.

    These are written to a file in memory, and the system ends a process that cannot do so.
    """
    kept = store.kept
    left = max(0, feed.num_written - int(np.count_nonzero(kept.is_written)))
    growing = sum(min(one.nbytes, left * (one.shape[1] + _PAGE)) for one in kept.arrays)
    if growing + saved_rows.num_bytes(kept) > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _fed(feed: Feed, by: feed_lib.Hands, saved: pathlib.Path, fingerprint: int) -> Feeder:
    """Make the functions of a feeder."""

    def step_fn(index, compiled, rounds):
        if by.store is not None:
            by.store.settle(rounds.start)  # of the stage before
        return feed_lib.step(feed, index, compiled, by, rounds)

    if by.store is None:
        return RESIDENT._replace(step=step_fn)
    store = by.store

    def lacks_fn(number):
        if saved_rows.is_whole(saved, number, store.kept, fingerprint=fingerprint):
            return ""
        return "its clients' rows are damaged, another run's, or not there"

    def save_fn(number, keep):
        store.settle(number)
        if feed.rows == "disk":
            _check_left(feed, store, saved)
        write = saved_rows.save(saved, number, store, fingerprint=fingerprint)

        def write_fn():
            write()
            saved_rows.remove(saved, number, store.kept.home, keep=keep)

        return write_fn

    return Feeder(
        step=step_fn,
        lacks=lacks_fn,
        restore=lambda number: saved_rows.restore(saved, number, store.kept),
        save=save_fn,
    )
