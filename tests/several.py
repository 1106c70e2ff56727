"""Runs of several processes on this machine: started, killed, and compared with those of one."""

import json
import pathlib
import socket
import subprocess
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np

import fedjaxprune as fjp
from fedjaxprune import registry
from fedjaxprune.experiment.config import resolve
from fedjaxprune.experiment.execution import placing
from fedjaxprune.experiment.feeding import homes, rows
from fedjaxprune.experiment.feeding import saved_rows as saved_lib
from fedjaxprune.experiment.folder import layout, record
from fedjaxprune.method import needs_of
from tests import processes, stub
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
    found = [processes.final_arrays(one, number) for one in (folder, other)]
    if (folder / layout.ROWS).exists() and (other / layout.ROWS).exists():
        for arrays, one in zip(found, (folder, other), strict=True):
            arrays += saved_rows(one, number)
    for array, expected in zip(*found, strict=True):
        np.testing.assert_array_equal(array, expected)


def cut(folder: pathlib.Path, number: int, *, aside: pathlib.Path) -> None:
    """Leave of a run what it would be if it was killed after a round, and its checkpoint."""
    record.cut(folder, record.read(folder).header, number)
    (folder / layout.SUMMARY).unlink()
    for saved in (folder / layout.CHECKPOINTS).iterdir():
        if int(saved.name) > number:
            saved.rename(aside.with_name(f"{aside.name}-{saved.name}"))


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
    return {**base, "model": {"name": "mlp", "hidden_sizes": [8, 6]}} if is_plain else base


# What each process holds of a run that is fed.


class People:
    """A data set whose examples are made when they are asked for, and who was asked for."""

    def __init__(self) -> None:
        self.sizes = np.array([5, 9, 0, 7, 11, 6, 3, 8, 4, 10])
        self.asked: list[list[int]] = []
        made = np.random.default_rng(5).normal(size=(self.sizes.sum(), stub.WIDTH))
        self.arrays = {"inputs": made.astype(np.float32), "labels": np.argmax(made, axis=1)}
        self.test = self.arrays["inputs"][:12], self.arrays["labels"][:12]

    def fetch(self, ids):
        self.asked.append(ids.tolist())
        offsets = np.cumsum([0, *self.sizes]).tolist()
        found = [np.arange(offsets[i], offsets[i + 1]) for i in ids]
        return jax.tree.map(lambda leaf: leaf[np.concatenate(found)], self.arrays)


FED = {
    "method": f"{stub.FILE}:METHOD",
    "model": f"{stub.FILE}:net",
    "federation": {"num_rounds": 4, "cohort_size": 4, "dropout_rate": 0.2},
    "client": {"steps": 1, "batch_size": 4},
    "uplink": {"name": "top_k", "fraction": 0.2, "error_feedback": True},
    "checkpoints.every": 2,
    "execution": {"devices": 2, "chunk_size": 1, "examples": "host", "client_rows": "host"},
}


def holding(settings: dict[str, Any], folder: str, **where: Any) -> None:
    """Run, and write down what this process held: beside the folder, in a file by its number."""
    people, stores = People(), []
    make = rows.make

    def kept(*args: Any, **given: Any) -> rows.RowStore:
        stores.append(make(*args, **given))
        return stores[0]

    with (
        mock.patch.object(rows, "make", kept),
        mock.patch.object(placing, "place_parts", side_effect=placing.place_parts) as placed,
    ):
        fjp.run(settings, data=people, folder=folder, **where)
    given = [call.args[0] for call in placed.call_args_list if isinstance(call.args[0], dict)]
    held = {
        "asked": people.asked,
        "example_bytes": [sum(leaf.nbytes for leaf in one.values()) for one in given],
        "row_bytes": sum(array.nbytes for array in stores[0].kept.arrays),
        "rows": homes.ids(stores[0].kept.home, np.flatnonzero(stores[0].kept.is_written)).tolist(),
    }
    pathlib.Path(f"{folder}-{where['process_id']}.json").write_text(json.dumps(held))


def saved_rows(folder: pathlib.Path, number: int) -> list[np.ndarray]:
    """Read the rows of all clients as bytes, whatever processes saved them."""
    saved = folder / layout.ROWS
    (about, *_) = sorted(saved.glob(f"**/{number}/about.json"))
    said = json.loads(about.read_text())
    row = [np.zeros(size, np.uint8) for size in said["row_bytes"]]
    store = rows.make(row, num_clients=said["num_clients"])
    given = {"fingerprint": said["fingerprint"]}
    assert saved_lib.is_whole(saved, number, store.kept, **given)
    saved_lib.restore(saved, number, store.kept)
    return [*store.kept.arrays, store.kept.is_written]


def in_turn(settings: Sequence[dict[str, Any]], folder: str, **processes: Any) -> None:
    """Run all settings in one process of several, or alone."""
    jax.config.update("jax_num_cpu_devices", 4 // processes.get("num_processes", 1))
    for number, one in enumerate(settings):
        fjp.run(one, folder=f"{folder}/{number}", **processes)
        jax.clear_caches()


def in_processes(arguments: Sequence[Any], *, number: int, function: str = "in_turn") -> None:
    """Call a function of this module in so many processes, with arguments that JSON can tell."""
    code = f"import json, sys; from tests import several; several.{function}("
    where = f"coordinator='127.0.0.1:{free_port()}', num_processes={number}" if number > 1 else ""
    each = [f"{where}, process_id={one})" if where else ")" for one in range(number)]
    given = json.dumps(arguments)
    started = [processes.python(f"{code}*json.loads(sys.argv[1]), {end}", given) for end in each]
    said = [one.communicate() for one in started]
    assert [one.returncode for one in started] == [0] * number, said
