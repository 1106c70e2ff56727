"""The record of a run, ``metrics.jsonl``: a header, then a line a round, each a nested dict.

::

    {"schema": 2, "stages": [{"name": "train", "num_rounds": 10}], "num_prunable": 1234, ...}
    {"round": 1, "stage": "train", "stage_round": 1, "train": {"loss": 0.4}, "test": {...},
     "mask": {...}, "traffic": {...}, "compute": {...}, "clients": {...}, "method": {...},
     "time_s": 0.8}

`round_record` says what the fields are. A field that was not measured is absent or None.
"""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjaxprune.errors import RunFolderError, shown
from fedjaxprune.experiment import reading
from fedjaxprune.experiment.folder import client_ids
from fedjaxprune.experiment.folder.layout import METRICS, SCHEMA, replace
from fedjaxprune.experiment.folder.layout import sync as sync_file

Line = dict[str, Any]

# What every line has, of which type; all numbers may be floats that are whole.
_WHOLE = (
    "round",
    "stage_round",
    "mask.num_live",
    "mask.num_changed",
    "traffic.up.total_bits",
    "traffic.down.total_bits",
    "clients.participating",
    "clients.rejected",
)
_MOST_ROUNDS = 2**31 - 1
_MAPPINGS = ("train", "test", "mask", "traffic", "compute", "clients", "method")


class Record(NamedTuple):
    """A record, read."""

    header: dict[str, Any]  # the first line; {} where there is none
    lines: list[Line]  # one for each round, in turn
    is_torn: bool = False  # whether a last line is not whole, and left out


def finite(value: Any) -> float | None:
    """Make a number fit for JSON: None where it is not finite, or too large to be squared."""
    number = float(value)
    return number if math.fabs(number) <= reading.LARGEST_NUMBER else None


def value(tree: Mapping[str, Any], path: str) -> Any:
    """Look a field up by its dotted path; None where it is absent."""
    found: Any = tree
    for name in path.split("."):
        if not isinstance(found, Mapping) or name not in found:
            return None
        found = found[name]
    return found


def begin(folder: pathlib.Path, header: Mapping[str, Any]) -> None:
    """Write the header, in a folder that has no record yet."""
    replace(folder / METRICS, _text(header))


def append(folder: pathlib.Path, line: Line) -> None:
    """Write one round to the record, at once, and not where a link leads."""
    with open(folder / METRICS, "a", encoding="utf-8", opener=reading.open_no_link) as file:
        file.write(_text(line))


def sync(folder: pathlib.Path) -> None:
    """Make the record durable, before a checkpoint relies on it."""
    sync_file(folder / METRICS)


def cut(folder: pathlib.Path, header: Mapping[str, Any], num_rounds: int) -> list[Line]:
    """Shorten the record to its first `num_rounds` rounds, in one step, and return them."""
    found = read(folder)
    lines = found.lines[:num_rounds]
    if found.header == header:
        _shorten(folder / METRICS, 1 + len(lines))
    else:
        replace(folder / METRICS, "".join(map(_text, [header, *lines])))
    return lines


def _shorten(path: pathlib.Path, num_lines: int) -> None:
    """Cut a file behind so many lines, without writing the others again."""
    with open(path, "r+b", opener=reading.open_no_link) as file:
        for _ in range(num_lines):
            file.readline()
        file.truncate(file.tell())
    sync_file(path)


def read(folder: pathlib.Path) -> Record:
    """Read the record of a run that is to be continued: every line must have all fields.

    A last line that a kill tore is left out.
    """
    return _read(folder, strict=True)


def look(folder: pathlib.Path) -> Record:
    """Read the record to look at it: a line must have its number and nested fields."""
    return _read(folder, strict=False)


