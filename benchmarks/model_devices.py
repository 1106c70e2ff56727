"""Memory of a device where several share one model: a round of FedDIP with a transformer.

The round is compiled from shapes alone and never run: what it needs is XLA's own account of it,
arguments, outputs and temporaries of one device. Whole leaves that clients put together from their
parts are counted in the compiled program.

    python -m benchmarks.model_devices [--width 1024 --num-layers 4] [--json FILE]
"""

import argparse
import math
import pathlib
import re
from collections.abc import Collection, Sequence
from typing import Any

from benchmarks import harness

NUM_CLIENTS, BATCH_SIZE, LENGTH = 8, 4, 16
TARGET = 0.6  # of a device's memory without sharing
MIB = 2**20


def measure(*, width: int, num_layers: int, model_devices: int) -> dict[str, Any]:
    """Compile a round for four devices, of which so many share one model."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    from fedjaxprune import models
    from fedjaxprune.data import batching, transforms
    from fedjaxprune.federated import cohort, sampling
    from fedjaxprune.methods import feddip
    from fedjaxprune.rounds import placement, simulation, task
    from fedjaxprune.rounds.protocol import Protocol
    from fedjaxprune.types import Population

    mesh = cohort.make_mesh(devices=jax.devices()[:4], model_devices=model_devices)
    model = models.gpt(
        input_shape=(LENGTH,), num_classes=256, width=width, num_layers=num_layers, dropout=0.0
    )
    protocol = Protocol(
        num_rounds=4,
        batcher=batching.steps(num_steps=2, batch_size=BATCH_SIZE, preprocess=transforms.chain()),
        optimizer=optax.sgd(0.01),
        mesh=mesh,
    )
    inputs = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    algorithm = feddip.build(
        feddip.FedDIP(sparsity=0.9, prune_every=2), task.make(model, protocol, inputs=inputs)
    )

    def begin(key):
        return simulation.start(algorithm, *model.init(key), num_clients=NUM_CLIENTS)

    total = NUM_CLIENTS * BATCH_SIZE
    numbers = {"inputs": (total, LENGTH), "labels": (total,), "order": (total,)}
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in numbers.items()}
    offsets: Any = jax.ShapeDtypeStruct((NUM_CLIENTS + 1,), jnp.int32)
    order: Any = arrays.pop("order")
    population = Population(examples=arrays, order=order, offsets=offsets)
    now = jax.eval_shape(begin, jax.random.key(0))
    whole, where = NamedSharding(mesh, PartitionSpec()), placement.of_simulation(now, mesh)

    def placed(tree, places):
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            tree,
            places,
        )

    everywhere = placed((jax.random.key(1), population), whole_like((0, population), whole))
    draw = sampling.uniform(num_clients=NUM_CLIENTS, cohort_size=4)
    advance = simulation.advance(algorithm.stages[0], draw)
    step = jax.jit(advance, donate_argnums=1, out_shardings=(where, whole))
    compiled = step.lower(everywhere[0], placed(now, where), everywhere[1]).compile()
    held: Any = compiled.memory_analysis()
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(now.state.params)),
        "MiB": {
            "arguments": held.argument_size_in_bytes / MIB,
            "new outputs": (held.output_size_in_bytes - held.alias_size_in_bytes) / MIB,
            "temporaries": held.temp_size_in_bytes / MIB,
        },
        "gathered": gathered(
            compiled.as_text() or "",
            {leaf.shape for leaf in jax.tree.leaves(now.state.params)},
            smallest=placement.SMALLEST,
        ),
    }


def whole_like(tree: Any, place: Any) -> Any:
    """Give every leaf the same placement."""
    import jax

    return jax.tree.map(lambda _: place, tree)


def gathered(program: str, shapes: Collection[tuple[int, ...]], *, smallest: int) -> dict[str, int]:
    """Count the all-gathers of leaves of at least so many entries, where clients work and after."""
    counts = {"clients": 0, "server": 0}
    for line in program.splitlines():
        if found := re.search(r"\[([\d,]+)\]\S* all-gather(?:-start)?\(", line):
            shape = tuple(map(int, found[1].split(",")))
            if shape in shapes and math.prod(shape) >= smallest:
                counts["clients" if "shard_map" in line else "server"] += 1
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model_devices", description="Memory of devices that share."
    )
    parser.add_argument("--width", type=int, default=1024, help="of the transformer (1024)")
    parser.add_argument("--num-layers", type=int, default=4, help="blocks (4)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(arguments)
    import jax

    jax.config.update("jax_num_cpu_devices", 4)
    result: dict[str, Any] = {}
    for number in (1, 2):
        found = measure(width=options.width, num_layers=options.num_layers, model_devices=number)
        result[str(number)] = found
        parts = ", ".join(f"{name} {size:,.0f}" for name, size in found["MiB"].items())
        print(
            f"{found['parameters']:,} parameters, {number} devices a model: {parts} MiB a device; "
            f"leaves gathered: {found['gathered']}",
            flush=True,
        )
    one, two = (sum(result[name]["MiB"].values()) for name in ("1", "2"))
    print(f"{two / one:.3f} of the memory (target {TARGET:g} at most)")
    harness.write(options.json, result)


if __name__ == "__main__":
    main()
