"""Read run folders to look at them: finished runs, running, failed and interrupted ones.

Imports neither JAX nor any part that a run names: a folder from a stranger is data, not a program.
"""

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from fedjaxprune.errors import RunFolderError, visible
from fedjaxprune.experiment.config.files import Stored
from fedjaxprune.experiment.execution import environment
from fedjaxprune.experiment.folder import (
    environments,
    failure,
    layout,
    lock,
    record,
    summary,
)

EXPORTED = "model.stablehlo"  # is in the folder of an exported network
_NAMED = 6  # runs that a message names


class RunData(NamedTuple):
    """A run as its folder has it."""

    folder: pathlib.Path
    # the folder's own name, with its parents' where that is not enough to tell runs apart
    name: str
    config: dict[str, Any]  # all settings, nested; every part's section has its `name`
    versions: dict[str, str]  # of the packages that it was made with
    # whose code ran, by the path of a part's section; built-in parts are not in it
    parts: dict[str, dict[str, str]]
    command: str  # the shortest command that makes such a run
    header: dict[str, Any]  # of the record
    lines: list[record.Line]  # the record, at least one line (`record`)
    summary: dict[str, Any]  # of these lines (`summary`)
    state: Literal["finished", "running", "failed", "interrupted"]
    failure: failure.Failure | None  # how it failed, if it did


def column(run: RunData, path: str) -> np.ndarray:
    """Give a number of every round by its dotted path, ``[rounds]`` float64, NaN where absent."""
    values = [record.value(line, path) for line in run.lines]
    return np.array([one if isinstance(one, int | float) else np.nan for one in values], np.float64)


def standing(run: RunData) -> str:
    """Say how a run stands in a few words."""
    last = run.lines[-1]["round"]
    if run.failure is not None and run.state == "failed":
        return f"failed in round {run.failure.round}: {run.failure.error}"
    return f"{run.state} after {last} round{'s' if last > 1 else ''}"


def read(folder: str | pathlib.Path) -> RunData:
    """Read one run."""
    folder = layout.path_of(folder)
    if not is_run(folder):
        raise no_run(folder)
    run, remarks = _read(folder, folder.name)
    if run is None:
        raise RunFolderError(remarks[0])
    return run


def read_all(given: Iterable[str | pathlib.Path]) -> tuple[list[RunData], list[str]]:
    """Read runs, each once; a folder that holds run folders stands for all of them.

    Those without a round on record are left out; notes say which, and why.
    """
    folders: dict[pathlib.Path, pathlib.Path] = {}
    for text in given:
        if not str(text):
            raise RunFolderError("got an empty name for a run folder.")
        folder = layout.path_of(text)
        if not (inner := [folder] if is_run(folder) else inside(folder)):
            raise no_run(folder)
        for one in inner:
            folders.setdefault(one.resolve(), one)
    names = _names(list(folders))
    found, notes = [], []
    for resolved, folder in folders.items():
        run, remarks = _read(folder, names[resolved])
        notes += remarks
        if run is not None:
            found.append(run)
    if not found:
        raise RunFolderError(notes[0] if notes else "got no run: give at least one run folder.")
    return found, notes


def is_run(folder: pathlib.Path) -> bool:
    """Tell whether a folder is that of a run, and not of a network that was exported of one."""
    # Unlike pathlib's, these say no to names that no file can have.
    return os.path.isfile(folder / layout.CONFIG) and not os.path.isfile(folder / EXPORTED)


def inside(folder: pathlib.Path) -> list[pathlib.Path]:
    """List the run folders in a folder, by name."""
    if not os.path.isdir(folder):
        return []
    found = sorted(path.parent for path in folder.glob(f"*/{layout.CONFIG}"))
    return [one for one in found if one.name[0] != "." and is_run(one)]


def no_run(folder: pathlib.Path, what: str = "run") -> RunFolderError:
    """Say why a folder is not the one run, or whatever else was looked for, that is needed."""
    if not os.path.isdir(folder):
        reason = "it is a file" if os.path.exists(folder) else "there is no such folder"
        return RunFolderError(f"{str(folder)!r} is no {what}: {reason}.")
    if os.path.isfile(folder / EXPORTED):
        return RunFolderError(f"{str(folder)!r} is no {what}: it is an exported network.")
    if found := inside(folder):
        return RunFolderError(
            f"{str(folder)!r} is no {what} but holds {len(found)}: give one of them "
            f"({_named(found)})."
        )
    more = ""
    if found := sorted({path.parent.parent for path in folder.glob(f"*/*/{layout.CONFIG}")}):
        more = f"; there are runs in {_named(found)}"
    return RunFolderError(
        f"{str(folder)!r} is no {what}: there is no {layout.CONFIG} in it, nor in a folder in it"
        f"{more}."
    )


def _named(folders: Sequence[pathlib.Path]) -> str:
    """Name folders, but not too many."""
    names = [repr(str(one)) for one in folders[:_NAMED]]
    if len(folders) > _NAMED:
        names.append(f"{len(folders) - _NAMED} more")
    return ", ".join(names)


def _names(folders: Sequence[pathlib.Path]) -> dict[pathlib.Path, str]:
    """Name folders as shortly as tells them apart."""
    length = 1
    while True:
        names = {folder: "/".join(folder.parts[-length:]) for folder in folders}
        if len(set(names.values())) == len(folders):
            return names
        length += 1


def _read(folder: pathlib.Path, name: str) -> tuple[RunData | None, list[str]]:
    """Read one run, with remarks on it, or say why it cannot be looked at yet."""
    stored = layout.stored(folder)
    found = record.look(folder)
    failed = failure.read(folder)
    held = lock.is_held(folder)
    if not found.lines:
        what = (
            f"failed in round {failed.round} ({failed.error})"
            if failed and not held
            else f"has no rounds on record yet ({layout.METRICS} has none)"
        )
        return None, [f"the run {str(folder)!r} {what}: there is nothing to show of it."]
    if failed:
        failed = failed._replace(error=visible(failed.error))
    state = "running" if held else "failed" if failed else "interrupted"
    if not held and not failed and (folder / layout.SUMMARY).exists():
        state = "finished"
    remarks = _changes(folder, stored, found.lines[-1]["round"])
    if found.is_torn and not held:
        remarks.append(
            f"the last line of {str(folder / layout.METRICS)!r} is torn and left out; "
            f"`fedjaxprune run --resume {folder}` mends it."
        )
    run = RunData(
        folder=folder,
        name=visible(name),
        config=_visible(stored.values),
        versions=_visible(stored.versions),
        parts=_visible(stored.parts),
        command=visible(stored.command),
        header=_visible(found.header),
        lines=found.lines,
        summary=summary.summarize(found.header, found.lines),
        state=state,
        failure=failed if state == "failed" else None,
    )
    return run, remarks


def _changes(folder: pathlib.Path, stored: Stored, last: int) -> list[str]:
    """Say from which rounds on, up to the last one, a run was computed in another environment."""
    remarks, then = [], stored.environment
    for one in environments.read(folder):
        now = one.environment
        found = environment.differences(then, now) + environment.other_processor(then, now)
        if found and one.round <= last:
            remarks.append(
                f"{str(folder)!r} was computed in another environment from round {one.round} on: "
                f"{'; '.join(found)}."
            )
        then = now
    return remarks


def _visible(tree: Any) -> Any:
    """Make the texts of a tree fit to be shown, its names included."""
    if isinstance(tree, dict):
        return {visible(name): _visible(one) for name, one in tree.items()}
    if isinstance(tree, list):
        return [_visible(one) for one in tree]
    return visible(tree) if isinstance(tree, str) else tree
