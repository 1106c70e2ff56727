"""``environments.json``: from which round on a run was computed in another environment.

The config has the environment of its first round. This file is there only if the run was continued
in another one, such as with other options of JAX or on another processor.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from fedjaxprune.errors import RunFolderError
from fedjaxprune.experiment import reading
from fedjaxprune.experiment.folder.layout import ENVIRONMENTS, replace

_LARGEST = 2**20  # bytes of a file that is read


class Change(NamedTuple):
    """A change of the environment."""

    round: int  # the first one in it
    environment: dict[str, str]  # as `execution.environment.here` gives it


def read(folder: pathlib.Path) -> list[Change]:
    """Read the changes in the order of their rounds; none where there is no file."""
    path = folder / ENVIRONMENTS
    try:
        found = reading.from_json(reading.text(path, may_link=False, largest=_LARGEST))
        changes = [Change(**one) for one in found]
        _check(changes)
        return changes
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError):
        raise RunFolderError(
            f"{str(path)!r} cannot be read: it is damaged or of another version."
        ) from None


def _check(changes: list[Change]) -> None:
    rounds = [one.round for one in changes]
    if not all(isinstance(one, int) and one > 0 for one in rounds) or rounds != sorted(rounds):
        raise ValueError("no rounds in their order")
    for one in changes:
        texts = [*one.environment, *one.environment.values()]
        if not isinstance(one.environment, dict) or not all(isinstance(n, str) for n in texts):
            raise ValueError("no environment")


def note(
    folder: pathlib.Path, first: Mapping[str, str], now: Mapping[str, str], begin: int
) -> None:
    """Note that rounds from `begin` on are computed in the environment `now`.

    Args:
      folder: of the run.
      first: environment of its first round.
      now: that of this process.
      begin: the next round; changes that lie later are left out, as those rounds are run again.
    """
    before = read(folder)
    changes = [one for one in before if one.round < begin]
    if (changes[-1].environment if changes else first) != now:
        changes.append(Change(begin, dict(now)))
    if changes != before:
        replace(folder / ENVIRONMENTS, json.dumps([one._asdict() for one in changes]) + "\n")
