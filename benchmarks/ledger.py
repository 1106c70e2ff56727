"""Time the ledger beside the rounds that it accounts for: FedDIP on synthetic images.

    python benchmarks/ledger.py            LeNet-5, 10 clients, one local epoch of 600 examples
    python benchmarks/ledger.py resnet18   the same with ResNet-18, 2 clients of 32 examples
    python benchmarks/ledger.py digits     `fedjaxprune run` as it is by default: an MLP on digits

`host` is `ledger.account`; in a revision round it also counts new masks, which is `host, new
masks`. `arithmetic` is `round_costs.of_round`. `device` is what the round computes for the ledger
alone (it is part of the round). Times are of the processor, of all threads for a round, so that
other people's work does not count; on `digits` a round has all that the command does.
"""

import argparse
import itertools
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjaxprune import masks, models
from fedjaxprune.costs import ledger
from fedjaxprune.data import batching, partitions
from fedjaxprune.experiment.config import resolve
from fedjaxprune.experiment.run import launch, round_costs
from fedjaxprune.federated import sampling
from fedjaxprune.methods import feddip
from fedjaxprune.rounds import facts, protocol, simulation, task

ROUNDS = 12
DIGITS_ROUNDS, BLOCK = 800, 10


def build(network):
    """Put the federation together."""
    rng = np.random.default_rng(0)
    clients, size = (10, 600) if network == "lenet5" else (2, 32)
    shape = (28, 28, 1) if network == "lenet5" else (32, 32, 3)
    norm = {} if network == "lenet5" else {"norm": "batch"}
    model = getattr(models, network)(input_shape=shape, num_classes=10, **norm)
    examples = {
        "inputs": rng.standard_normal((clients * size, *shape), np.float32),
        "labels": rng.integers(0, 10, clients * size).astype(np.int32),
    }
    setup = protocol.Protocol(
        num_rounds=ROUNDS,
        batcher=batching.epochs(num_epochs=1, batch_size=32, preprocess=lambda key, inputs: inputs),
        optimizer=optax.sgd(0.01),
    )
    algorithm = feddip.build(
        feddip.FedDIP(sparsity=0.9, initial_sparsity=0.5, prune_every=2, num_segments=2),
        task.make(model, setup, inputs=facts.float_inputs(shape)),
    )
    parts = partitions.iid(rng, examples["labels"], num_clients=clients)
    return model, algorithm, partitions.population(examples, parts), clients


def once(state):
    """Do what a round does for the ledger once."""
    prunable = masks.prunable_leaves(state.params, feddip.without_shortcuts)
    leaves = zip(jax.tree.leaves(state.masks), prunable, strict=True)
    return masks.pack(tuple(leaf for leaf, flag in leaves if flag))


def by_client(state, delta):
    """Do what a round does for the ledger for every client."""
    after = jax.tree.map(jnp.add, state.params, delta)
    return masks.num_kept(jax.tree.map(lambda leaf: leaf == 0, after))


def timed(function, *arguments):
    begin = time.process_time()
    result = jax.block_until_ready(function(*arguments))
    return time.process_time() - begin, result


def of_this_thread(function, times):
    """Make a function that notes what time of the processor it takes in its thread."""

    def timed_fn(*arguments):
        begin = time.thread_time()
        result = function(*arguments)
        times.append(time.thread_time() - begin)
        return result

    return timed_fn


def report(name, rounds, **parts):
    middle = statistics.median(rounds)
    print(f"{name}: a round takes {1e3 * middle:,.1f} ms")
    for part, times in parts.items():
        for kind, spent in (("median", statistics.median(times)), ("mean", statistics.mean(times))):
            print(f"{part}, {kind}: {1e3 * spent:.2f} ms, {100 * spent / middle:.2f} % of a round")


def digits():
    """Run the command's defaults, ten rounds with accounts and ten without in turn.

    Without means that the first round's accounts are given again. What the accounts cost is the
    difference: a time taken around them also has what their first steps wait for, as the round's
    arithmetic has emptied the caches, and without them whatever comes next would wait instead.
    """
    host, arithmetic, begins = [], [], []
    remembered = {}

    def switched(name, function):
        def switched_fn(*arguments):
            if len(begins) // BLOCK % 2 and name in remembered:
                return remembered[name]
            remembered[name] = result = function(*arguments)
            return result

        return switched_fn

    count = switched("host", of_this_thread(ledger.account, host))

    def account(*arguments):
        begins.append((time.perf_counter(), time.process_time()))
        return count(*arguments)

    ledger.account = account
    of_round = of_this_thread(round_costs.of_round, arithmetic)
    round_costs.of_round = switched("arithmetic", of_round)
    with tempfile.TemporaryDirectory() as folder:
        config = resolve.resolve({"federation.num_rounds": DIGITS_ROUNDS})
        launch.start(config, folder=pathlib.Path(folder) / "run")
    blocks = begins[BLOCK - 1 :: BLOCK]
    for kind, name in enumerate(("wall clock", "processor time")):
        times = [(b[kind] - a[kind]) / BLOCK for a, b in itertools.pairwise(blocks)]
        # The first blocks hold what was compiled.
        without, given = times[2::2], times[3::2]
        pairs = list(zip(given, without, strict=False))
        share = statistics.median(one / other - 1 for one, other in pairs)
        print(
            f"{name}: a round with accounts takes {1e3 * statistics.median(given):.2f} ms, "
            f"without {1e3 * statistics.median(without):.2f}; "
            f"median of {len(pairs)} pairs: {100 * share:+.2f} %"
        )
    middle = [b[1] - a[1] for a, b in itertools.pairwise(begins[BLOCK:])]
    report("digits", middle, host=host[BLOCK:], arithmetic=arithmetic[BLOCK:])


def main(*, network="lenet5"):
    """Print medians and means over the rounds after the first."""
    model, algorithm, population, num_clients = build(network)
    key = jax.random.key(0)
    run = simulation.start(algorithm, *model.init(key), num_clients=num_clients)
    advance = jax.jit(simulation.advance(algorithm.stages[0], sampling.all_clients(num_clients)))
    once_fn, by_client_fn = jax.jit(once), jax.jit(by_client)
    jax.block_until_ready((once_fn(run.state), by_client_fn(run.state, run.state.params)))
    rounds, host, renewed, device, arithmetic = [], [], [], [], []
    profile = round_costs.profile(
        model,
        run.state.params,
        jax.tree.leaves(population.examples)[0],
        preprocess=lambda key, inputs: inputs,
        prunable=feddip.without_shortcuts,
        warn=print,
    )
    for index in range(ROUNDS):
        before = run.state
        seconds, (run, metrics) = timed(advance, key, run, population)
        metrics = jax.device_get(metrics)
        spent, _ = timed(ledger.account, metrics, run.state, algorithm)
        at_once, _ = timed(round_costs.of_round, profile, metrics)
        if index > 0:
            arithmetic.append(at_once)
            rounds.append(seconds)
            (renewed if np.any(metrics.sent.num_masks) else host).append(spent)
            here = min(timed(by_client_fn, before, before.params)[0] for _ in range(5))
            device.append(min(timed(once_fn, before)[0] for _ in range(5)) + num_clients * here)
    parts = {"host": host, "host, new masks": renewed, "arithmetic": arithmetic, "device": device}
    report(network, rounds, **parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time the ledger.")
    parser.add_argument(
        "network", nargs="?", default="lenet5", choices=["lenet5", "resnet18", "digits"]
    )
    network = parser.parse_args().network
    digits() if network == "digits" else main(network=network)
