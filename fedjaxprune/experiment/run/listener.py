"""Where a run tells how it goes: a tuple of functions, each of which may do nothing."""

import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedjaxprune.experiment.config.sections import RunConfig
from fedjaxprune.experiment.folder.record import Line


def _ignore(*anything: Any) -> None:
    """Do nothing."""


def _warn(sentence: str) -> None:
    """Use Python's own warnings where nobody listens."""
    warnings.warn(sentence, UserWarning, stacklevel=2)


class Listener(NamedTuple):
    """Who listens to a run.

    Attributes:
      begin: ``(config, folder)``, before data are read: what is run.
      start: ``(header, lines)``: the record's header, and the lines that it holds already.
      round: takes a new line of the record.
      note: takes a sentence, such as which chunk size was chosen.
      warn: takes a sentence.
      finish: ``(config, folder, summary)``, once the run is finished.
    """

    begin: Callable[[RunConfig, pathlib.Path], object] = _ignore
    start: Callable[[Mapping[str, Any], list[Line]], object] = _ignore
    round: Callable[[Line], object] = _ignore
    note: Callable[[str], object] = _ignore
    warn: Callable[[str], object] = _warn
    finish: Callable[[RunConfig, pathlib.Path, Mapping[str, Any]], object] = _ignore


SILENT = Listener(warn=_ignore)
