"""The mark of a run that ended by an error: in which round, and what was said.

A run that was killed, or interrupted by its user, leaves none.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from fedjaxprune.errors import RunFolderError, first_line
from fedjaxprune.experiment import reading
from fedjaxprune.experiment.folder import layout, record

FAILED = "failed.json"
_LARGEST = 2**16  # bytes of a mark that is read
_LONGEST = 300  # characters of an error that are kept


class Failure(NamedTuple):
    """How a run failed."""

    round: int  # in which, counted from 1
    error: str  # kind of the error and the first line of what it says


def describe(error: BaseException) -> str:
    """Say what an error is: its kind and the first line of its text."""
    kind, said = type(error).__name__, first_line(error)
    return kind if said == kind else f"{kind}: {said}"


@contextlib.contextmanager
def marked(folder: pathlib.Path) -> Iterator[None]:
    """Take the old mark from `folder`, and leave one if an error passes by.

    A folder that is refused keeps the mark that it had.
    """
    old = read(folder)
    (folder / FAILED).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        with contextlib.suppress(Exception):  # a full disk, say: the error itself is raised
            if not isinstance(error, RunFolderError):
                mark(folder, describe(error))
            elif old:
                _write(folder, old)
        raise


def mark(folder: pathlib.Path, error: str) -> None:
    """Leave a mark that the run failed in the round after the last one on record."""
    number = len(record.read(folder).lines) + 1
    _write(folder, Failure(round=number, error=error[:_LONGEST]))


def _write(folder: pathlib.Path, failure: Failure) -> None:
    layout.replace(folder / FAILED, json.dumps(failure._asdict()) + "\n")


def read(folder: pathlib.Path) -> Failure | None:
    """Read the mark; None where there is none that can be read."""
    try:
        found = reading.from_json(reading.text(folder / FAILED, may_link=False, largest=_LARGEST))
        return Failure(round=int(found["round"]), error=str(found["error"])[:_LONGEST])
    except (OSError, ValueError, TypeError, KeyError):
        return None
