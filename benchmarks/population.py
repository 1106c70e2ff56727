"""What a run costs that has many clients: cohorts, rounds, the start, checkpoints, partitions.

Each case runs in a process of its own, as a process's highest mark does not come down. Memory is
what the process holds of its own (``RssAnon``), without files that the system can write out.

    python -m benchmarks.population [--only start ...] [--num-clients 1000000] [--json FILE]
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import harness

FEW = 10_000  # clients to compare with
COHORT_SIZE = 10
NUM_INPUTS, HIDDEN = 16, 32  # 874 weights with 10 classes
MIB = 2**20


class Memory:
    """Looks at the process's own memory all the time; bytes."""

    def __enter__(self) -> "Memory":
        self.first = self.most = _own_memory()
        self._is_on = True
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_on = False
        self._thread.join()

    def _look(self) -> None:
        while self._is_on:
            self.most = max(self.most, _own_memory())
            time.sleep(0.003)

    @property
    def grown(self) -> int:
        """How much more than at first the process has had."""
        return self.most - self.first


def _own_memory() -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _seconds(work: Callable[[], Any], repeats: int = 15) -> float:
    """Give the median time of some calls after the first; they end with a result that is there."""
    import jax

    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def draw(num_clients: int) -> dict[str, float]:
    """Time the draw of a cohort, uniform and by unequal weights; ms."""
    import jax
    import numpy as np

    from fedjaxprune.federated import sampling

    found = {}
    for number in (FEW, num_clients):
        weights = np.random.default_rng(0).lognormal(5.0, 1.0, number)
        for size in (COHORT_SIZE, 1000):
            draws = {
                "uniform": sampling.uniform(num_clients=number, cohort_size=size),
                "weighted": sampling.weighted(weights, cohort_size=size),
            }
            for name, draw_fn in draws.items():
                jitted, keys = jax.jit(draw_fn), iter(jax.random.split(jax.random.key(0), 16))
                seconds = _seconds(lambda jitted=jitted, keys=keys: jitted(next(keys)))
                found[f"{name}, {size} of {number}, ms"] = 1e3 * seconds
    return found


def _played(num_clients: int) -> Callable[[], Any]:
    """Make a function that runs one more round of a small network with error feedback."""
    import jax
    import jax.numpy as jnp
    import optax

    from fedjaxprune import models
    from fedjaxprune.data import batching
    from fedjaxprune.federated import sampling, uplinks
    from fedjaxprune.methods import fedavg
    from fedjaxprune.rounds import facts, simulation, task
    from fedjaxprune.rounds.protocol import Protocol
    from fedjaxprune.types import Population

    population = Population(
        examples={
            "inputs": jnp.ones([num_clients, NUM_INPUTS], jnp.float32),
            "labels": jnp.zeros([num_clients], jnp.int32),
        },
        order=jnp.arange(num_clients, dtype=jnp.int32),
        offsets=jnp.arange(num_clients + 1, dtype=jnp.int32),
    )
    model = models.mlp(input_shape=(NUM_INPUTS,), num_classes=10, hidden_sizes=(HIDDEN,))
    protocol = Protocol(
        num_rounds=100,
        batcher=batching.steps(num_steps=1, batch_size=1, preprocess=lambda key, x: x),
        optimizer=optax.sgd(0.01),
        uplink=uplinks.error_feedback(uplinks.top_k(fraction=0.1)),
    )
    algorithm = fedavg.build(
        fedavg.FedAvg(), task.make(model, protocol, inputs=facts.float_inputs((NUM_INPUTS,)))
    )
    sample = sampling.uniform(num_clients=num_clients, cohort_size=COHORT_SIZE)
    step = jax.jit(simulation.advance(algorithm.stages[0], sample), donate_argnums=1)
    now = jax.jit(
        lambda key: simulation.start(algorithm, *model.init(key), num_clients=num_clients)
    )(jax.random.key(0))
    key = jax.random.key(1)

    def play():
        nonlocal now
        now, metrics = step(key, now, population)
        return metrics

    jax.block_until_ready(play())
    return play


