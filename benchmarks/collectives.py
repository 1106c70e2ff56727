"""What devices tell one another in a compiled round: collectives, counted, and their bytes.

A FedAvg round of an MLP is compiled for meshes of CPU devices and not run. Bytes are those that one
device is sent. Next to them is what docs/lab/performance.md predicts from the number of parameters.

    python -m benchmarks.collectives [--devices 2 --devices 4] [--clients 1000] [--cohort-size 16]
        [--rows] [--json FILE]

``--rows`` lets each client keep a residual of error feedback.
"""

import argparse
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import harness

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}
_OPERATION = re.compile(rf" = (.+?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


def count(text: str) -> dict[str, tuple[int, int]]:
    """Count the collectives of a compiled program and the bytes of what they give: by their kind.

    One in a loop counts once. A start that repeats its operands beside its result counts both.
    """
    found: dict[str, tuple[int, int]] = {}
    for what, kind in _OPERATION.findall(text):
        size = sum(
            _BYTES[name] * math.prod(int(n) for n in shape.split(",") if n)
            for name, shape in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", what))
        )
        number, total = found.get(kind, (0, 0))
        found[kind] = number + 1, total + size
    return found


def round_of(num_devices: int, *, clients: int, cohort_size: int, rows: bool) -> Mapping[str, Any]:
    """Compile a round for so many devices, and count."""
    import jax
    import jax.numpy as jnp
    import optax

    from fedjaxprune import models, trees
    from fedjaxprune.data import batching, transforms
    from fedjaxprune.federated import cohort, sampling, uplinks
    from fedjaxprune.methods import fedavg
    from fedjaxprune.rounds import facts, simulation, task
    from fedjaxprune.rounds.protocol import Protocol
    from fedjaxprune.types import Population

    mesh = cohort.make_mesh(devices=jax.devices()[:num_devices])
    uplink = uplinks.top_k(fraction=0.1)
    setup = Protocol(
        num_rounds=1,
        batcher=batching.steps(
            num_steps=1, batch_size=8, preprocess=transforms.scale(max_value=1.0)
        ),
        optimizer=optax.sgd(0.1),
        mesh=mesh,
        uplink=uplinks.error_feedback(uplink) if rows else uplinks.identity(),
    )
    model = models.mlp(input_shape=(64,), num_classes=10, hidden_sizes=(32,))
    given = task.make(model, setup, inputs=facts.float_inputs((64,)))
    algorithm = fedavg.build(fedavg.FedAvg(), given)
    sample = sampling.uniform(num_clients=clients, cohort_size=cohort_size)
    advance = simulation.advance(algorithm.stages[0], sample)

    def start() -> Any:
        params, state = model.init(jax.random.key(0))
        return simulation.start(algorithm, params, state, num_clients=clients)

    def population() -> Population:
        total = 8 * clients
        return Population(
            examples={"inputs": jnp.zeros((total, 64)), "labels": jnp.zeros(total, jnp.int32)},
            order=jnp.arange(total, dtype=jnp.int32),
            offsets=8 * jnp.arange(clients + 1, dtype=jnp.int32),
        )

    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        jax.eval_shape(lambda: (jax.random.key(0), start(), population())),
    )
    text = jax.jit(advance).lower(*shapes).compile().as_text() or ""
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    return {"collectives": count(text), "parameters": sum(trees.sizes(params))}


def predicted(num_devices: int, parameters: int) -> int:
    """Predict the bytes that one device is sent to join the sums of all, of FedAvg's delta."""
    if num_devices & (num_devices - 1):
        return 4 * parameters * num_devices  # everybody's, its own among them
    return 4 * parameters * (num_devices.bit_length() - 1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--devices", type=int, action="append", help="meshes; default 2, 3, 4, 8")
    parser.add_argument("--clients", type=int, default=1000, help="clients in all")
    parser.add_argument("--cohort-size", type=int, default=16, help="clients of a round")
    parser.add_argument("--rows", action="store_true", help="clients keep a residual")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures there")
    options = parser.parse_args(arguments)
    import jax

    meshes = options.devices or [2, 3, 4, 8]
    jax.config.update("jax_num_cpu_devices", max(meshes))
    result: dict[str, Any] = {}
    for number in meshes:
        found = round_of(
            number, clients=options.clients, cohort_size=options.cohort_size, rows=options.rows
        )
        told = ", ".join(
            f"{times} {kind} of {size:,} bytes"
            for kind, (times, size) in sorted(found["collectives"].items())
        )
        expected = predicted(number, found["parameters"])
        print(f"{number} devices: {told or 'none'}; predicted for the delta {expected:,}.")
        result[str(number)] = {**found, "predicted": expected}
    harness.write(options.json, result)


if __name__ == "__main__":
    main()