def _read(folder: pathlib.Path, *, strict: bool) -> Record:
    path = folder / METRICS
    try:
        source = reading.text(path, may_link=False, errors="replace")
    except FileNotFoundError:
        return Record({}, [])
    except OSError as error:
        raise RunFolderError(f"cannot read {str(path)!r}: {error.strerror}.") from None
    *rows, torn = source.split("\n")
    if not rows:
        return Record({}, [], bool(torn))
    header = _parse(rows[0])
    if header is None or header.get("schema") != SCHEMA or not _are_stages(header.get("stages")):
        given = "no header" if header is None or "schema" not in header else shown(header["schema"])
        raise RunFolderError(
            f"the record {str(path)!r} must begin with a header of schema {SCHEMA}, got {given}: "
            "another version of fedjaxprune wrote it, or it is damaged."
        )
    lines: list[Line] = []
    for number, row in enumerate(rows[1:], start=1):
        line = _parse(row)
        if line is None or not _fits(line, number, strict):
            if number == len(rows) - 1 and not torn and line is None:
                return Record(header, lines, True)
            raise RunFolderError(
                f"the record {str(path)!r} is damaged in line {number + 1}, which should be round "
                f"{number}; mend it or {'start a new run' if strict else 'leave the run out'} "
                "(nothing was changed)."
            )
        lines.append(line)
    return Record(header, lines, bool(torn))


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _parse(row: str) -> dict[str, Any] | None:
    try:
        found = reading.from_json(row)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _are_stages(stages: Any) -> bool:
    return isinstance(stages, list) and all(
        isinstance(value(stage, "name"), str)
        and isinstance(rounds := value(stage, "num_rounds"), int)
        and 0 <= rounds <= _MOST_ROUNDS
        for stage in stages
    )


def _fits(line: Line, number: int, strict: bool) -> bool:
    """Tell whether a line is that of round `number`."""
    if line.get("round") != number or not isinstance(line.get("stage"), str):
        return False
    stage_round, time = line.get("stage_round", 0), line.get("time_s")
    if not isinstance(stage_round, int) or abs(stage_round) > _MOST_ROUNDS:
        return False
    if time is not None and not isinstance(time, int | float):
        return False
    if not all(isinstance(line.get(name, {}), dict) for name in _MAPPINGS):
        return False
    if not _are_kinds(line):
        return False
    return not strict or (
        all(isinstance(value(line, path), int) for path in _WHOLE)
        and all(name in line for name in _MAPPINGS)
        and isinstance(line.get("time_s"), int | float)
    )


def _are_kinds(line: Line) -> bool:
    """Tell whether the fields that are sums over rounds are numbers, and the others if known."""
    traffic = dict(line.get("traffic", {}))
    clients = traffic.pop("by_client", [])
    compute = [one for one in line.get("compute", {}).values() if one is not None]
    formulas = traffic.get("published", {})
    ways = [traffic[name] for name in ("up", "down", "dense") if name in traffic]
    ways += [line.get("mask", {}).get("sparsity_by_layer") or {}]
    ways += [formulas, *(formulas.values() if isinstance(formulas, dict) else ())]
    if not all(isinstance(one, dict) for one in ways):
        return False
    sums = [traffic, *compute]
    others = [line.get(name, {}) for name in ("train", "test", "mask", "clients")]
    return (
        all(isinstance(one, dict) and _is_numeric(one, may_lack=False) for one in sums)
        and all(_is_numeric(one, may_lack=True) for one in others)
        and isinstance(clients, list)
        and all(_is_client(one) for one in clients)
    )


def _is_client(entry: Any) -> bool:
    bits = {name: value(entry, name) for name in ("up_bits", "down_bits")}
    ids = value(entry, "client_ids") if isinstance(entry, dict) else None
    return client_ids.is_text(ids) and _is_numeric(bits, may_lack=False)


def _is_numeric(tree: Mapping[str, Any], *, may_lack: bool) -> bool:
    return all(
        _is_numeric(one, may_lack=may_lack)
        if isinstance(one, dict)
        else isinstance(one, int | float) or (may_lack and one is None)
        for one in tree.values()
    )


def numbers_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """List the numbers of a line by dotted path; lists and what was not measured are left out."""
    for name, one in tree.items():
        if isinstance(one, Mapping):
            yield from numbers_of(one, f"{prefix}{name}.")
        elif isinstance(one, int | float):
            yield prefix + name, one


def columns(lines: Sequence[Line]) -> dict[str, np.ndarray]:
    """Turn lines into columns by dotted path, ``[rounds]`` each: float64, NaN where not measured.

    But `round` and `stage_round` are int64, and `stage` is text.
    """
    found: dict[str, np.ndarray] = {
        "round": np.array([line["round"] for line in lines], np.int64),
        "stage": np.array([line["stage"] for line in lines], np.str_),
        "stage_round": np.array([line.get("stage_round", 0) for line in lines], np.int64),
    }
    for index, line in enumerate(lines):
        for path, number in numbers_of(line):
            if path not in found:
                found[path] = np.full(len(lines), np.nan)
            if path not in ("round", "stage_round"):
                found[path][index] = number
    return found
