"""Read run folders to look at them: whole ones, runs still going, failed and broken-off ones.

Unlike `record.read`, which a run goes on from, this takes what older versions wrote, too, and
says in a note what it left out.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from fedjaxprune.experiment.config.flat import files, validation
from fedjaxprune.experiment.config.flat.sections import RunConfig, UserError
from fedjaxprune.experiment.folder import failure, record
from fedjaxprune.experiment.folder.record import RoundRecord

try:
    import fcntl
except ImportError:  # no POSIX: a run still going looks like one that was broken off
    fcntl = None

EXPORTED = "model.stablehlo"  # is in the folder of an exported network
_NAMED = 6  # runs that a message names

# What lines of older versions lack.
_LACKING: dict[str, Any] = {
    "uplink_parts": {},
    "downlink_parts": {},
    "client_bits": [],
    "modeled_bits": {},
    "modeled_flops": None,
    "mean_coverage": None,
    "mask_stability": None,
    "layer_sparsity": None,
    "client_accuracy": None,
}


class Run(NamedTuple):
    """A run as its folder has it.

    Attributes:
      folder: of the run.
      name: the folder's own name, with its parents' where that is not enough to tell runs apart.
      config: all settings by name; those that an older version did not have are at their defaults.
      versions: of the packages that it was made with.
      lines: the record, at least one line.
      state: how it stands.
      failure: how it failed, if it did.
    """

    folder: pathlib.Path
    name: str
    config: dict[str, Any]
    versions: dict[str, str]
    lines: list[RoundRecord]
    state: Literal["finished", "running", "failed", "broken off"]
    failure: failure.Failure | None


def standing(run: Run) -> str:
    """Say how a run stands in a few words."""
    last = run.lines[-1].round
    if run.failure is not None and run.state == "failed":
        return f"failed in round {run.failure.round}: {run.failure.error}"
    words = {"finished": "finished", "running": "still going", "broken off": "broken off"}
    return f"{words[run.state]} after {last} round{'s' if last > 1 else ''}"


def read_all(given: Iterable[str | pathlib.Path]) -> tuple[list[Run], list[str]]:
    """Read runs; a folder that holds run folders stands for all of them.

    Returns:
      The runs in the order given, each once, and notes on what was left out and why. Of several
      runs, those without a round on record are left out.

    Raises:
      UserError: a folder is no run, a run cannot be read, or there is nothing to look at.
    """
    folders: dict[pathlib.Path, pathlib.Path] = {}
    for text in given:
        if not str(text):
            raise UserError("got an empty name for a run folder.")
        for folder in _expand(pathlib.Path(os.path.expanduser(text))):
            folders.setdefault(folder.resolve(), folder)
    names = _names(list(folders))
    found, notes = [], []
    for resolved, folder in folders.items():
        run, remark = _read(folder, names[resolved])
        if remark:
            notes.append(remark)
        if run is not None:
            found.append(run)
    if not found:
        raise UserError(notes[0] if notes else "got no run: give at least one run folder.")
    return found, notes


def _expand(folder: pathlib.Path) -> list[pathlib.Path]:
    """List the run folders that `folder` stands for."""
    found = [folder] if is_run(folder) else inside(folder)
    if not found:
        raise no_run(folder)
    return found


def is_run(folder: pathlib.Path) -> bool:
    """Tell whether a folder is that of a run, and not of a network that was exported of one."""
    # Unlike pathlib's, these say no to names that no file can have.
    return os.path.isfile(folder / record.CONFIG) and not os.path.isfile(folder / EXPORTED)


def inside(folder: pathlib.Path) -> list[pathlib.Path]:
    """List the run folders in a folder, by name."""
    if not os.path.isdir(folder):
        return []
    found = sorted(path.parent for path in folder.glob(f"*/{record.CONFIG}"))
    return [one for one in found if one.name[0] != "." and is_run(one)]


def no_run(folder: pathlib.Path, what: str = "run") -> UserError:
    """Say why a folder is not the one run, or whatever else was looked for, that is needed."""
    if not os.path.isdir(folder):
        reason = "it is a file" if os.path.exists(folder) else "there is no such folder"
        return UserError(f"{str(folder)!r} is no {what}: {reason}.")
    if os.path.isfile(folder / EXPORTED):
        return UserError(f"{str(folder)!r} is no {what}: it is an exported network.")
    if found := inside(folder):
        return UserError(
            f"{str(folder)!r} is no {what} but holds {len(found)}: give one of them "
            f"({_named(found)})."
        )
    more = ""
    if found := sorted({path.parent.parent for path in folder.glob(f"*/*/{record.CONFIG}")}):
        more = f"; there are runs in {_named(found)}"
    return UserError(
        f"{str(folder)!r} is no {what}: there is no {record.CONFIG} in it, nor in a folder in it"
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


def _read(folder: pathlib.Path, name: str) -> tuple[Run | None, str | None]:
    """Read one run, or say why it cannot be looked at yet."""
    path = folder / record.CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"the config {str(path)!r} cannot be read.") from None
    values = files.read_yaml(text, source=str(path))
    if not all(isinstance(values.get(name), str) for name in ("algorithm", "dataset")):
        raise UserError(
            f"{str(folder)!r} is no run: its {record.CONFIG} names no algorithm or no data set."
        )
    lines, is_torn = _lines(folder / record.METRICS)
    failed = failure.read(folder)
    held = is_held(folder)
    if not lines:
        what = (
            f"failed in round {failed.round} ({failed.error})"
            if failed and not held
            else f"has no rounds on record yet ({record.METRICS} is empty or not there)"
        )
        return None, f"the run {str(folder)!r} {what}: there is nothing to show of it."
    state = "running" if held else "failed" if failed else "broken off"
    if not held and not failed and (folder / record.SUMMARY).exists():
        state = "finished"
    remark = None
    if is_torn and not held:
        remark = (
            f"the last line of {str(folder / record.METRICS)!r} is torn and left out; "
            f"`fedjaxprune run --resume {folder}` mends it."
        )
    run = Run(
        folder=folder,
        name=name,
        config=_complete(values),
        versions=files.read_versions(text, source=str(path)) or {},
        lines=lines,
        state=state,
        failure=failed if state == "failed" else None,
    )
    return run, remark


def _complete(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in the settings that did not exist when a config was written."""
    known = {name: value for name, value in values.items() if name in RunConfig.model_fields}
    try:
        return {**validation.validate_each(known).model_dump(), **values}
    except UserError:  # of another version: shown as it is
        return values


