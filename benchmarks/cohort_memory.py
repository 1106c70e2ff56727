"""Memory of a round with a cohort of 10 and of 1,000: ResNet-18, one local step, one chunk size.

Each runs in a process of its own, since a process's highest mark does not come down. `XLA` is what
the compiled round holds at once, by its own account (arguments, outputs, temporaries); `resident`
is the most memory that the process had, compiler included. The allocator's share of that grows with
the work that is done, by whatever program; so all sizes train as many clients, the smaller ones in
more rounds, and `first` is the mark after one round.

    python -m benchmarks.cohort_memory [--cohort-size 10 --cohort-size 1000] [--json FILE]
"""

import argparse
import json
import pathlib
import resource
from collections.abc import Sequence
from typing import Any

from benchmarks import harness

NUM_CLIENTS, BATCH_SIZE = 1000, 2
TARGET = 1.10  # the larger cohort's memory over the smaller's
MIB = 2**20


def measure(cohort_size: int, *, num_rounds: int) -> dict[str, float]:
    """Play rounds in this process; MiB."""
    import jax
    import jax.numpy as jnp
    import optax

    from fedjaxprune import models
    from fedjaxprune.data import batching, transforms
    from fedjaxprune.federated import sampling
    from fedjaxprune.methods import fedavg
    from fedjaxprune.rounds import facts, simulation, task
    from fedjaxprune.rounds.protocol import Protocol
    from fedjaxprune.types import Population

    total = NUM_CLIENTS * BATCH_SIZE
    population = Population(
        examples={
            "inputs": jnp.zeros([total, 32, 32, 3], jnp.uint8),
            "labels": jnp.zeros([total], jnp.int32),
        },
        order=jnp.arange(total, dtype=jnp.int32),
        offsets=jnp.arange(NUM_CLIENTS + 1, dtype=jnp.int32) * BATCH_SIZE,
    )
    model = models.resnet18(input_shape=(32, 32, 3), num_classes=10, norm="batch")
    setup = Protocol(
        num_rounds=1,
        batcher=batching.steps(
            num_steps=1, batch_size=BATCH_SIZE, preprocess=transforms.scale(max_value=255.0)
        ),
        optimizer=optax.sgd(0.01),
    )
    algorithm = fedavg.build(
        fedavg.FedAvg(), task.make(model, setup, inputs=facts.float_inputs((32, 32, 3)))
    )
    sample = sampling.uniform(num_clients=NUM_CLIENTS, cohort_size=cohort_size)
    run = simulation.start(
        algorithm, *jax.jit(model.init)(jax.random.key(0)), num_clients=NUM_CLIENTS
    )
    given = (jax.random.key(1), run, population)
    play, seconds = harness.compiled(simulation.advance(algorithm.stages[0], sample), *given)
    held = play.memory_analysis()
    marks = []
    for _ in range(num_rounds):
        jax.block_until_ready(play(*given))
        marks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB)
    return {
        "XLA": (held.argument_size_in_bytes + held.output_size_in_bytes + held.temp_size_in_bytes)
        / MIB,
        "resident": marks[-1],
        "first": marks[0],
        "rounds": num_rounds,
        "compile_s": seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cohort_memory", description="Memory of a round by cohort size."
    )
    parser.add_argument("--cohort-size", type=int, action="append", metavar="C")
    parser.add_argument("--here", type=int, metavar="ROUNDS", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(arguments)
    sizes = options.cohort_size or [10, NUM_CLIENTS]
    if any(not 1 <= size <= NUM_CLIENTS for size in sizes):
        parser.error(f"--cohort-size must be from 1 to {NUM_CLIENTS}, got {sizes}.")
    if options.here:
        print(json.dumps(measure(sizes[0], num_rounds=options.here)))
        return
    result: dict[str, Any] = {"cases": {}}
    for size in sizes:
        num_rounds = -(-max(sizes) // size)
        figures = harness.elsewhere("cohort_memory", "--here", num_rounds, "--cohort-size", size)
        result["cases"][str(size)] = figures
        print(
            f"cohort of {size:>5}: XLA {figures['XLA']:,.0f} MiB, "
            f"resident at most {figures['resident']:,.0f} MiB after {num_rounds} rounds, "
            f"{figures['first']:,.0f} after the first",
            flush=True,
        )
    first, last = (result["cases"][str(size)] for size in (sizes[0], sizes[-1]))
    for name in ("XLA", "resident"):
        print(f"{name}: {last[name] / first[name]:.3f} times as much (target {TARGET:g} at most)")
    harness.write(options.json, result)


if __name__ == "__main__":
    main()
