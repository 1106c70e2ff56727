"""Time the ledger beside the rounds that it accounts for: FedDIP on synthetic images.

    python benchmarks/ledger.py            LeNet-5, 10 clients, one local epoch of 600 examples
    python benchmarks/ledger.py resnet18   the same with ResNet-18, 2 clients of 32 examples

`host` is `Algorithm.num_bits`; in a revision round it also counts new masks, which is `host, new
masks`. `device` is what the round computes for the ledger alone (it is part of the round).
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjaxprune import masks
from fedjaxprune.algorithms import compose, feddip, simulation
from fedjaxprune.data import batching, partitions
from fedjaxprune.federated import participation
from fedjaxprune.models import zoo

ROUNDS = 12


def build(network):
    """Put the federation together."""
    rng = np.random.default_rng(0)
    clients, size = (10, 600) if network == "lenet5" else (2, 32)
    shape = (28, 28, 1) if network == "lenet5" else (32, 32, 3)
    norm = {} if network == "lenet5" else {"norm": "batch"}
    model = getattr(zoo, network)(input_shape=shape, num_classes=10, **norm)
    examples = {
        "inputs": rng.standard_normal((clients * size, *shape), np.float32),
        "labels": rng.integers(0, 10, clients * size).astype(np.int32),
    }
    setup = compose.Setup(
        num_rounds=ROUNDS,
        batcher=batching.epochs(num_epochs=1, batch_size=32, preprocess=lambda key, inputs: inputs),
        optimizer=optax.sgd(0.01),
    )
    algorithm = feddip.feddip(
        model, setup, final_sparsity=0.9, initial_sparsity=0.5, period=2, num_segments=2
    )
    parts = partitions.iid(rng, examples["labels"], num_clients=clients)
    return model, algorithm, partitions.population(examples, parts), clients


def once(state):
    """Do what a round does for the ledger once."""
    prunable = masks.prunable_leaves(state.params, feddip.prunable_without_shortcuts)
    leaves = zip(jax.tree.leaves(state.masks), prunable, strict=True)
    return masks.pack(tuple(leaf for leaf, flag in leaves if flag))


def by_client(state, delta):
    """Do what a round does for the ledger for every client."""
    after = jax.tree.map(jnp.add, state.params, delta)
    return masks.num_kept(jax.tree.map(lambda leaf: leaf == 0, after))


def timed(function, *arguments):
    begin = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begin, result


def main(*, network="lenet5"):
    """Print medians over the rounds after the first."""
    model, algorithm, population, num_clients = build(network)
    key = jax.random.key(0)
    run = simulation.start(algorithm, *model.init(key), num_clients=num_clients)
    advance = jax.jit(simulation.advance(algorithm.stages[0], participation.everyone(num_clients)))
    once_fn, by_client_fn = jax.jit(once), jax.jit(by_client)
    jax.block_until_ready((once_fn(run.state), by_client_fn(run.state, run.state.params)))
    rounds, host, renewed, device = [], [], [], []
    for index in range(ROUNDS):
        before = run.state
        seconds, (run, metrics) = timed(advance, key, run, population)
        metrics = jax.device_get(metrics)
        spent, _ = timed(algorithm.num_bits, metrics, run.state)
        if index > 0:
            rounds.append(seconds)
            (renewed if np.any(metrics.sent.stale) else host).append(spent)
            here = min(timed(by_client_fn, before, before.params)[0] for _ in range(5))
            device.append(min(timed(once_fn, before)[0] for _ in range(5)) + num_clients * here)
    middle = statistics.median(rounds)
    print(f"{network}: a round takes {1e3 * middle:,.1f} ms")
    for name, times in (("host", host), ("host, new masks", renewed), ("device", device)):
        spent = statistics.median(times)
        print(f"{name}: {1e3 * spent:.2f} ms, {100 * spent / middle:.2f} % of a round")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time the ledger.")
    parser.add_argument("network", nargs="?", default="lenet5", choices=["lenet5", "resnet18"])
    main(network=parser.parse_args().network)
