"""Runs in processes of their own, which are killed, stopped or run out of space, and resumed."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np

from fedjaxprune.experiment.folder import checkpoints, layout, record
from tests import stub

COMMAND = "from fedjaxprune.cli.main import main; main()"

# A run of seconds, of parts that are found by their files.
SMALL = [
    "--method", f"{stub.FILE}:METHOD", "--dataset", f"{stub.FILE}:data", "--num-rounds", "6",
    "--num-clients", "8", "--cohort-size", "2", "--steps", "1", "--batch-size", "4",
    "--checkpoints.every", "2", "--evaluation.every", "2", "--devices", "1",
]  # fmt: skip


def small(*changes: str) -> list[str]:
    """Give the arguments of a small run with some options changed."""
    pairs = zip(SMALL[::2], SMALL[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in changes for word in pair] + list(changes)


def python(code: str, *args: str, **options) -> subprocess.Popen:
    """Start a process of its own; options are of its environment."""
    source = pathlib.Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source), **options}
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def command(*args: str) -> subprocess.Popen:
    """Start the command in a process of its own."""
    return python(COMMAND, *args)


def completed(settings: Sequence[str], folder: pathlib.Path) -> pathlib.Path:
    """Run the command to its end in a new folder."""
    process = command("run", *settings, "--folder", str(folder))
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    return folder


def lines(folder: pathlib.Path) -> list[record.Line]:
    """Read a record without its times."""
    return [{**line, "time_s": 0.0} for line in record.read(folder).lines]


def wait_for_round(process: subprocess.Popen, folder: pathlib.Path, number: int) -> None:
    """Wait until a run has recorded a round, or has ended."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if len(record.look(folder).lines) >= number:
            return
        time.sleep(0.002)


def final_arrays(folder: pathlib.Path, num_rounds: int) -> list[np.ndarray]:
    """Read all arrays of the last checkpoint: parameters, masks, rows."""
    import orbax.checkpoint as ocp

    with checkpoints.open_manager(folder / layout.CHECKPOINTS, keep=3) as manager:
        args = ocp.args.Composite(arrays=ocp.args.PyTreeRestore())
        tree = manager.restore(num_rounds, args=args)["arrays"]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def arguments(settings: Sequence[str], folder: pathlib.Path) -> list[str]:
    """Give the arguments that begin a run, or continue it if it has begun."""
    if (folder / layout.CONFIG).exists():
        return ["run", "--resume", str(folder)]
    return ["run", *settings, "--folder", str(folder)]


def stopped(process: subprocess.Popen, number: int = signal.SIGKILL) -> str:
    """Send a signal, wait for the end, and give what was said on stderr."""
    process.send_signal(number)
    return process.communicate(timeout=300)[1]


def assert_resumes(
    settings: Sequence[str], folder: pathlib.Path, whole: pathlib.Path, *, warning: str = "-"
) -> None:
    """Bring a run to its end; it has then the same bits as the one that was never stopped.

    Nothing is said on stderr but lines with a `warning`.
    """
    process = command(*arguments(settings, folder))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert not [line for line in err.splitlines() if warning not in line], err
    assert lines(folder) == lines(whole)
    pairs = zip(*(final_arrays(one, len(lines(whole))) for one in (folder, whole)), strict=True)
    for array, other in pairs:
        np.testing.assert_array_equal(array, other)
