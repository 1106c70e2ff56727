"""Local training: examples per second of a cohort against three other ways to simulate it.

Every contender trains as many clients as there are cores, each for the same local steps, with plain
SGD on images stored as uint8.

- *fedjaxprune*: a cohort as a round runs it: shuffled, gathered, masked, a dynamic number of steps,
  one client a core, folded into a weighted mean.
- *PyTorch loop*: one client after another, every operation on all cores: how published code works.
- *Python loop*: a jitted step of the plain flax network, called from Python (what FedJAX does).
- *obvious JAX round*: the plain flax network, clients under ``vmap``, steps in ``lax.scan``.

    python -m benchmarks.local_training [--threads 2] [--quick] [--only cnn] [--json FILE]

PyTorch is an extra: ``pip install -e '.[torch]'``; without it the loop is left out, and said so.
"""

import argparse
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks import harness, networks
from benchmarks.harness import Contender
from benchmarks.networks import LEARNING_RATE, NUM_EXAMPLES

OURS = "fedjaxprune"
TORCH, LOOP, OBVIOUS = "PyTorch loop", "Python loop", "obvious JAX round"
TARGETS = {
    "lenet5": {TORCH: 1.2, LOOP: 1.2, OBVIOUS: 10.0},
    "cnn": {TORCH: 1.3, LOOP: 1.2, OBVIOUS: 10.0},
    "resnet20": {TORCH: 1.0, LOOP: 1.2, OBVIOUS: 10.0},
    "resnet18": {TORCH: 1.0, LOOP: 1.2, OBVIOUS: 10.0},
}


def make_ours(
    name: str, num_clients: int, num_steps: int, *, model: Any = None, chunk_size: int = 1
) -> Contender:
    """Let a cohort work as `cohort.run` runs it, one client a device."""
    import jax
    import jax.numpy as jnp
    import optax

    from fedjaxprune import masks
    from fedjaxprune.data import batching, transforms
    from fedjaxprune.federated import aggregators, cohort, local_training
    from fedjaxprune.types import Broadcast, Cohort, Population

    case = networks.CASES[name]
    model = networks.ours(name) if model is None else model
    params, model_state = jax.jit(model.init)(jax.random.key(0))
    images, labels = networks.examples(case)
    client = local_training.local_sgd(
        model.loss,
        batcher=batching.steps(
            num_steps=num_steps,
            batch_size=case.batch_size,
            preprocess=transforms.scale(max_value=255.0),
        ),
        optimizer=optax.sgd(LEARNING_RATE),
    )
    mesh = cohort.make_mesh() if jax.device_count() > 1 else None
    population = Population(
        examples={"inputs": jnp.asarray(images), "labels": jnp.asarray(labels)},
        order=jnp.tile(jnp.arange(NUM_EXAMPLES, dtype=jnp.int32), num_clients),
        offsets=jnp.arange(num_clients + 1, dtype=jnp.int32) * NUM_EXAMPLES,
    )
    members = Cohort(jnp.arange(num_clients, dtype=jnp.int32), jnp.ones(num_clients, bool), ())
    mean = aggregators.weighted_mean()

    def train(key, broadcast, population):
        outcome = cohort.run(
            key,
            client.update,
            {"delta": mean, "model_state": mean, "metrics": aggregators.unweighted_sum()},
            broadcast,
            members,
            population,
            chunk_size=chunk_size,
            mesh=mesh,
        )
        return outcome.fields

    broadcast = Broadcast(params, masks.full(params), model_state, jnp.int32(0))
    given = (jax.random.key(2), broadcast, population)
    if mesh is not None:
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        given = jax.device_put(given, everywhere)
    run, seconds = harness.compiled(train, *given)
    return Contender(
        lambda: jax.block_until_ready(run(*given)),
        num_clients * num_steps * case.batch_size,
        seconds,
    )


def _plain_step(name: str, module: Any) -> tuple[Any, Any]:
    """Write plain SGD as a flax user does: ``(variables, images, labels) -> variables``."""
    import jax
    import jax.numpy as jnp
    import optax

    case = networks.CASES[name]
    variables = jax.jit(functools.partial(module.init, train=True))(
        jax.random.key(0), jnp.zeros([1, *case.image])
    )

    def loss(params, state, images, labels):
        logits, state = module.apply(
            {"params": params, **state},
            images.astype(jnp.float32) / 255,
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), state

    def step(variables, images, labels):
        state = {key: value for key, value in variables.items() if key != "params"}
        grads, state = jax.grad(loss, has_aux=True)(variables["params"], state, images, labels)
        params = jax.tree.map(lambda w, g: w - LEARNING_RATE * g, variables["params"], grads)
        return {"params": params, **state}

    return variables, step


