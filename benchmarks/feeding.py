"""Rounds whose cohorts are fed, against rounds with everything on the device.

The first part times both in turns: examples in host memory, in a memory-mapped file, and with what
clients remember off the device, too. The second part (`--limited`) runs a whole federation with a
process that may take so much memory and no more, with ten times as many bytes of examples: plain
FedAvg, and error feedback, whose rows alone are larger than that memory.

    python -m benchmarks.feeding [--repeats 7] [--rounds 10] [--json FILE]
    python -m benchmarks.feeding --limited 1500 [--clients 1000000] [--rounds 100]
"""

import argparse
import json
import os
import pathlib
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks import harness

TARGET = 1.1  # time of a fed round over that of a resident one, where local work takes longer
MIB = 2**20
NUM_CLIENTS, EXAMPLES, COHORT = 1000, 50, 10  # of the timed federation; examples of a client
_WIDTH, _OF_CLIENT = 3072, 5  # bytes of an example of the limited one, and a client's examples
RESIDENT = "resident"
PLACES = {
    RESIDENT: ("device", "device"),
    "host": ("host", "device"),
    "mapped": ("host", "device"),
    "host, rows host": ("host", "host"),
    "host, rows disk": ("host", "disk"),
}


def _images(folder: pathlib.Path | None) -> dict[str, Any]:
    """Make images of ten classes, in memory or in a file."""
    import numpy as np

    rng = np.random.default_rng(0)
    number, shape = NUM_CLIENTS * EXAMPLES, (28, 28, 1)
    images = rng.integers(0, 256, (number, *shape), dtype=np.uint8)
    if folder is not None:
        np.save(folder / "images.npy", images)
        images = np.load(folder / "images.npy", mmap_mode="r")
    labels = np.arange(number) % 10
    test = {"test_inputs": np.asarray(images[:500]), "test_labels": labels[:500]}
    return {"inputs": images, "labels": labels, **test}


@contextmanager
def contender(
    name: str, folder: pathlib.Path, *, rounds: int, feedback: bool
) -> Iterator[harness.Contender]:
    """Build a federation and make what runs some of its rounds."""
    import jax

    from fedjaxprune.data import conversion
    from fedjaxprune.experiment.config import resolve
    from fedjaxprune.experiment.feeding import feeder as feeding
    from fedjaxprune.experiment.run import build, composing, loop

    examples, client_rows = PLACES[name]
    data = conversion.as_dataset(_images(folder if name == "mapped" else None))
    config = resolve.resolve(
        {
            "method": "fedavg",
            "model": "lenet5",
            "data.dataset": resolve.as_found("dataset", data),
            "data.num_clients": NUM_CLIENTS,
            "federation.num_rounds": 10**6,
            "federation.cohort_size": COHORT,
            "client.batch_size": 10,
            "client.epochs": 1,
            "uplink": {"name": "top_k", "fraction": 0.1, "error_feedback": feedback},
            "execution": {
                "devices": 1,
                "chunk_size": 1,
                "examples": examples,
                "client_rows": client_rows,
            },
        }
    )
    parts = build.build(config)
    key = jax.random.fold_in(jax.random.key(0), composing.ROUNDS)
    now, row = feeding.without_rows(parts.feed, loop.start(jax.random.key(1), parts))
    population = () if examples == "host" else parts.population
    number = 0
    with feeding.feeder(
        parts.feed,
        lambda: row,
        num_clients=NUM_CLIENTS,
        folder=folder / name,
        fingerprint=0,
        mesh=None,
    ) as feeder:
        compiled = jax.jit(parts.advance[0], donate_argnums=1)

        def run() -> None:
            nonlocal now, number
            step = feeder.step(0, compiled, range(number, number + rounds))
            for _ in range(rounds):
                now, _ = step(key, now, population)
            number += rounds
            jax.block_until_ready(now)

        begin = time.perf_counter()
        run()
        yield harness.Contender(run, rounds, time.perf_counter() - begin)


