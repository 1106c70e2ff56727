"""The forms of a convolution, by shape: processor time of each, in a loop, on one core.

Processor time and not wall time, so that other work on the machine disturbs it little. For every
shape the forward pass (the input's gradient is one too) and the kernel's gradient, each as XLA's
plain sums and Winograd's way, and for a stride the gradients as XLA derives them.

    python -m benchmarks.convolutions [--only groups] [--json FILE]
"""

import argparse
import functools
import pathlib
import resource
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import harness

LAYOUT = ("NHWC", "HWIO", "NHWC")
SHAPES = [
    # batch, side, channels in and out, taps, stride, groups
    (32, 14, 32, 64, 5, 1, 1),  # the CNN's second layer
    (64, 32, 64, 64, 3, 1, 1),  # ResNet-18
    (64, 16, 128, 128, 3, 1, 1),
    (64, 8, 256, 256, 3, 1, 1),
    (64, 4, 512, 512, 3, 1, 1),
    (64, 32, 64, 128, 3, 2, 1),
    (64, 16, 128, 256, 3, 2, 1),
    (64, 8, 256, 512, 3, 2, 1),
    (32, 32, 16, 16, 3, 1, 1),  # ResNet-20
    (32, 16, 32, 32, 3, 1, 1),
    (32, 8, 64, 64, 3, 1, 1),
    (32, 32, 16, 32, 3, 2, 1),
    (32, 32, 32, 32, 3, 1, 32),  # depthwise
    (32, 16, 128, 128, 3, 1, 128),
    (32, 16, 128, 128, 3, 2, 128),
    (32, 16, 64, 64, 5, 1, 64),
    (32, 16, 64, 64, 3, 1, 4),
    (32, 8, 128, 128, 3, 1, 32),
]


def forms(taps: int, stride: int, groups: int) -> dict[str, Callable[..., Any]]:
    """Name the ways to compute each direction from images, kernel and cotangent."""
    import jax
    from jax import lax

    from fedjaxprune.kernels import convolution, winograd

    half = taps // 2
    pads, strides = ((half, half), (half, half)), (stride, stride)

    def plain(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, strides, pads, dimension_numbers=LAYOUT, feature_group_count=groups
        )

    def ours(x, kernel):
        return convolution.conv(x, kernel, strides=strides, padding=pads, groups=groups)

    def gradient(function, argument):
        return lambda x, kernel, cotangent: jax.vjp(function, x, kernel)[1](cotangent)[argument]

    found = {
        "forward, XLA": lambda x, kernel, cotangent: plain(x, kernel),
        "forward, ours": lambda x, kernel, cotangent: ours(x, kernel),
        "input gradient, XLA": gradient(plain, 0),
        "input gradient, ours": gradient(ours, 0),
        "kernel gradient, XLA": gradient(plain, 1),
        "kernel gradient, ours": gradient(ours, 1),
    }
    if stride == groups == 1:
        found["forward, Winograd"] = lambda x, kernel, _: winograd.convolve(x, kernel, pads)
        found["kernel gradient, Winograd"] = lambda x, _, cotangent: winograd.kernel_gradient(
            x, cotangent, taps, pads
        )
    return found


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(function: Any, operands: tuple[Any, ...], gflop: float) -> tuple[float, float]:
    """Give the milliseconds of a call, inside a loop, and the seconds that compiling it took."""
    import jax
    import jax.numpy as jnp

    def loop(count, operands):
        def body(_, carry):
            operands, total = carry
            result = function(*operands)
            # Everything changes a little, so that nothing can be taken out of the loop.
            small = 1e-12 * result.ravel()[0]
            return tuple(operand + small for operand in operands), total + jnp.max(result)

        return jax.lax.fori_loop(0, count, body, (operands, jnp.float32(0)))[1]

    run, seconds = harness.compiled(loop, jnp.int32(1), operands)
    begin = processor_seconds()
    jax.block_until_ready(run(jnp.int32(1), operands))
    best = processor_seconds() - begin
    if best > 0.5:  # XLA's own gradients take seconds
        return 1e3 * best, seconds
    count = max(2, int(4 / gflop))
    for _ in range(3):
        begin = processor_seconds()
        jax.block_until_ready(run(jnp.int32(count), operands))
        best = min(best, (processor_seconds() - begin) / count)
    return 1e3 * best, seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convolutions", description="The forms of a convolution on CPU."
    )
    parser.add_argument("--only", metavar="TEXT", help="shapes with this in their name")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(arguments)
    harness.bind(1)
    import jax

    result: dict[str, Any] = {"machine": harness.machine(), "shapes": []}
    print(f"ms of one core, and GFLOP/s of the plain sums; {result['machine']}")
    for batch, side, channels, features, taps, stride, groups in SHAPES:
        name = f"{batch}x{side}x{side}x{channels} to {features}, {taps}x{taps} stride {stride}"
        name += "" if groups == 1 else f", {groups} groups"
        if options.only and options.only not in name:
            continue
        keys = jax.random.split(jax.random.key(0), 3)
        operands = tuple(
            map(
                functools.partial(jax.random.normal),
                keys,
                [
                    (batch, side, side, channels),
                    (taps, taps, channels // groups, features),
                    (batch, side // stride, side // stride, features),
                ],
            )
        )
        gflop = 2 * batch * (side // stride) ** 2 * taps**2 * channels // groups * features / 1e9
        row: dict[str, Any] = {"shape": name, "gflop": gflop}
        for form, function in forms(taps, stride, groups).items():
            milliseconds, compile_s = measure(function, operands, gflop)
            row[form] = {"ms": milliseconds, "compile_s": compile_s}
        result["shapes"].append(row)
        cells = [
            f"{form} {cell['ms']:.2f} ({1e3 * gflop / cell['ms']:.0f})"
            for form, cell in row.items()
            if isinstance(cell, dict)
        ]
        print(f"{name}: {'; '.join(cells)}", flush=True)
    harness.write(options.json, result)


if __name__ == "__main__":
    main()