def rounds(num_clients: int) -> dict[str, float]:
    """Time rounds of one cohort in a few and in many clients, in turns; ms."""
    plays = {number: _played(number) for number in (FEW, num_clients)}
    times: dict[int, list[float]] = {number: [] for number in plays}
    for _ in range(7):
        for number, play in plays.items():
            times[number].append(_seconds(play, 10))
    found = {f"a round, {n} clients, ms": 1e3 * statistics.median(t) for n, t in times.items()}
    return found | {"ratio, at most 1.1": found[f"a round, {num_clients} clients, ms"]
                    / found[f"a round, {FEW} clients, ms"]}  # fmt: skip


def start(num_clients: int) -> dict[str, float]:
    """Run a whole run of two rounds with clients' rows, and look at memory until the first one.

    What a run of few clients takes before it is not counted.
    """
    import numpy as np

    import fedjaxprune as fjp
    from fedjaxprune.experiment.run.listener import Listener

    rng = np.random.default_rng(0)
    size = num_clients * (NUM_INPUTS * HIDDEN + HIDDEN + HIDDEN * 10 + 10) * 4
    marks: dict[str, float] = {}

    def note(line: Any) -> None:
        marks.setdefault("extra memory until the first round, in rows", memory.grown / size)
        marks.setdefault("until the first round, s", time.perf_counter() - begin)

    settings: dict[str, Any] = {
        "method": "fedavg",
        "model": {"name": "mlp", "hidden_sizes": [HIDDEN]},
        "federation": {"cohort_size": COHORT_SIZE, "num_rounds": 2},
        "uplink": {"name": "top_k", "error_feedback": True},
        "client": {"steps": 1, "batch_size": 1},
        "execution": {"devices": 1},  # each device has all rows
    }
    for number in (FEW, num_clients):
        marks.clear()
        num_examples = number + number // 2  # of which some are for tests
        x = rng.standard_normal((num_examples, NUM_INPUTS)).astype(np.float32)
        y = rng.integers(0, 10, num_examples)
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as place, Memory() as memory:
            fjp.run(
                settings,
                data=(x, y),
                num_clients=number,
                folder=f"{place}/run",
                listener=Listener(round=note),
            )
        marks["extra memory in all, in rows"] = memory.grown / size
    return marks | {"rows, MiB": size / MIB}


def checkpoint(num_clients: int) -> dict[str, float]:
    """Save clients' rows three times: how long the run waits, and what it takes in memory.

    Shown is the save that the run waits for longest. Before the first one there is room for copies,
    as there is after the first rounds of a run.
    """
    import jax
    import jax.numpy as jnp

    from fedjaxprune.experiment.folder import checkpoints

    size = NUM_INPUTS * HIDDEN + HIDDEN + HIDDEN * 10 + 10
    rows = jax.random.normal(jax.random.key(0), (num_clients, size))
    params, masks = {"a": jnp.ones(size)}, {"a": jnp.ones(size, jnp.bool_)}
    now: Any = {"state": {"params": params, "masks": masks}, "rows": {"a": rows}}
    jax.block_until_ready(now)
    saves = []
    with (
        tempfile.TemporaryDirectory() as place,
        checkpoints.open_manager(pathlib.Path(place) / "saved", keep=2) as manager,
    ):
        checkpoints.prepare(manager, now, params)
        manager.finish()
        for number in range(3):
            with Memory() as memory:
                begin, spent = time.perf_counter(), time.process_time()
                checkpoints.save(manager, 1 + number, now, fingerprint=0, deployed=params)
                blocked, own = time.perf_counter() - begin, time.process_time() - spent
                manager.finish()
                took, all_own = time.perf_counter() - begin, time.process_time() - spent
            found = {"blocks, %": 100 * blocked / took, "blocks, s": blocked, "takes, s": took}
            found |= {"blocks, s of processors": own, "takes, s of processors": all_own}
            saves.append(found | {"extra memory, in rows": memory.grown / rows.nbytes})
    return {"rows, MiB": rows.nbytes / MIB} | max(saves, key=lambda found: found["blocks, %"])