def ratios(*, repeats: int, rounds: int) -> dict[str, Any]:
    """Time all places in turns, without and with error feedback."""
    from contextlib import ExitStack

    result: dict[str, Any] = {}
    for feedback in (False, True):
        with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
            folder = pathlib.Path(made)
            contenders = {
                name: stack.enter_context(contender(name, folder, rounds=rounds, feedback=feedback))
                for name in PLACES
            }
            timings = harness.compete(contenders, repeats=repeats)
        case = "error feedback" if feedback else "FedAvg"
        for name, timing in timings.items():
            ratio = timings[RESIDENT].median / timing.median
            print(f"{case:15} {name:16} {timing.median:8,.1f} rounds/s, {ratio:.3f} of the time")
        result[case] = harness.as_json(timings)
    print(f"target: {TARGET} at most where local work takes longer than feeding")
    return result


def limited(
    memory_mib: int, *, num_clients: int, rounds: int, feedback: bool, client_rows: str
) -> dict[str, Any]:
    """Run a federation in this process, which may take so much more memory than it has."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import fedjaxprune as fjp

    jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones([8, 8])))
    begin = _data_bytes()
    number = num_clients * _OF_CLIENT
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as made:
        folder = pathlib.Path(made)
        # Zeros that were never written take no room on the disk, but are read like any others.
        np.memmap(folder / "inputs", np.uint8, mode="w+", shape=(number, _WIDTH)).flush()
        inputs = np.memmap(folder / "inputs", np.uint8, mode="r", shape=(number, _WIDTH))
        labels = np.arange(number, dtype=np.int32) % 2
        data = {
            "inputs": inputs,
            "labels": labels,
            "test_inputs": np.zeros([100, _WIDTH], np.uint8),
            "test_labels": labels[:100],
        }
        limit = begin + memory_mib * MIB
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        started = time.perf_counter()
        run = fjp.run(
            {
                "method": "fedavg",
                "model": {"name": "mlp", "hidden_sizes": [1]},
                "data": {"num_clients": num_clients, "partition": "iid"},
                "federation": {"num_rounds": rounds, "cohort_size": 1000},
                "client": {"batch_size": 5, "epochs": 1},
                "uplink": {"name": "top_k", "fraction": 0.1, "error_feedback": feedback},
                "evaluation.every": rounds,
                "checkpoints.every": max(1, rounds // 2),
                "execution": {"devices": 1, "chunk_size": 10, "client_rows": client_rows},
            },
            data=data,
            folder=folder / "run",
        )
        section = run.config["execution"]
        times = run.record["time_s"].tolist()
        return {
            "memory_mib": memory_mib,
            "examples_mib": inputs.nbytes / MIB,
            "num_clients": num_clients,
            "rounds": len(times),
            "examples": section["examples"],
            "client_rows": section["client_rows"],
            "resident_mib": _data_bytes("VmHWM") / MIB,
            "data_mib": (_data_bytes() - begin) / MIB,
            "before_first_round_s": time.perf_counter() - started - sum(times),
            "round_s": sorted(times)[len(times) // 2],
        }


def _data_bytes(name: str = "VmData") -> int:
    """Read how much memory of its own this process has reserved: what RLIMIT_DATA bounds."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.feeding", description="Fed rounds against resident ones."
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rounds", type=int, help="of a measurement (10), or of a run (100)")
    parser.add_argument("--limited", type=int, metavar="MIB", help="memory that a run may take")
    parser.add_argument("--clients", type=int, help="by default for ten times MIB")
    parser.add_argument("--here", choices=["plain", "feedback"], help=argparse.SUPPRESS)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(arguments)
    if options.limited is None:
        harness.bind(1)
        found = ratios(repeats=options.repeats, rounds=options.rounds or 10)
        harness.write(options.json, found)
        return
    clients = options.clients or 10 * options.limited * MIB // (_WIDTH * _OF_CLIENT)
    if options.here:
        feedback = options.here == "feedback"
        found = limited(
            options.limited,
            num_clients=clients,
            rounds=options.rounds or 100,
            feedback=feedback,
            client_rows="disk" if feedback else "auto",
        )
        print(json.dumps(found))
        return
    result = {}
    for which in ("plain", "feedback"):
        given = ("--limited", options.limited, "--clients", clients)
        given += ("--rounds", options.rounds or 100)
        result[which] = harness.elsewhere("feeding", "--here", which, *given)
        print(which, json.dumps(result[which], indent=1), flush=True)
    harness.write(options.json, result)


if __name__ == "__main__":
    main()
