"""What the loop of a run asks for, whether its rounds are fed or all is on the device."""

import contextlib
import functools
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from fedjaxprune.errors import RunFolderError
from fedjaxprune.experiment.feeding import feed as feed_lib
from fedjaxprune.experiment.feeding import homes, rows, snapshots
from fedjaxprune.experiment.feeding.feed import Feed, StepFn
from fedjaxprune.experiment.feeding.homes import Home
from fedjaxprune.experiment.folder import layout
from fedjaxprune.rounds.simulation import Simulation
from fedjaxprune.types import Population

_WORKING = "working"  # folder of the files that rows are kept in, for each process


class Feeder(NamedTuple):
    """Feeds a run.

    Attributes:
      step: ``(index of a stage, compiled round, numbers of the rounds) -> step`` (`feed.step`).
      is_saved: whether clients' rows after so many rounds can be restored.
      restore: these rows.
      save: ``(number of rounds, numbers to keep)``: save the rows as they are now, and forget all
        that were saved but those to keep. Each process saves its own.
    """

    step: Callable[[int, Callable[..., Any], range], StepFn]
    is_saved: Callable[[int], bool]
    restore: Callable[[int], None]
    save: Callable[[int, Collection[int]], None]


RESIDENT = Feeder(
    step=lambda index, compiled, rounds: compiled,
    is_saved=lambda number: True,
    restore=lambda number: None,
    save=lambda number, keep: None,
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
    mesh: Mesh | None,
    warn: Callable[[str], object],
    home: Home = Home(),  # noqa: B008 a tuple
) -> Iterator[Feeder]:
    """Begin to feed a run.

    Args:
      feed: what the rounds are fed; None where all is on the device.
      row: makes that of a client that never took part.
      num_clients: ``N``.
      folder: of the run.
      mesh: the devices that share a cohort; None for one.
      warn: takes a sentence.
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
            yield _fed(feed, by, saved, warn)
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
    """Refuse a run whose rows may fill the disk, which would end it without a word."""
    needed, free = feed.num_written * rows.num_bytes(row), shutil.disk_usage(folder).free
    if needed > free:
        raise RunFolderError(
            f"execution.client_rows disk may take {needed:,} bytes of files in {str(folder)!r}, "
            f"where {free:,} are free: take another folder, fewer rounds or a smaller cohort."
        )


def _fed(
    feed: Feed, by: feed_lib.Hands, saved: pathlib.Path, warn: Callable[[str], object]
) -> Feeder:
    """Make the functions of a feeder."""

    def step_fn(index, compiled, rounds):
        if by.store is not None:
            by.store.settle(rounds.start)  # of the stage before
        return feed_lib.step(feed, index, compiled, by, rounds)

    if by.store is None:
        return RESIDENT._replace(step=step_fn)
    store = by.store

    def is_saved_fn(number):
        is_whole = snapshots.is_whole(saved, number, store.kept)
        if not is_whole:
            warn(f"the clients' rows after round {number} are damaged or were not saved.")
        return is_whole

    def save_fn(number, keep):
        store.settle(number)
        snapshots.save(saved, number, store.kept)
        snapshots.remove(saved, number, store.kept.home, keep=keep)

    return Feeder(
        step=step_fn,
        is_saved=is_saved_fn,
        restore=lambda number: snapshots.restore(saved, number, store.kept),
        save=save_fn,
    )
