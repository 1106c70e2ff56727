"""Moments of layers: what a local step costs that computes them, against a plain one.

Each call takes some steps of plain SGD in a loop, as a client does, and adds up the moments; ratios
of times, least against least.

    python -m benchmarks.moments [--threads 1] [--only lenet5] [--json FILE]
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import harness
from benchmarks.harness import Contender

LEARNING_RATE = 0.01
TARGET = 2.0  # times a plain step, with all kinds
PLAIN = "plain"
KINDS = {
    "without joint": ("inputs", "outputs", "rows"),
    "all": ("inputs", "outputs", "joint", "rows"),
}


class Case(NamedTuple):
    """A network and its batch."""

    options: dict[str, Any]
    batch_size: int
    num_steps: int
    num_classes: int = 10


CASES = {
    "mlp": Case({"input_shape": (28, 28, 1)}, 64, 50),
    "lenet5": Case({"input_shape": (28, 28, 1)}, 64, 10),
    "cnn": Case({"input_shape": (28, 28, 1)}, 32, 3),
    "resnet8": Case({"input_shape": (32, 32, 3), "norm": "batch"}, 32, 3),
    "char_lstm": Case({"input_shape": (20,), "hidden_sizes": (64,)}, 32, 5, 80),
}


def make(name: str, kinds: tuple[str, ...] | None) -> Contender:
    """Train with SGD, and add up these moments, if any."""
    import jax
    import jax.numpy as jnp

    from fedjaxprune import models
    from fedjaxprune.structure import moments
    from fedjaxprune.types import Batch

    case = CASES[name]
    model = getattr(models, name)(num_classes=case.num_classes, **case.options)
    params, state = jax.jit(model.init)(jax.random.key(0))
    shape = (case.batch_size, *case.options["input_shape"])
    key = jax.random.key(1)
    inputs = jax.random.normal(key, shape)
    if name == "char_lstm":
        inputs = jax.random.randint(key, shape, 0, case.num_classes)
    labels = jnp.arange(case.batch_size) % case.num_classes
    batch = Batch(inputs, labels, jnp.ones(case.batch_size))

    def plain(*given: Any) -> Any:
        return *jax.value_and_grad(model.loss, has_aux=True)(*given), ()

    gradient = plain
    if kinds is not None:
        gradient = moments.of_loss(
            model.loss,
            prunable=lambda path, leaf: path.endswith("kernel"),
            kinds=kinds,  # pyright: ignore[reportArgumentType]
        )

    def step(_: Any, carry: Any) -> Any:
        params, state, sums = carry
        (_, (state, _)), grads, more = gradient(params, state, batch, key)
        params = jax.tree.map(lambda w, g: w - LEARNING_RATE * g, params, grads)
        return params, state, jax.tree.map(jnp.add, sums, more)

    def many(params: Any, state: Any, batch: Batch) -> Any:
        shapes = jax.eval_shape(gradient, params, state, batch, key)[2]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.fori_loop(0, case.num_steps, step, (params, state, zeros))

    run, seconds = harness.compiled(many, params, state, batch)
    return Contender(
        lambda: jax.block_until_ready(run(params, state, batch)), case.num_steps, seconds
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.moments", description="A step with moments against a plain one."
    )
    parser.add_argument("--threads", type=int, default=1, help="cores (1)")
    parser.add_argument("--only", action="append", metavar="NETWORK", help="one of the networks")
    parser.add_argument("--repeats", type=int, default=7, help="how often each is timed (7)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}.")
    chosen = harness.names(options.only, list(CASES))
    harness.bind(options.threads)
    result: dict[str, Any] = {"threads": options.threads, "machine": harness.machine(), "cases": {}}
    print(f"milliseconds a step, least, and times a plain one (target {TARGET:g} with all kinds)")
    for name in chosen:
        contenders = {PLAIN: make(name, None)}
        contenders |= {kind: make(name, kinds) for kind, kinds in KINDS.items()}
        timings = harness.compete(contenders, repeats=options.repeats)
        result["cases"][name] = harness.as_json(timings)
        least = {kind: 1e3 / max(timing.rates) for kind, timing in timings.items()}
        ratios = (f"{kind} {ms:.2f} ({ms / least[PLAIN]:.2f})" for kind, ms in least.items())
        print(f"{name}: {', '.join(ratios)}", flush=True)
    harness.write(options.json, result)


if __name__ == "__main__":
    main()
