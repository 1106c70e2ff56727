"""Runs of several processes on this machine: started, killed, and compared with those of one."""

import pathlib
import socket
import subprocess
from collections.abc import Sequence

import numpy as np

from tests import processes
from tests.processes import small

# Four clients a round, so that each of four devices has one; chunks of one size.
SETTINGS = small("--cohort-size", "4", "--chunk-size", "1")


def free_port() -> int:
    """Find a port whose next one is free, too."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except (OSError, OverflowError):
                continue


def commands(args: Sequence[str], *, number: int) -> list[subprocess.Popen]:
    """Start a command in processes that run together, the first one last."""
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(number)]
    started = [processes.command(*args, *where, "--process-id", str(one)) for one in range(number)]
    return started


def completed(args: Sequence[str], *, number: int) -> list[str]:
    """Run a command to its end in all processes; give what the first one said."""
    started = commands(args, number=number)
    said = [one.communicate(timeout=600) for one in started]
    assert [(one.returncode, err) for one, (_, err) in zip(started, said, strict=True)] == [
        (0, "")
    ] * number
    assert [out for out, _ in said[1:]] == [""] * (number - 1)
    return said[0][0].splitlines()


def run(folder: pathlib.Path, *, number: int, devices: int, settings=SETTINGS) -> pathlib.Path:
    """Run to the end in a new folder, on so many devices in all."""
    base = [*settings, "--devices", str(devices)]
    completed(["run", *base, "--folder", str(folder)], number=number)
    return folder


def resume(folder: pathlib.Path, *, number: int) -> pathlib.Path:
    """Continue to the end."""
    completed(["run", "--resume", str(folder)], number=number)
    return folder


def assert_same(folder: pathlib.Path, other: pathlib.Path) -> None:
    """See that two runs have the same record and the same bits."""
    assert processes.lines(folder) == processes.lines(other)
    number = len(processes.lines(other))
    pairs = zip(*(processes.final_arrays(one, number) for one in (folder, other)), strict=True)
    for array, expected in pairs:
        np.testing.assert_array_equal(array, expected)
