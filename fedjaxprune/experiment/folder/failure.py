"""The mark of a run that ended by an error: in which round, and what was said.

A run that was killed, or interrupted by its user, leaves none: it was broken off.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

FAILED = "failed.json"
_LONGEST = 300  # characters of an error that are kept


class Failure(NamedTuple):
    """How a run failed.

    Attributes:
      round: in which, counted from 1.
      error: kind of the error and the first line of what it says.
    """

    round: int
    error: str


@contextlib.contextmanager
def marked(folder: pathlib.Path) -> Iterator[None]:
    """Take the old mark from `folder`, and leave one if an error passes by."""
    from fedjaxprune.experiment.folder import record

    (folder / FAILED).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        text = f"{type(error).__name__}: {said}".rstrip(": ")[:_LONGEST]
        with contextlib.suppress(Exception):  # a full disk, say: the error itself goes on
            mark = Failure(round=len(record.read(folder)) + 1, error=text)
            (folder / FAILED).write_text(json.dumps(mark._asdict()) + "\n", encoding="utf-8")
        raise


def read(folder: pathlib.Path) -> Failure | None:
    """Read the mark; None where there is none that can be read."""
    try:
        found = json.loads((folder / FAILED).read_text(encoding="utf-8"))
        return Failure(round=int(found["round"]), error=str(found["error"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
