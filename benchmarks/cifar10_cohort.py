"""pfl-research's published CIFAR-10 work: rounds per second against ``pfl`` itself.

1,000 users with 50 images each, a cohort of 50, one local epoch in batches of 10 (250 client steps
a round), SGD 0.1 at the client and 1.0 at the server, users weighed alike, no augmentation; two
convolutions of 3×3 (32 and 64 channels, no padding), max-pooling, dropout, 128 hidden units: 1.63
million parameters. Images are random: no figure here depends on what is on them.

    python -m benchmarks.cifar10_cohort [--threads 2] [--quick] [--pfl-python PATH] [--json FILE]

``pip install pfl`` into an environment with PyTorch; where its packages get in the way of JAX's,
into one of its own, whose interpreter is named by ``--pfl-python``. Without it only our rounds are
timed, and that is said.

References:
  Granqvist et al., `pfl-research <https://arxiv.org/abs/2404.06430>`_, 2024, table 1.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import harness
from benchmarks.harness import Contender
from benchmarks.rival_pfl import BATCH_SIZE, COHORT_SIZE, NUM_IMAGES, NUM_USERS

OURS, RIVAL = "fedjaxprune", "pfl-research"
TARGETS = {RIVAL: 1.3}


def model() -> Any:
    """Write the network as a flax user does, with our convolution and pooling."""
    import functools

    import flax.linen as nn

    from fedjaxprune.kernels import convolution, pooling
    from fedjaxprune.models import adapters

    conv = functools.partial(
        nn.Conv,
        kernel_size=(3, 3),
        padding="VALID",
        conv_general_dilated=convolution.conv_general_dilated,
    )

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(conv(32)(x))
            x = pooling.max_pool(nn.relu(conv(64)(x)))
            x = nn.Dropout(0.25, deterministic=not train)(x)
            x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
            x = nn.Dropout(0.5, deterministic=not train)(x)
            return nn.Dense(10)(x)

    return adapters.from_linen(Network(), input_shape=(32, 32, 3))


def make_ours(mesh: Any, num_rounds: int, *, chunk_size: int = 1) -> Contender:
    """Play rounds of FedAvg, a new cohort in each."""
    import jax
    import jax.numpy as jnp
    import optax

    from fedjaxprune.data import batching, transforms
    from fedjaxprune.federated import aggregators, sampling
    from fedjaxprune.methods import fedavg
    from fedjaxprune.rounds import facts, simulation, task
    from fedjaxprune.rounds.protocol import Protocol
    from fedjaxprune.types import Population

    total = NUM_USERS * NUM_IMAGES
    images = jax.random.bits(jax.random.key(0), [total, 32, 32, 3], jnp.uint8)
    population = Population(
        examples={
            "inputs": images,
            "labels": jax.random.randint(jax.random.key(1), [total], 0, 10, jnp.int32),
        },
        order=jnp.arange(total, dtype=jnp.int32),
        offsets=jnp.arange(NUM_USERS + 1, dtype=jnp.int32) * NUM_IMAGES,
    )
    setup = Protocol(
        num_rounds=1500,
        batcher=batching.epochs(
            num_epochs=1, batch_size=BATCH_SIZE, preprocess=transforms.scale(max_value=255.0)
        ),
        optimizer=optax.sgd(0.1),
        aggregator=aggregators.unweighted_mean(),
        chunk_size=chunk_size,
        mesh=mesh,
    )
    network = model()
    algorithm = fedavg.build(
        fedavg.FedAvg(), task.make(network, setup, inputs=facts.float_inputs((32, 32, 3)))
    )
    sample = sampling.uniform(num_clients=NUM_USERS, cohort_size=COHORT_SIZE)
    advance = simulation.advance(algorithm.stages[0], sample)
    params, state = jax.jit(network.init)(jax.random.key(0))
    run = simulation.start(algorithm, params, state, num_clients=NUM_USERS)
    key, run, population = harness.everywhere(mesh, (jax.random.key(1), run, population))
    play, seconds = harness.compiled(advance, key, run, population)

    def work():
        now = run
        for _ in range(num_rounds):
            now, metrics = play(key, now, population)
            jax.device_get(metrics.train["loss"])

    return Contender(work, num_rounds, seconds)


def make_rival(python: str, threads: int, num_rounds: int) -> Contender | None:
    """Start pfl in a process of its own; None, and a word why, where it is not installed."""
    here = pathlib.Path(__file__).parent
    try:
        process = subprocess.Popen(
            [python, str(here / "rival_pfl.py"), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    except OSError as error:
        raise SystemExit(f"--pfl-python {python!r} cannot be run: {error.strerror}.") from None
    assert process.stdin is not None
    assert process.stdout is not None
    hello = process.stdout.readline()
    if not hello:
        print(f"{python} has no pfl and PyTorch (pip install pfl torch): pfl-research is left out.")
        return None
    print(f"rival: {json.loads(hello)}")
    pipes = process.stdin, process.stdout

    def seconds() -> float:
        print(num_rounds, file=pipes[0], flush=True)
        return json.loads(pipes[1].readline())

    return Contender(lambda: None, num_rounds, seconds=seconds)


def contest(*, threads: int, quick: bool, python: str) -> dict[str, harness.Timing]:
    """Measure rounds per second, ours and theirs in turns."""
    import jax

    from fedjaxprune.federated import cohort

    mesh = cohort.make_mesh() if jax.device_count() > 1 else None
    num_rounds = 1 if quick else 3
    contenders = {OURS: make_ours(mesh, num_rounds)}
    rival = make_rival(python, threads, num_rounds)
    if rival is not None:
        contenders[RIVAL] = rival
    return harness.compete(contenders, repeats=3 if quick else 7)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cifar10_cohort", description="Rounds against pfl-research."
    )
    parser.add_argument("--threads", type=int, default=2, help="cores, one device each (2)")
    parser.add_argument("--quick", action="store_true", help="few repeats: noisy")
    parser.add_argument("--pfl-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}.")
    harness.bind(options.threads)
    result: dict[str, Any] = {"threads": options.threads, "machine": harness.machine()}
    timings = contest(threads=options.threads, quick=options.quick, python=options.pfl_python)
    result["cases"] = {"cifar10_cohort": harness.as_json(timings)}
    print("rounds per second, median (least to most)")
    print(harness.line("cifar10_cohort", OURS, timings, TARGETS))
    harness.write(options.json, result)


if __name__ == "__main__":
    main()
