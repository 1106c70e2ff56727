"""Whole rounds, and what one of them spends on selection.

- *scanned*: an MLP with a hidden layer of 32 on `digits`, cohort 10, one local step: rounds per
  second, many in one call (``lax.scan``) against one call a round; both bring home the loss of
  every round. *scanned_metrics*: the scan brings home all metrics. *scanned_wide*: the loss, and
  the MLP that the command takes, whose products weigh more than the calls.
- *feddip*: a FedDIP round (masking, top-k with error feedback, a revision every round, the ledger)
  against a FedAvg round, the CNN, the same clients and the five local epochs that FedDIP publishes.
  *feddip_short*: the same with one local epoch, so that what happens once a round weighs more.
- *skew*: a cohort of very unequal clients (as Dirichlet 0.1 deals them) against an equal one with
  as many examples, the CNN.
- *selection*: the exact k largest of 23 million magnitudes against sorting them.
- *own_network*: the CNN as a user writes it in flax, with our convolution and pooling, against the
  built-in one: local training, examples per second.

    python -m benchmarks.rounds [--threads 2] [--quick] [--only scanned] [--json FILE]
"""

import argparse
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import harness, networks
from benchmarks.harness import Contender

BATCH_SIZE, COHORT_SIZE, NUM_EXAMPLES = 32, 4, 512
SELECTED_AMONG = 23_000_000
OURS = {
    "scanned": "one call",
    "scanned_metrics": "one call",
    "scanned_wide": "one call",
    "feddip": "feddip",
    "feddip_short": "feddip",
    "skew": "unequal clients",
    "selection": "selection.top_k",
    "own_network": "a user's network",
}
TARGETS = {
    "own_network": {"built-in": 0.95},
    "scanned": {"a call a round": 3.0},
    "scanned_metrics": {"a call a round": 3.0},
    "scanned_wide": {"a call a round": 3.0},
    "feddip": {"fedavg": 1 / 1.10},
    "feddip_short": {"fedavg": 1 / 1.10},
    "skew": {"equal clients": 1 / 1.15},
    "selection": {"jnp.sort": 20.0},
}


def _rounds(
    algorithm: Any, model: Any, populations: Mapping[str, Any], mesh: Any
) -> dict[str, Contender]:
    """Play rounds of an algorithm over and over, always with the same cohort.

    A contender for each population; they are of one shape, so that one program serves them all.
    """
    import jax
    import jax.numpy as jnp

    from fedjaxprune.costs import ledger
    from fedjaxprune.rounds import simulation

    num_clients = next(iter(populations.values())).offsets.shape[0] - 1
    everyone = jnp.arange(num_clients, dtype=jnp.int32)
    advance = simulation.advance(
        algorithm.stages[0], lambda key: (everyone, jnp.ones(num_clients, bool))
    )
    params, state = jax.jit(model.init)(jax.random.key(0))
    start = simulation.start(algorithm, params, state, num_clients=num_clients)
    key, start, populations = harness.everywhere(mesh, (jax.random.key(1), start, populations))
    play, seconds = harness.compiled(advance, key, start, next(iter(populations.values())))
    shapes = jax.eval_shape(lambda: start.state)

    def contender(population):
        def keep_accounts(metrics):
            ledger.account(jax.device_get(metrics), shapes, algorithm)

        run, metrics = play(key, start, population)  # later rounds have masks, residuals, states
        keep_accounts(metrics)  # which compiles a little the first time

        def work():
            _, metrics = jax.block_until_ready(play(key, run, population))
            keep_accounts(metrics)

        return Contender(work, 1.0, seconds)

    return {name: contender(population) for name, population in populations.items()}


def _population(sizes: Sequence[int], image: tuple[int, ...]) -> Any:
    import jax.numpy as jnp
    import numpy as np

    from fedjaxprune.types import Population

    total = int(sum(sizes))
    generator = np.random.default_rng(0)
    return Population(
        examples={
            "inputs": jnp.asarray(generator.integers(0, 256, (total, *image), dtype=np.uint8)),
            "labels": jnp.asarray(generator.integers(0, 10, total, dtype=np.int32)),
        },
        order=jnp.arange(total, dtype=jnp.int32),
        offsets=jnp.asarray(np.concatenate([[0], np.cumsum(sizes)]), jnp.int32),
    )


