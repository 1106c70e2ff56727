"""Count the networks' multiply-adds, and set what papers say and XLA's own count beside them.

python -m benchmarks.flops --models lenet5 cnn resnet20    also compiles, and times the accounts
python -m benchmarks.flops --count-only                    traces only: every network of a paper
"""

import argparse
import time
import types

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import executed
from fedjaxprune import masks, metrics, models
from fedjaxprune.costs import flops
from fedjaxprune.experiment.run import round_costs
from fedjaxprune.models import gated, lstm, vgg
from fedjaxprune.structure import jaxprs
from fedjaxprune.types import Batch

GRAY, COLOUR = (28, 28, 1), (32, 32, 3)
MODELS = {
    "lenet5": (GRAY, lambda: models.lenet5(input_shape=GRAY, num_classes=10)),
    "cnn": (GRAY, lambda: models.cnn(input_shape=GRAY, num_classes=10)),
    "resnet20": (COLOUR, lambda: models.resnet20(input_shape=COLOUR, num_classes=10, norm="batch")),
    "resnet32": (COLOUR, lambda: models.resnet32(input_shape=COLOUR, num_classes=10, norm="batch")),
    "resnet18": (COLOUR, lambda: models.resnet18(input_shape=COLOUR, num_classes=10, norm="batch")),
}
BATCH = 8
HEAD = {"hidden_sizes": (4096, 4096), "pool": 7}  # torchvision's
# Networks that are only counted: to compile them takes minutes.
COUNTED = {
    "resnet34": (COLOUR, lambda: models.resnet34(input_shape=COLOUR, num_classes=10, norm="batch")),
    "resnet50": (COLOUR, lambda: models.resnet50(input_shape=COLOUR, num_classes=10, norm="batch")),
    "gated_resnet32": (
        COLOUR,
        lambda: gated.gated_resnet32(input_shape=COLOUR, num_classes=10, norm="batch", density=0.7),
    ),
    "alexnet": (COLOUR, lambda: models.alexnet(input_shape=COLOUR, num_classes=10)),
    "vgg11": (COLOUR, lambda: vgg.vgg11(input_shape=COLOUR, num_classes=10, norm="none")),
    "vgg11, torchvision's head": (
        COLOUR,
        lambda: vgg.vgg11(input_shape=COLOUR, num_classes=10, norm="none", **HEAD),
    ),
    "vgg16": (COLOUR, lambda: vgg.vgg16(input_shape=COLOUR, num_classes=10, norm="batch")),
    "two_cnn": (GRAY, lambda: models.two_cnn(input_shape=GRAY, num_classes=10)),
    "femnist_cnn": (GRAY, lambda: models.femnist_cnn(input_shape=GRAY, num_classes=62)),
    "char_lstm": ((80,), lambda: lstm.char_lstm(input_shape=(80,), num_classes=80)),
}
# Millions of multiply-adds, forward: FedTiny's ResNet-18; adaptive dynamic pruning's ResNets (of
# the gated one without its gates).
PUBLISHED = {"resnet18": 555.42, "resnet20": 40.55, "resnet32": 68.86, "gated_resnet32": 68.86}


def overhead(model, params, image, repeats=20):
    """Time what a run pays for its accounts: once, per round, and for coverage by weight."""
    begin = time.perf_counter()
    profile = round_costs.profile(
        model,
        params,
        np.zeros((1, *image), np.uint8),
        preprocess=lambda key, x: x.astype(jnp.float32),
        prunable=masks.is_kernel,
        warn=print,
    )
    once = time.perf_counter() - begin
    kept = np.array(profile.sizes) // 2
    reported = types.SimpleNamespace(
        num_uploaded=np.tile(kept, (20, 1)),
        num_downloaded=np.tile(kept, (20, 1, 1)),
        sent=types.SimpleNamespace(reports={}, up={"reply": {"delta": ()}}),
        participated=np.ones(20, bool),
        num_changed=0,
        train={"loss": metrics.Mean(total=np.float32(1), weight=np.float32(6000))},  # pyright: ignore[reportArgumentType]
    )
    begin = time.perf_counter()
    for _ in range(repeats):
        round_costs.of_round(profile, reported)  # pyright: ignore[reportArgumentType]
    per_round = (time.perf_counter() - begin) / repeats
    return f"{once:.2f} s once, {1e3 * per_round:.2f} ms a round"


def count():
    """Print the multiply-adds of every network, beside what papers say."""
    print("| network | forward | of which gates | published, million |")
    print("|---|---|---|---|")
    for name, (shape, make) in {**MODELS, **COUNTED}.items():
        dtype = jnp.int32 if name == "char_lstm" else jnp.float32
        layers = flops.of_model(make(), None, jax.ShapeDtypeStruct((1, *shape), dtype))
        of_gates = [layer for layer in layers if layer.path.endswith("gate_kernel")]
        counts = [flops.dense(some).forward for some in (layers, of_gates)]
        print(f"| {name} | {counts[0]:,} | {counts[1]:,} | {PUBLISHED.get(name, '')} |", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--count-only", action="store_true")
    options = parser.parse_args()
    if options.count_only:
        count()
        return
    print("multiply-adds of one example")
    print(
        "| network | forward | input gradient | weight gradient | forward without padding "
        "| XLA's FLOPs, forward | XLA's FLOPs, step | step as it runs |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in options.models:
        image, make = MODELS[name]
        model = make()
        params, state = jax.eval_shape(model.init, jax.random.key(0))
        batch = Batch(
            inputs=jax.ShapeDtypeStruct((BATCH, *image), jnp.float32),
            labels=jax.ShapeDtypeStruct((BATCH,), jnp.int32),  # pyright: ignore[reportArgumentType]
            weights=jax.ShapeDtypeStruct((BATCH,), jnp.float32),  # pyright: ignore[reportArgumentType]
        )

        def loss(params, state, batch, model=model):
            return model.loss(params, state, batch, jax.random.key(0))[0]

        layers = flops.of_model(model, None, batch)
        counts = [f"{count // BATCH:,}" for count in flops.dense(layers)]
        inside = sum(layer.inside for layer in layers)
        plain = jaxprs.plain(loss)
        _, step = executed.executed(jax.grad(plain), params, state, batch)
        _, fast = executed.executed(jax.grad(loss), params, state, batch)
        forward_ratio = executed.by_xla(plain, params, state, batch) / (2 * inside)
        step_ratio = executed.by_xla(jax.grad(plain), params, state, batch) / (2 * step)
        print(
            f"| {name} | {' | '.join(counts)} | {inside // BATCH:,} | {forward_ratio:.4f} of ours "
            f"| {step_ratio:.4f} of ours | {fast / step:.2f} of the plain form's |",
            flush=True,
        )
    for name in options.models:
        image, make = MODELS[name]
        model = make()
        params, _ = jax.eval_shape(model.init, jax.random.key(0))
        print(f"{name}: accounts take {overhead(model, params, image)}")


if __name__ == "__main__":
    main()
