"""Orbax's manager of checkpoints, as a run uses it: one write at a time, in a thread of its own."""

import pathlib
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import orbax.checkpoint as ocp

from fedjaxprune.experiment.folder import snapshots


class Manager(ocp.CheckpointManager):
    """Orbax's manager, with a thread of its own in which one checkpoint is written at a time.

    Attributes:
      scratch: for copies of what is being written.
    """

    def __init__(self, folder: pathlib.Path, options: ocp.CheckpointManagerOptions) -> None:
        super().__init__(folder, options=options)
        self.scratch = snapshots.scratch(folder)
        self._thread = futures.ThreadPoolExecutor(1, "checkpoints")
        self._last: futures.Future[None] | None = None

    def begin(self, write: Callable[[], None]) -> None:
        """Let the thread write; the one before must have been waited for."""
        self._last = self._thread.submit(write)

    def finish(self) -> None:
        """Wait for the last write, and raise what it raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def reached_preemption(self, step: int) -> bool:
        """Say no: `signals` hears of preemption, and JAX's service for it is off."""
        del step
        return False

    def close(self) -> None:
        """Wait for the last write, whatever became of it, and let go of the folder."""
        try:
            self.finish()
        finally:
            self._thread.shutdown()
            self.scratch.close()
            super().close()


def of_this_process(folder: pathlib.Path) -> dict[str, Any]:
    """Let a process of several read and write on its own: orbax would wait for all of them."""
    if jax.process_count() == 1:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    index = jax.process_index()
    only = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )
    return {"create": False, "multiprocessing_options": only}