def _setup(mesh: Any, *, num_epochs: int = 1, **changes: Any) -> Any:
    import optax

    from fedjaxprune.data import batching, transforms
    from fedjaxprune.rounds.protocol import Protocol

    epochs = batching.epochs(
        num_epochs=num_epochs, batch_size=BATCH_SIZE, preprocess=transforms.scale(max_value=255.0)
    )
    setup = Protocol(num_rounds=1000, batcher=epochs, optimizer=optax.sgd(0.01), mesh=mesh)
    return setup._replace(**changes)


def feddip_against_fedavg(mesh: Any, *, num_epochs: int) -> dict[str, Contender]:
    from fedjaxprune.federated import uplinks
    from fedjaxprune.methods import fedavg, feddip
    from fedjaxprune.rounds import facts, task

    model = networks.ours("cnn")
    population = _population([NUM_EXAMPLES] * COHORT_SIZE, networks.CASES["cnn"].image)
    wire = uplinks.error_feedback(uplinks.top_k(fraction=0.1))
    setup = _setup(mesh, num_epochs=num_epochs)
    given = task.make(model, setup, inputs=facts.float_inputs(networks.CASES["cnn"].image))
    plain = fedavg.build(fedavg.FedAvg(), given)
    wired = given._replace(protocol=setup._replace(uplink=wire))
    dip = feddip.build(feddip.FedDIP(sparsity=0.9, prune_every=1), wired)
    return {
        **_rounds(dip, model, {"feddip": population}, mesh),
        **_rounds(plain, model, {"fedavg": population}, mesh),
    }


