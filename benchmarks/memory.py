"""Predict a round's memory from its graph, then compile it, run it, and see what it took.

python -m benchmarks.memory --model cnn --chunk-size 4
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import program_memory
from fedjaxprune import models
from fedjaxprune.data import batching, partitions
from fedjaxprune.federated import sampling
from fedjaxprune.methods import fedavg
from fedjaxprune.rounds import facts, simulation, task
from fedjaxprune.rounds.protocol import Protocol

MODELS = {
    "lenet5": lambda: models.lenet5(input_shape=(28, 28, 1), num_classes=10),
    "cnn": lambda: models.cnn(input_shape=(28, 28, 1), num_classes=10),
    "resnet20": lambda: models.resnet20(input_shape=(32, 32, 3), num_classes=10, norm="batch"),
    "resnet18": lambda: models.resnet18(input_shape=(32, 32, 3), num_classes=10, norm="batch"),
}
MIB = 2**20


def resident(name):
    """Read the process's memory from Linux: ``VmRSS`` now, ``VmHWM`` the most since `forget`."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget():
    """Let the highest mark of the process's memory start afresh."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=sorted(MODELS), default="cnn")
    parser.add_argument("--chunk-size", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-clients", type=int, default=20)
    parser.add_argument("--cohort-size", type=int, default=4)
    options = parser.parse_args()

    model = MODELS[options.model]()
    image = (28, 28, 1) if options.model in ("lenet5", "cnn") else (32, 32, 3)
    setup = Protocol(
        num_rounds=1,
        batcher=batching.steps(
            num_steps=2,
            batch_size=options.batch_size,
            preprocess=lambda key, x: x.astype(jnp.float32) / 255,
        ),
        optimizer=optax.sgd(0.01, momentum=0.9),
        chunk_size=options.chunk_size,
    )
    algorithm = fedavg.build(
        fedavg.FedAvg(), task.make(model, setup, inputs=facts.float_inputs(image))
    )
    draw = sampling.uniform(num_clients=options.num_clients, cohort_size=options.cohort_size)
    advance = simulation.advance(algorithm.stages[0], draw)
    rng = np.random.default_rng(0)
    examples = {
        "inputs": rng.integers(0, 255, (50 * options.num_clients, *image), np.uint8),
        "labels": rng.integers(0, 10, 50 * options.num_clients).astype(np.int32),
    }
    parts = np.arange(len(examples["labels"])).reshape(options.num_clients, -1)
    population = partitions.population(examples, list(parts))
    key = jax.random.key(0)
    make = jax.jit(
        lambda key: simulation.start(algorithm, *model.init(key), num_clients=options.num_clients)
    )

    begin = time.perf_counter()
    predicted = program_memory.predict(advance, key, jax.eval_shape(make, key), population)
    print(f"predicted in {time.perf_counter() - begin:.1f} s")
    step = jax.jit(advance, donate_argnums=1).lower(key, jax.eval_shape(make, key), population)
    compiled = step.compile()
    used = program_memory.of_compiled(compiled)
    state = jax.block_until_ready(make(key))
    before = resident("VmRSS")
    forget()
    jax.block_until_ready(compiled(key, state, population))
    grown = resident("VmHWM") - before
    print(
        f"arguments: predicted {predicted.arguments / MIB:.1f} MiB, XLA {used.arguments / MIB:.1f}"
    )
    print(
        f"temporaries: predicted {predicted.temporaries / MIB:.1f} MiB, "
        f"XLA {used.temporaries / MIB:.1f}"
    )
    print(f"peak resident growth in the round: {grown / MIB:.1f} MiB")


if __name__ == "__main__":
    main()
