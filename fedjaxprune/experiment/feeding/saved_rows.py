"""What clients remember, saved beside a checkpoint: every row that differs from the start.

A snapshot is a folder by the number of its round. A whole one has all rows that were ever written;
others have those written since the last whole one, which they name, until these are half of all.
Rows are copied some at a time, while later rounds write theirs, so a snapshot takes little memory
and no round waits for it (`frozen`). Checksums guard every file, and a fingerprint of the config
says whose rows they are.

Of several processes each saves the rows that are at home with it, in a folder of its own. A store
takes from all of them those of its own clients, so that their number may change.
"""

import contextlib
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

from fedjaxprune.data import mapped
from fedjaxprune.experiment import reading
from fedjaxprune.experiment.feeding import homes
from fedjaxprune.experiment.feeding.homes import Home
from fedjaxprune.experiment.feeding.rows import Kept, RowStore
from fedjaxprune.experiment.folder import layout

ABOUT, IDS = "about.json", "ids.bin"
_AT_ONCE = 2**24  # bytes that are copied together

WriteFn = Callable[[], None]


class Plan(NamedTuple):
    """What a snapshot is to have.

    Attributes:
      base: the whole snapshot that it is based on; None if it is whole.
      places: which rows it has, ascending.
    """

    base: int | None
    places: np.ndarray


def save(saved: pathlib.Path, number: int, store: RowStore, *, fingerprint: int) -> WriteFn:
    """Begin to save the rows after round `number`, as far as no earlier snapshot has them.

    Args:
      saved: folder of the saved rows of all processes.
      number: of rounds.
      store: of the rows that are at home here. It may be written to from now on.
      fingerprint: of the run's config.

    Returns:
      What saves them, to be called once, by any thread, before rows are saved again.
    """
    kept = store.kept
    plan = _plan(homes.folder(saved, kept.home), number, kept, fingerprint)
    wanted = np.zeros_like(kept.is_written)
    wanted[plan.places] = True
    frozen = store.freeze(wanted)

    def write_fn():
        is_saved = False
        try:
            _save(saved, number, kept, plan, frozen.read, fingerprint)
            is_saved = True
        finally:
            frozen.end(is_saved and plan.base is None)

    return write_fn


def _save(
    saved: pathlib.Path,
    number: int,
    kept: Kept,
    plan: Plan,
    read: Callable[[int, np.ndarray], np.ndarray],
    fingerprint: int,
) -> None:
    """Write a snapshot, which has its name when it is whole."""
    folder = homes.folder(saved, kept.home)
    draft = folder / f"{number}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    checksums = {IDS: _write(draft / IDS, [homes.ids(kept.home, plan.places).astype(np.int64)])}
    for index, array in enumerate(kept.arrays):
        blocks = (read(index, some) for some in _blocks(plan.places, array))
        checksums[_name(index)] = _write(draft / _name(index), blocks)
    about = reading.sealed(
        round=number,
        base=plan.base,
        num_clients=kept.num_clients,
        row_bytes=[array.shape[1] for array in kept.arrays],
        checksums=checksums,
        fingerprint=fingerprint,
    )
    layout.replace(draft / ABOUT, json.dumps(about))
    shutil.rmtree(folder / str(number), ignore_errors=True)
    draft.replace(folder / str(number))
    layout.sync_names(folder)


def restore(saved: pathlib.Path, number: int, kept: Kept) -> None:
    """Write the rows of a whole snapshot into a store in which no client was written yet."""
    team = next(team for team in homes.all_homes(saved) if _all_there(saved, number, team))
    if kept.home in team:
        _restore(homes.folder(saved, kept.home), number, kept)
        return
    for home in team:
        _restore(homes.folder(saved, home), number, kept)
    kept.is_changed[:] = kept.is_written  # so that the next snapshot is whole


def _restore(folder: pathlib.Path, number: int, kept: Kept) -> None:
    """Write those rows of one process's snapshot into a store that are at home there."""
    about = _about(folder / str(number))
    assert about is not None
    if about["base"] is not None:
        _restore(folder, about["base"], kept)
        kept.is_changed[:] = False
    ids = np.fromfile(folder / str(number) / IDS, np.int64)
    for index, array in enumerate(kept.arrays):
        if not array.shape[1]:
            continue
        with (folder / str(number) / _name(index)).open("rb") as file:
            for some in _blocks(ids, array):
                given = np.fromfile(file, np.uint8, count=some.size * array.shape[1])
                here = homes.is_own(kept.home, some)
                array[homes.places(kept.home, some[here])] = given.reshape(some.size, -1)[here]
    places = homes.places(kept.home, ids[homes.is_own(kept.home, ids)])
    kept.is_written[places] = True
    kept.is_changed[places] = about["base"] is not None


