"""Runs of several processes on this machine: started, killed, and compared with those of one."""

import json
import pathlib
import socket
import subprocess
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import fedjaxprune as fjp
from fedjaxprune import registry
from fedjaxprune.experiment.config import resolve
from fedjaxprune.method import needs_of
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


# Runs of all kinds, one after the other in the same processes.

SMALL = {
    "federation": {"num_rounds": 2, "cohort_size": 4, "dropout_rate": 0.2},
    "data.num_clients": 8,
    "client": {"steps": 1, "batch_size": 8},
    "execution": {"devices": 4, "chunk_size": 1},
    "checkpoints.every": 2,
}
OWN = {  # of single methods, so that every stage and every revision comes
    "prune_every": 1, "pool_size": 2, "server_epochs": 1, "vote_epochs": 1, "num_prune_steps": 1,
    "explore_epochs": 2, "dense_rounds": 1,
}  # fmt: skip
FEEDBACK = {"uplink": {"name": "top_k", "error_feedback": True}, "server.optimizer": "fedavgm"}


def settings_of(name: str) -> dict[str, Any]:
    """Give a small run of a method, on a network that has what it needs."""
    found = registry.find("method", name)
    own = {one: OWN[one] for one in OWN if one in found.part.settings.model_fields}
    base = {**SMALL, "method": {"name": name, **own}}
    needs = needs_of(found.part, resolve.resolve(base).method)
    is_plain = not (needs.batch_norm or needs.convolutions or needs.gates)
    return {**base, "model": {"name": "mlp", "hidden_sizes": [8]}} if is_plain else base


def in_turn(settings: Sequence[dict[str, Any]], folder: str, **processes: Any) -> None:
    """Run all settings in one process of several, or alone."""
    jax.config.update("jax_num_cpu_devices", 4 // processes.get("num_processes", 1))
    for number, one in enumerate(settings):
        fjp.run(one, folder=f"{folder}/{number}", **processes)
        jax.clear_caches()


def in_processes(settings: Sequence[dict[str, Any]], folder: pathlib.Path, *, number: int) -> None:
    """Run all settings in so many processes, with four devices in all."""
    code = "import json, sys; from tests import several; several.in_turn(*json.loads(sys.argv[1]),"
    where = f"coordinator='127.0.0.1:{free_port()}', num_processes={number}" if number > 1 else ""
    each = [f"{where}, process_id={one})" if where else ")" for one in range(number)]
    given = json.dumps([settings, str(folder)])
    started = [processes.python(code + end, given) for end in each]
    said = [one.communicate() for one in started]
    assert [one.returncode for one in started] == [0] * number, said