def make_loop(name: str, num_clients: int, num_steps: int) -> Contender:
    """Call a jitted step from Python, client by client."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    case = networks.CASES[name]
    variables, step = _plain_step(name, networks.plain_flax(name))
    images, labels = networks.examples(case)
    batch = case.batch_size
    run, seconds = harness.compiled(
        step, variables, jnp.asarray(images[:batch]), jnp.asarray(labels[:batch])
    )

    def work():
        for _ in range(num_clients):
            now = variables
            order = np.random.default_rng(1).permutation(NUM_EXAMPLES)
            for i in range(num_steps):
                rows = np.take(order, np.arange(i * batch, (i + 1) * batch), mode="wrap")
                now = run(now, images[rows], labels[rows])
            jax.block_until_ready(now)

    return Contender(work, num_clients * num_steps * batch, seconds)


def make_obvious(name: str, num_clients: int, num_steps: int) -> Contender:
    """Scan over steps and ``vmap`` over clients, with flax's own layers."""
    import jax
    import jax.numpy as jnp

    case = networks.CASES[name]
    variables, step = _plain_step(name, networks.plain_flax(name))
    images, labels = map(jnp.asarray, networks.examples(case))

    def train(variables, images, labels, key):
        def one_client(key):
            order = jax.random.permutation(key, NUM_EXAMPLES)

            def one_step(variables, i):
                rows = jnp.take(
                    order, i * case.batch_size + jnp.arange(case.batch_size), mode="wrap"
                )
                return step(variables, images[rows], labels[rows]), None

            trained, _ = jax.lax.scan(one_step, variables, jnp.arange(num_steps))
            return trained

        trained = jax.vmap(one_client)(jax.random.split(key, num_clients))
        return jax.tree.map(lambda leaf: leaf.mean(axis=0), trained)

    given = (variables, images, labels, jax.random.key(2))
    run, seconds = harness.compiled(train, *given)
    return Contender(
        lambda: jax.block_until_ready(run(*given)),
        num_clients * num_steps * case.batch_size,
        seconds,
    )


def make_torch(name: str, num_clients: int, num_steps: int) -> Contender:
    """Train client by client in PyTorch, on all cores."""
    import copy

    import torch

    case = networks.CASES[name]
    start = networks.plain_torch(name)
    raw_images, raw_labels = networks.examples(case)
    images = torch.from_numpy(raw_images.transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(raw_labels).long()
    loss_fn = torch.nn.CrossEntropyLoss()

    def work():
        for client in range(num_clients):
            network = copy.deepcopy(start)
            optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
            order = torch.randperm(
                NUM_EXAMPLES, generator=torch.Generator().manual_seed(client)
            ).repeat(2)
            for step in range(num_steps):
                first = step * case.batch_size % NUM_EXAMPLES
                rows = order[first : first + case.batch_size]
                optimizer.zero_grad()
                loss_fn(network(images[rows].float() / 255), labels[rows]).backward()
                optimizer.step()

    return Contender(work, num_clients * num_steps * case.batch_size)


def contest(name: str, *, threads: int, quick: bool, rivals: Sequence[str]) -> Any:
    """Measure one network; timings by contender."""
    num_steps = networks.CASES[name].num_steps
    num_steps = max(1, num_steps // 2) if quick else num_steps
    contenders = {OURS: make_ours(name, threads, num_steps)}
    if TORCH in rivals:
        contenders[TORCH] = make_torch(name, threads, num_steps)
    if LOOP in rivals:
        contenders[LOOP] = make_loop(name, threads, num_steps)
    timings = harness.compete(contenders, repeats=5 if quick else 7)
    if OBVIOUS in rivals:  # so slow that it gets few steps, and its turn at the end
        obvious = make_obvious(name, threads, 2 if num_steps > 1 else 1)
        timings |= harness.compete({OBVIOUS: obvious}, repeats=1 if quick else 3)
    return timings


def rivals_among(chosen: Sequence[str] | None) -> list[str]:
    """List whom to measure against, all by default; says so if PyTorch is missing."""
    rivals = harness.names(chosen, [TORCH, LOOP, OBVIOUS])
    if TORCH in rivals:
        try:
            import torch  # noqa: F401
        except ImportError:
            print("PyTorch is not installed (pip install -e '.[torch]'): its loop is left out.")
            rivals.remove(TORCH)
    return rivals


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.local_training",
        description="Local training on CPU: fedjaxprune against three other ways.",
    )
    parser.add_argument("--threads", type=int, default=2, help="cores, and clients (2)")
    parser.add_argument("--only", action="append", metavar="NETWORK", help="one of the networks")
    parser.add_argument("--against", action="append", metavar="RIVAL", help="one of the rivals")
    parser.add_argument("--quick", action="store_true", help="short and few repeats: noisy")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}.")
    chosen = harness.names(options.only, list(networks.CASES))
    harness.bind(options.threads)
    rivals = rivals_among(options.against)
    if TORCH in rivals:
        import torch

        torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"threads": options.threads, "machine": harness.machine(), "cases": {}}
    print(f"examples per second, median (least to most); {result['machine']}")
    for name in chosen:
        timings = contest(name, threads=options.threads, quick=options.quick, rivals=rivals)
        result["cases"][name] = harness.as_json(timings)
        print(harness.line(name, OURS, timings, TARGETS[name]), flush=True)
    harness.write(options.json, result)


if __name__ == "__main__":
    main()
