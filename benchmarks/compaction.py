"""A pruned network and the smaller one that compaction makes of it: speed, size, difference.

Every channel group loses half of its channels (the filters of the smallest norm), filters alone are
masked, and the BatchNorm statistics and biases are drawn, so that every dead channel still sends a
constant that has to be folded. Both networks predict the same images in the same process, in turns.

    python -m benchmarks.compaction [--threads N] [--batch N] [--repeats N] [--json FILE] [CASE ...]
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import harness

CASES = {
    "resnet18": ((32, 32, 3), 100, {"norm": "batch"}),
    "cnn": ((28, 28, 1), 10, {}),
    "lenet5": ((28, 28, 1), 10, {}),
}
SPARSITY = 0.5  # of channels
TARGET_SPEED, TARGET_SIZE = {"resnet18": 2.5}, {"resnet18": 3.5}


def prepare(name: str, batch: int) -> tuple[Any, ...]:
    """Make a network, its parameters, masks and state, and images."""
    import jax
    import jax.numpy as jnp

    from fedjaxprune import masks as masks_lib
    from fedjaxprune import models
    from fedjaxprune.structure.channels import groups

    image, num_classes, options = CASES[name]
    model = getattr(models, name)(input_shape=image, num_classes=num_classes, **options)
    params, state = jax.jit(model.init)(jax.random.key(0))

    def drawn(number: int, leaf: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(1), number)
        return leaf + 0.1 * jnp.abs(jax.random.normal(key, leaf.shape)) if leaf.ndim == 1 else leaf

    leaves, treedef = jax.tree.flatten((params, state))
    params, state = jax.tree.unflatten(treedef, [drawn(*pair) for pair in enumerate(leaves)])
    images = jax.random.normal(jax.random.key(2), (batch, *image))
    found = groups.analyze(model.predict, params, state, images)
    keep = []
    for group in found.groups:
        order = jnp.argsort(groups.norms(params, group, order=2))
        keep.append(jnp.ones(group.size, bool).at[order[: round(SPARSITY * group.size)]].set(False))
    masks = groups.to_masks(found.groups, keep, params, drop_inputs=False)
    return model, params, masks_lib.restrict(masks, masks_lib.is_kernel), state, images


def caller(function: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
    import jax

    return lambda: jax.block_until_ready(function(*arguments))


def compare(name: str, batch: int, repeats: int) -> dict[str, Any]:
    """Time both networks, and compare their outputs and files."""
    import jax
    import jax.numpy as jnp

    from fedjaxprune import masks as masks_lib
    from fedjaxprune.structure.compaction import compact

    model, params, masks, state, images = prepare(name, batch)
    begin = time.perf_counter()
    small = compact.compact(model, params, masks, state=state, inputs=images)
    compact_s = time.perf_counter() - begin
    pruned = masks_lib.apply(masks, params)
    masked = (pruned, state, images)
    fewer = (small.params, small.state, images)
    run, run_s = harness.compiled(model.predict, *masked)
    run_small, run_small_s = harness.compiled(small.predict, *fewer)
    expected, found = run(*masked), run_small(*fewer)
    timings = harness.compete(
        {
            "masked": harness.Contender(caller(run, *masked), batch, run_s),
            "compacted": harness.Contender(caller(run_small, *fewer), batch, run_small_s),
        },
        repeats=repeats,
    )
    files = [file_bytes((params, state)), file_bytes((small.params, small.state))]
    difference = jnp.max(jnp.abs(expected - found)) / jnp.max(jnp.abs(expected))
    return {
        "timings": harness.as_json(timings),
        "line": harness.line(
            f"{name}, images/s", "compacted", timings, {"masked": TARGET_SPEED.get(name, 1.0)}
        ),
        "file_bytes": files,
        "file_ratio": files[0] / files[1],
        "relative_difference": float(difference),
        "compact_s": compact_s,
        "num_values": [
            sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (masked[:2], fewer[:2])
        ],
    }


def file_bytes(tree: Any) -> int:
    """Write a tree's arrays as they are, and give the length of the file."""
    import jax
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "arrays.npz"
        np.savez(path, **{f"{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(tree))})  # pyright: ignore[reportArgumentType]
        return path.stat().st_size


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compaction", description="Masked against compacted networks."
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--threads", type=int, default=2, help="cores (default: 2)")
    parser.add_argument("--batch", type=int, default=64, help="images at once (default: 64)")
    parser.add_argument("--repeats", type=int, default=7, help="timings of each (default: 7)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(arguments)
    harness.bind(options.threads)
    result: dict[str, Any] = {"machine": harness.machine(), "sparsity": SPARSITY, "cases": {}}
    print(f"half of all channels pruned; {result['machine']}")
    for name in harness.names(options.cases, list(CASES)):
        found = result["cases"][name] = compare(name, options.batch, options.repeats)
        target = TARGET_SIZE.get(name)
        print(found.pop("line"))
        print(
            f"{name}: the file is {found['file_ratio']:.2f} times smaller"
            f"{'' if target is None else f' (target {target:g})'}, "
            f"largest relative difference {found['relative_difference']:.1e}, "
            f"compacted in {found['compact_s']:.1f} s",
            flush=True,
        )
    harness.write(options.json, result)


if __name__ == "__main__":
    main()
