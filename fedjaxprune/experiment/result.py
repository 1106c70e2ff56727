"""What a run has come to, for Python: config, record as columns, parameters, masks, network."""

import functools
import logging
import pathlib
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from fedjaxprune.experiment.folder import load, record
from fedjaxprune.registry import Found


class Run:
    """A run, read from its folder; the network is read when it is asked for.

    Attributes:
      folder: of the run.
      config: all settings, nested; every part's section has its `name`.
      state: ``"finished"``, ``"running"``, ``"failed"`` or ``"interrupted"``.
      summary: last values, means and totals, nested, as ``summary.json`` has them.
      record: columns by dotted field, ``[rounds]`` each, such as ``run.record["test.accuracy"]``;
        NaN where a round has no such number.
    """

    def __init__(self, folder: str | pathlib.Path, *, model: Found | None = None) -> None:
        """Read the run in `folder`; `model` builds its network, where that was a value."""
        data = load.read(folder)
        self.folder: pathlib.Path = data.folder
        self.config: dict[str, Any] = data.config
        self.state: str = data.state
        self.summary: Mapping[str, Any] = data.summary
        self.record: dict[str, np.ndarray] = record.columns(data.lines)
        self._given = model

    @functools.cached_property
    def _arrays(self) -> Any:
        from fedjaxprune.experiment.exporting import restore

        with quiet():
            return restore.arrays_of(self.folder)

    @property
    def params(self) -> Any:
        """Parameters to be deployed, nested dicts of arrays; pruned entries are exact zeros."""
        return self._arrays.params

    @property
    def masks(self) -> Any:
        """Masks of the parameters; True means kept."""
        return self._arrays.masks

    @property
    def model_state(self) -> Any:
        """What is not trained, such as BatchNorm statistics."""
        return self._arrays.state

    @functools.cached_property
    def model(self) -> Any:
        """The network as a `Model`; imports the code that builds it."""
        from fedjaxprune.experiment.exporting import restore

        return restore.model_of(self.folder, model=self._given)

    @functools.cached_property
    def predict(self) -> Callable[[Any], Any]:
        """``inputs [B, ...], as the data set stores them, -> outputs [B, ...]``."""
        from fedjaxprune.experiment.exporting import export

        with quiet():
            return export.read(self.folder, model=self._given).predict

    def __repr__(self) -> str:
        name = self.config["method"]["name"]
        return f"<Run {str(self.folder)!r}: {name}, {self.state} after {self.num_rounds} rounds>"

    @property
    def num_rounds(self) -> int:
        """Rounds on record."""
        return len(self.record["round"])


@contextmanager
def quiet():
    """Keep other packages' logs of checkpoints off the user's screen."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
