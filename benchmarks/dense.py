"""A small dense layer over clients: one step of local training, XLA's product against ours.

Each step computes output, input's gradient and kernel's gradient and moves the kernel, for some
clients under ``vmap``, many steps in one call on all cores; microseconds a step.

    python -m benchmarks.dense [--threads 2] [--json FILE]
"""

import argparse
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks import harness
from benchmarks.harness import Contender

CLIENTS, BATCHES = (1, 10), (8, 16, 32, 64)
KERNELS = ((64, 32), (32, 10), (84, 10), (64, 200), (120, 84), (200, 100), (400, 120))
OURS, XLA = "dense.dot_general", "lax.dot_general"
NUM_STEPS = 200


def make(product: Any, num_clients: int, batch: int, kernel: tuple[int, int]) -> Contender:
    """Train one dense layer of each client towards zero."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    dimensions = (((1,), (0,)), ((), ()))

    def step(x, weights):
        def loss(x, weights):
            return jnp.sum(jnp.square(product(x, weights, dimensions))) / batch

        to_x, to_weights = jax.grad(loss, argnums=(0, 1))(x, weights)
        return x - 1e-3 * to_x, weights - 1e-3 * to_weights

    def many(x, weights):
        def all_clients(carry, _):
            return jax.vmap(step)(*carry), None

        return lax.scan(all_clients, (x, weights), length=NUM_STEPS)[0]

    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (num_clients, batch, kernel[0]))
    weights = jax.random.normal(keys[1], (num_clients, *kernel))
    run, seconds = harness.compiled(many, x, weights)
    return Contender(lambda: jax.block_until_ready(run(x, weights)), NUM_STEPS, seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dense", description="Small dense layers over clients."
    )
    parser.add_argument("--threads", type=int, default=2, help="cores (2)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}.")
    harness.bind(options.threads)
    from jax import lax

    from fedjaxprune.kernels import dense

    result: dict[str, Any] = {"threads": options.threads, "machine": harness.machine(), "cases": {}}
    print(f"microseconds a step, median; {result['machine']}")
    for num_clients, kernel, batch in itertools.product(CLIENTS, KERNELS, BATCHES):
        name = f"{num_clients} x [{batch}, {kernel[0]}] x {list(kernel)}"
        contenders = {
            OURS: make(dense.dot_general, num_clients, batch, kernel),
            XLA: make(lax.dot_general, num_clients, batch, kernel),
        }
        timings = harness.compete(contenders, repeats=7)
        result["cases"][name] = harness.as_json(timings)
        ours, theirs = (1e6 / timings[one].median for one in (OURS, XLA))
        print(f"{name}: ours {ours:.1f}, XLA {theirs:.1f}: {theirs / ours:.2f}", flush=True)
    harness.write(options.json, result)


if __name__ == "__main__":
    main()