def skewed_against_equal(mesh: Any) -> dict[str, Contender]:
    import numpy as np

    from fedjaxprune.methods import fedavg
    from fedjaxprune.rounds import facts, task

    model = networks.ours("cnn")
    num_clients, total = 10, 2560
    # Sizes as Dirichlet(0.1) over ten labels deals them, with a whole batch at least.
    shares = np.random.default_rng(0).dirichlet(np.full(num_clients, 0.1), 10).sum(axis=0) / 10
    sizes = np.maximum(np.round(shares * total / BATCH_SIZE), 1).astype(int) * BATCH_SIZE
    sizes[np.argmax(sizes)] -= sizes.sum() - total
    image = networks.CASES["cnn"].image
    given = task.make(model, _setup(mesh), inputs=facts.float_inputs(image))
    algorithm = fedavg.build(fedavg.FedAvg(), given)
    equal = [total // num_clients] * num_clients
    populations = {
        "unequal clients": _population(sizes.tolist(), image),
        "equal clients": _population(equal, image),
    }
    return _rounds(algorithm, model, populations, mesh)


def scanned_against_called(
    mesh: Any, *, hidden_sizes: tuple[int, ...], all_metrics: bool = False
) -> dict[str, Contender]:
    import jax
    import optax

    from fedjaxprune import models
    from fedjaxprune.data import batching, datasets, partitions, transforms
    from fedjaxprune.federated import sampling
    from fedjaxprune.methods import fedavg
    from fedjaxprune.rounds import facts, simulation, task

    del mesh  # a round of this size is faster on one device
    num_rounds = 200
    digits = datasets.load("digits")
    parts = partitions.iid(_generator(), digits.train["labels"], num_clients=20)
    population = partitions.population(digits.train, parts)
    model = models.mlp(input_shape=digits.input_shape, num_classes=10, hidden_sizes=hidden_sizes)
    prepare, _ = transforms.for_dataset(digits, augment=False)
    batcher = batching.steps(num_steps=1, batch_size=16, preprocess=prepare)
    setup = _setup(None, batcher=batcher, optimizer=optax.sgd(0.1), chunk_size=10)
    algorithm = fedavg.build(
        fedavg.FedAvg(), task.make(model, setup, inputs=facts.float_inputs(digits.input_shape))
    )
    sample = sampling.uniform(num_clients=20, cohort_size=10)
    advance = simulation.advance(algorithm.stages[0], sample)
    key = jax.random.key(1)
    run = simulation.start(algorithm, *model.init(jax.random.key(0)), num_clients=20)

    def many(key, run, population):
        def one(run, _):
            run, metrics = advance(key, run, population)
            return run, metrics if all_metrics else metrics.train["loss"]

        return jax.lax.scan(one, run, length=num_rounds)

    scan, scan_s = harness.compiled(many, key, run, population)
    play, play_s = harness.compiled(advance, key, run, population)

    def one_by_one():
        now = run
        for _ in range(num_rounds):
            now, metrics = play(key, now, population)
            jax.device_get(metrics.train["loss"])  # as whoever watches a run does
        jax.block_until_ready(now)

    return {
        "one call": Contender(
            lambda: jax.block_until_ready(scan(key, run, population)), num_rounds, scan_s
        ),
        "a call a round": Contender(one_by_one, num_rounds, play_s),
    }


def selection_against_sorting(mesh: Any) -> dict[str, Contender]:
    import jax
    import jax.numpy as jnp

    from fedjaxprune.pruning import selection

    del mesh
    scores = jnp.abs(jax.random.normal(jax.random.key(0), [SELECTED_AMONG]))
    count = jnp.int32(SELECTED_AMONG // 100)
    select, select_s = harness.compiled(selection.top_k, scores, count)
    sort, sort_s = harness.compiled(lambda scores, k: jnp.sort(scores)[-k], scores, count)
    return {
        "selection.top_k": Contender(
            lambda: jax.block_until_ready(select(scores, count)), 1.0, select_s
        ),
        "jnp.sort": Contender(lambda: jax.block_until_ready(sort(scores, count)), 1.0, sort_s),
    }


def _generator() -> Any:
    import numpy as np

    return np.random.default_rng(0)


def own_against_built_in(mesh: Any) -> dict[str, Contender]:
    from benchmarks import local_training
    from fedjaxprune.kernels import convolution, pooling
    from fedjaxprune.models import adapters

    num_clients, num_steps = 1 if mesh is None else mesh.size, 10
    module = networks.plain_flax(
        "cnn", convolution=convolution.conv_general_dilated, max_pool=pooling.max_pool
    )
    own = adapters.from_linen(module, input_shape=networks.CASES["cnn"].image)
    return {
        "a user's network": local_training.make_ours("cnn", num_clients, num_steps, model=own),
        "built-in": local_training.make_ours("cnn", num_clients, num_steps),
    }


CASES = {
    "own_network": own_against_built_in,
    "scanned": functools.partial(scanned_against_called, hidden_sizes=(32,)),
    "scanned_metrics": functools.partial(
        scanned_against_called, hidden_sizes=(32,), all_metrics=True
    ),
    "scanned_wide": functools.partial(scanned_against_called, hidden_sizes=(200, 100)),
    "feddip": functools.partial(feddip_against_fedavg, num_epochs=5),
    "feddip_short": functools.partial(feddip_against_fedavg, num_epochs=1),
    "skew": skewed_against_equal,
    "selection": selection_against_sorting,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rounds", description="Whole rounds against simpler ones."
    )
    parser.add_argument("--threads", type=int, default=2, help="cores, one device each (2)")
    parser.add_argument("--only", action="append", metavar="CASE", help="one of the cases")
    parser.add_argument("--quick", action="store_true", help="few repeats: noisy")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}.")
    harness.bind(options.threads)
    import jax

    from fedjaxprune.federated import cohort

    mesh = cohort.make_mesh() if jax.device_count() > 1 else None
    result: dict[str, Any] = {"threads": options.threads, "machine": harness.machine(), "cases": {}}
    print(f"per second, median (least to most); {result['machine']}")
    for name in harness.names(options.only, list(CASES)):
        repeats, patience_s = (3, 12.0) if options.quick else (7, math.inf)
        timings = harness.compete(CASES[name](mesh), repeats=repeats, patience_s=patience_s)
        result["cases"][name] = harness.as_json(timings)
        print(harness.line(name, OURS[name], timings, TARGETS[name]), flush=True)
    harness.write(options.json, result)


if __name__ == "__main__":
    main()