def is_held(folder: pathlib.Path) -> bool:
    """Tell whether a process is running in `folder`."""
    if fcntl is None:
        return False
    try:
        with (folder / record.CONFIG).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    return False


def _lines(path: pathlib.Path) -> tuple[list[RoundRecord], bool]:
    """Read a record as far as it is whole, and tell whether its last line is torn."""
    try:
        rows = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return [], False
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}.") from None
    *whole, torn = rows
    lines: list[RoundRecord] = []
    for number, row in enumerate(whole, start=1):
        line = _parse(row)
        if line is None or line.round != number:
            if number == len(whole) and not torn and line is None:
                return lines, True
            raise UserError(
                f"the record {str(path)!r} is damaged in line {number}, which should be round "
                f"{number}; mend it or leave the run out."
            )
        lines.append(line)
    return lines, bool(torn)


def _parse(row: str) -> RoundRecord | None:
    """Read one line of this version, or of another one; None if it is none of a record."""
    try:
        values = json.loads(row)
        known = {name: values[name] for name in RoundRecord._fields if name in values}
        line = RoundRecord(**{**_LACKING, **known})
    except (ValueError, TypeError, RecursionError):
        return None
    whole = (line.round, line.num_kept, line.num_changed, line.uplink_bits, line.downlink_bits)
    whole += (line.mask_bits, line.statistics_bits, line.num_participating, line.num_rejected)
    fractions = (line.train_loss, line.test_loss, line.test_accuracy)
    fractions += (line.mean_coverage, line.mask_stability)
    mappings = (line.uplink_parts, line.downlink_parts)
    measured = (line.modeled_flops, line.layer_sparsity, line.client_accuracy)
    fits = (
        isinstance(line.stage, str)
        and all(isinstance(value, int) for value in whole)
        and isinstance(line.sparsity, int | float)
        and all(value is None or isinstance(value, int | float) for value in fractions)
        and all(_is_numbers(mapping) for mapping in mappings)
        and all(mapping is None or _is_numbers(mapping) for mapping in measured)
        and isinstance(line.modeled_bits, dict)
        and isinstance(line.client_bits, list)
        and all(map(_is_entry, line.client_bits))
    )
    return line if fits else None


def _is_numbers(mapping: Any) -> bool:
    """Tell whether something maps names to numbers."""
    return isinstance(mapping, dict) and all(isinstance(v, int | float) for v in mapping.values())


def _is_entry(entry: Any) -> bool:
    """Tell whether something says what clients sent."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("uplink_bits"), int)
        and isinstance(entry.get("client_ids"), list)
    )