def is_whole(saved: pathlib.Path, number: int, kept: Kept, *, fingerprint: int) -> bool:
    """Tell whether a snapshot can be restored: all processes' parts, undamaged, of this run."""
    team = next((one for one in homes.all_homes(saved) if _all_there(saved, number, one)), [])
    return bool(team) and all(
        _is_whole(homes.folder(saved, one), number, kept, fingerprint) for one in team
    )


def _all_there(saved: pathlib.Path, number: int, team: list[Home]) -> bool:
    """Tell whether all processes of some time have saved their rows after round `number`."""
    everybody = [Home(process, len(team)) for process in range(len(team))]
    return team == everybody and all(
        (homes.folder(saved, home) / str(number)).is_dir() for home in team
    )


def _is_whole(folder: pathlib.Path, number: int, kept: Kept, fingerprint: int) -> bool:
    """Tell whether one process's snapshot and its base are there, undamaged, and of this run."""
    place = folder / str(number)
    about = _about(place)
    if about is None or about["fingerprint"] != fingerprint or about["round"] != number:
        return False
    fits = about["num_clients"] == kept.num_clients
    fits = fits and about["row_bytes"] == [array.shape[1] for array in kept.arrays]
    try:
        right = all(
            mapped.checksum_of_file(place / name) == one for name, one in about["checksums"].items()
        )
    except OSError:
        return False
    base = about["base"]
    is_based = base is None or base < number
    if base is not None and is_based:
        is_based = _is_whole(folder, base, kept, fingerprint)
    return fits and right and is_based


def remove(saved: pathlib.Path, number: int, home: Home, *, keep: Collection[int]) -> None:
    """Remove snapshots that no checkpoint needs, after one of round `number`.

    Each process removes its own; the first one also those of a time when there were more or fewer
    processes, that of round `number` included.

    Args:
      saved: as for `save`.
      number: of the snapshot that was just saved.
      home: of this process.
      keep: numbers of rounds of other snapshots to keep, and of what they are based on.
    """
    _remove(homes.folder(saved, home), {*keep, number})
    for team in homes.all_homes(saved):
        if home.process == 0 and home.number != team[0].number:
            for other in team:
                folder = homes.folder(saved, other)
                _remove(folder, {*keep} - {number})
                for draft in folder.glob("*.draft"):
                    shutil.rmtree(draft, ignore_errors=True)
                with contextlib.suppress(OSError):  # unless there is something left
                    folder.rmdir()


def _remove(folder: pathlib.Path, keep: Collection[int]) -> None:
    """Remove one process's snapshots but those to `keep`, and those that these are based on."""
    abouts = [_about(folder / str(number)) for number in keep]
    bases = {about["base"] for about in abouts if about is not None}
    for number, place in _numbered(folder):
        if number not in {*keep, *bases}:
            shutil.rmtree(place, ignore_errors=True)


def num_bytes(kept: Kept) -> int:
    """Count the bytes of a whole snapshot, and more than those of any other."""
    return int(np.count_nonzero(kept.is_written)) * (8 + sum(one.shape[1] for one in kept.arrays))


def _plan(folder: pathlib.Path, number: int, kept: Kept, fingerprint: int) -> Plan:
    """Choose what the next snapshot has, and the whole one that it is based on."""
    everything = np.flatnonzero(kept.is_written)
    changed = np.flatnonzero(kept.is_changed)
    if 2 * changed.size >= everything.size:
        return Plan(None, everything)
    earlier = {one: _about(place) for one, place in _numbered(folder) if one < number}
    whole = [
        one
        for one, about in earlier.items()
        if about is not None and about["base"] is None and about["fingerprint"] == fingerprint
    ]
    base = max(whole, default=None)
    return Plan(base, everything if base is None else changed)


def _numbered(folder: pathlib.Path) -> Iterator[tuple[int, pathlib.Path]]:
    """List the snapshots, by the numbers of their rounds."""
    places = [place for place in folder.glob("[0-9]*") if place.name.isdecimal()]
    return ((int(place.name), place) for place in places)


def _name(index: int) -> str:
    return f"{index}.bin"


def _about(place: pathlib.Path) -> dict[str, Any] | None:
    """Read what is said of a snapshot; None where that is missing or damaged."""
    try:
        about = reading.from_json(reading.text(place / ABOUT, may_link=False))
        return reading.unsealed(about)
    except (OSError, ValueError):
        return None


def _blocks(ids: np.ndarray, array: np.ndarray) -> Iterator[np.ndarray]:
    """Share ids out so that their rows are few bytes at a time."""
    step = max(1, _AT_ONCE // max(1, array.shape[1]))
    for start in range(0, ids.size, step):
        yield ids[start : start + step]


def _write(path: pathlib.Path, blocks: Any) -> int:
    """Write arrays one after the other, durably, and sum them up."""
    total = 0
    with path.open("wb") as file:
        for block in blocks:
            data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
            total = zlib.crc32(data, total)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return total
