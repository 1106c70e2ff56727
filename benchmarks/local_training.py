"""Local training on CPU: examples per second of fedjaxprune's models against a plain PyTorch loop.

Both sides train the same network with the same batch size, threads and plain SGD on images stored
as uint8; the repeats alternate, and each side is warmed up first. Ours is one client's work as a
round does it: shuffled, gathered, masked, with a dynamic number of steps. The process is bound to
as many cores as it has threads, since XLA sizes its thread pool by them.

    python -m benchmarks.local_training [--threads 1] [--quick] [--json FILE]

PyTorch is an extra: ``pip install -e '.[torch]'``.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

IMAGE = (28, 28, 1)
NUM_CLASSES = 10
NUM_EXAMPLES = 2048
LEARNING_RATE = 0.01
NETWORKS = {"lenet5": (128, 60), "cnn": (32, 25)}  # name -> batch size, steps per repeat

Run = Callable[[int], None]  # train so many steps, to the end


def make_examples() -> tuple[Any, Any]:
    import numpy as np

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (NUM_EXAMPLES, *IMAGE), dtype=np.uint8)
    return images, generator.integers(0, NUM_CLASSES, NUM_EXAMPLES, dtype=np.int32)


def make_ours(name: str, batch_size: int) -> tuple[Run, float]:
    """Compile one client's local work; give a runner and the seconds that compiling took."""
    import jax
    import jax.numpy as jnp
    import optax

    from fedjaxprune import masks
    from fedjaxprune.base import Broadcast, ClientData
    from fedjaxprune.data import batching, preprocess
    from fedjaxprune.federated import clients
    from fedjaxprune.models import zoo

    model = getattr(zoo, name)(input_shape=IMAGE, num_classes=NUM_CLASSES)
    params, model_state = jax.jit(model.init)(jax.random.key(0))
    images, labels = jax.tree.map(jnp.asarray, make_examples())
    client = clients.local_sgd(
        model.loss,
        batcher=batching.epochs(
            num_epochs=1, batch_size=batch_size, preprocess=preprocess.scale(max_value=255.0)
        ),
        optimizer=optax.sgd(LEARNING_RATE),
    )
    broadcast = Broadcast(params, masks.full(params), model_state, jnp.int32(0))
    examples = {"inputs": images, "labels": labels}
    order = jnp.arange(100 * NUM_EXAMPLES, dtype=jnp.int32) % NUM_EXAMPLES

    def train(broadcast, examples, order, size, key):
        data = ClientData(examples=examples, order=order, start=jnp.int32(0), size=size)
        message, _ = client.update(key, broadcast, (), data)
        return message.fields["delta"]

    given = (broadcast, examples, order)
    begin = time.perf_counter()
    compiled = jax.jit(train).lower(*given, jnp.int32(1), jax.random.key(2)).compile()
    seconds = time.perf_counter() - begin

    def run(num_steps: int) -> None:
        size = jnp.int32(num_steps * batch_size)
        jax.block_until_ready(compiled(*given, size, jax.random.key(2)))

    return run, seconds


def make_torch(name: str, batch_size: int) -> Run:
    import torch
    from torch import nn

    padding, channels, hidden = {
        "lenet5": ((2, 0), (6, 16), (400, 120, 84)),
        "cnn": ((2, 2), (32, 64), (3136, 512)),
    }[name]
    layers: list[nn.Module] = []
    for i in range(2):
        in_channels = IMAGE[-1] if i == 0 else channels[0]
        layers.append(nn.Conv2d(in_channels, channels[i], 5, padding=padding[i]))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    layers.append(nn.Flatten())
    for i in range(1, len(hidden)):
        layers += [nn.Linear(hidden[i - 1], hidden[i]), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(hidden[-1], NUM_CLASSES))
    optimiser = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
    loss_fn = nn.CrossEntropyLoss()
    raw_images, raw_labels = make_examples()
    images = torch.from_numpy(raw_images.transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(raw_labels).long()
    order = torch.randperm(NUM_EXAMPLES, generator=torch.Generator().manual_seed(1))

    def run(num_steps: int) -> None:
        for step in range(num_steps):
            first = (step * batch_size) % NUM_EXAMPLES
            rows = order[first : first + batch_size]
            optimiser.zero_grad()
            loss_fn(network(images[rows].float() / 255), labels[rows]).backward()
            optimiser.step()

    return run


def measure(runs: dict[str, Run], num_steps: int, repeats: int) -> dict[str, list[float]]:
    """Time every runner `repeats` times, in turns: seconds per repeat."""
    seconds: dict[str, list[float]] = {side: [] for side in runs}
    for run in runs.values():
        run(max(2, num_steps // 4))
    for _ in range(repeats):
        for side, run in runs.items():
            time.sleep(0.05)  # let the other side's idle threads stop spinning
            begin = time.perf_counter()
            run(num_steps)
            seconds[side].append(time.perf_counter() - begin)
    return seconds


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.local_training",
        description="Local training on CPU: fedjaxprune against a plain PyTorch loop.",
    )
    parser.add_argument("--threads", type=int, default=2, help="cores for either side (2)")
    parser.add_argument("--repeats", type=int, default=9, help="timed repeats of each side (9)")
    parser.add_argument("--quick", action="store_true", help="3 short repeats: seconds, but noisy")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(arguments)
    for field in ("threads", "repeats"):
        if getattr(options, field) < 1:
            parser.error(f"--{field} must be at least 1, got {getattr(options, field)}.")
    return options


def bind(threads: int) -> None:
    """Bind the process to so many cores; must come before JAX and PyTorch start their threads."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < threads:
            sys.exit(f"--threads {threads} needs as many cores, but there are {len(cores)}.")
        os.sched_setaffinity(0, cores[-threads:])


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    bind(options.threads)
    try:
        import torch
    except ImportError:
        sys.exit("This benchmark needs PyTorch: pip install -e '.[torch]'")
    import jax

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "threads": options.threads,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "torch": torch.__version__,
        "networks": {},
    }
    print(
        f"Python {result['python']}, JAX {result['jax']} (jaxlib {result['jaxlib']}), "
        f"PyTorch {result['torch']}, {options.threads} thread(s); examples per second, "
        "median (least to most)"
    )
    print(f"{'network':8} {'B':>4}  {'fedjaxprune':>24}  {'PyTorch':>24}  ratio  compile s")
    for name, (batch_size, num_steps) in NETWORKS.items():
        repeats = 3 if options.quick else options.repeats
        num_steps = max(3, num_steps // 6) if options.quick else num_steps
        ours, compile_seconds = make_ours(name, batch_size)
        runs = {"ours": ours, "torch": make_torch(name, batch_size)}
        seconds = measure(runs, num_steps, repeats)
        rates = {
            side: [num_steps * batch_size / one for one in times] for side, times in seconds.items()
        }
        medians = {side: statistics.median(rate) for side, rate in rates.items()}
        ratio = medians["ours"] / medians["torch"]
        result["networks"][name] = {
            "batch_size": batch_size,
            "examples_per_second": rates,
            "median": medians,
            "ratio": ratio,
            "compile_s": compile_seconds,
        }
        cells = [
            f"{medians[side]:>8,.0f} ({min(rate):,.0f} to {max(rate):,.0f})"
            for side, rate in rates.items()
        ]
        print(
            f"{name:8} {batch_size:>4}  {cells[0]:>24}  {cells[1]:>24}  {ratio:>5.2f}  "
            f"{compile_seconds:>9.1f}"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