def partition(num_clients: int) -> dict[str, float]:
    """Time the set-up of who holds what, with 20 examples a client; s of a processor."""
    import numpy as np

    from fedjaxprune.data import partitions

    labels = np.random.default_rng(1).integers(0, 10, 20 * num_clients).astype(np.int32)
    found = {}
    for name, number, options in (
        ("iid", num_clients, {}),
        ("shards", num_clients, {"classes_per_client": 2}),
        ("label_count", num_clients, {"labels_per_client": 2}),
        ("dirichlet", num_clients // 10, {"alpha": 0.5, "min_size": 10}),
        ("dirichlet_free", num_clients // 10, {"alpha": 0.5, "min_size": 1}),
        ("quantity", num_clients // 10, {"alpha": 0.5, "min_size": 10}),
    ):
        own = labels[: 20 * number]
        begin = time.process_time()
        parts = getattr(partitions, name)(
            np.random.default_rng(0), own, num_clients=number, **options
        )
        partitions.population({"labels": own}, parts, num_classes=10)
        found[f"{name}, {number} clients, s"] = time.process_time() - begin
    return found


def record(num_clients: int) -> dict[str, float]:
    """Read and cut a record of 200 rounds of 1 % of the clients."""
    import numpy as np

    from fedjaxprune.experiment.folder import client_ids, layout, summary
    from fedjaxprune.experiment.folder import record as record_lib

    rng, size = np.random.default_rng(0), num_clients // 100
    header = {"schema": layout.SCHEMA, "stages": [{"name": "train", "num_rounds": 200}]}
    found = {}
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        record_lib.begin(folder, header)
        for number in range(1, 201):
            ids = np.sort(rng.choice(num_clients, size, replace=False)).tolist()
            bits = {"client_ids": client_ids.to_text(ids), "up_bits": 10, "down_bits": 10}
            sent = {"total_bits": 10 * size}
            line = {name: {} for name in ("train", "test", "compute", "method")} | {
                "round": number, "stage": "train", "stage_round": number, "time_s": 1.0,
                "mask": {"num_live": 1, "num_changed": 0},
                "clients": {"participating": size, "rejected": 0},
                "traffic": {"up": sent, "down": sent, "by_client": [bits]},
            }  # fmt: skip
            record_lib.append(folder, line)
        length = (folder / layout.METRICS).stat().st_size
        found["a line, kB"] = length / 200 / 1000
        begin = time.perf_counter()
        lines = record_lib.read(folder).lines
        found["read, ms a round"] = 1e3 * (time.perf_counter() - begin) / 200
        begin = time.perf_counter()
        summary.summarize(header, lines)
        found["sum up, ms a round"] = 1e3 * (time.perf_counter() - begin) / 200
        begin = time.perf_counter()
        record_lib.cut(folder, header, 100)
        found["cut, ms a round"] = 1e3 * (time.perf_counter() - begin) / 200
    return found


CASES = {
    "draw": draw,
    "rounds": rounds,
    "start": start,
    "checkpoint": checkpoint,
    "partition": partition,
    "record": record,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.population", description="Costs of many clients."
    )
    parser.add_argument("--only", choices=CASES, action="append", metavar="CASE")
    parser.add_argument("--num-clients", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--here", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(arguments)
    if options.num_clients < FEW:
        parser.error(f"--num-clients must be at least {FEW}, got {options.num_clients}.")
    if options.here:
        print(json.dumps(CASES[options.here](options.num_clients)))
        return
    result: dict[str, Any] = {"num_clients": options.num_clients, "cases": {}}
    for name in options.only or CASES:
        given = ("--here", name, "--num-clients", options.num_clients)
        figures = result["cases"][name] = harness.elsewhere("population", *given)
        print(name, flush=True)
        for what, value in figures.items():
            print(f"  {what:<48} {value:>12.3f}", flush=True)
    harness.write(options.json, result)


if __name__ == "__main__":
    main()
