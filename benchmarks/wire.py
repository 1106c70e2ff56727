"""Time the wire format on ResNet-18 at sparsity 0.9, on one core.

    python benchmarks/wire.py

The rate is of dense input: bytes of the float32 parameters by the time to encode or decode them.
"""

import time

import jax
import numpy as np

from fedjaxprune import masks, models, trees
from fedjaxprune.wire import format as wire_format

REPEATS = 7


def best_of(function):
    """Give the shortest time of several runs in seconds, and the result."""
    result = function()  # also warms up
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times), result


def main(*, sparsity=0.9, seed=0):
    """Print a line for each kind of message."""
    init = models.resnet18(input_shape=(32, 32, 3), num_classes=10, norm="batch").init
    shapes, _ = jax.eval_shape(init, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    flags = masks.prunable_leaves(shapes, masks.is_kernel)
    leaves = jax.tree.leaves(shapes)
    paths = trees.paths(shapes)
    values, live = {}, {}
    for path, leaf, flag in zip(paths, leaves, flags, strict=True):
        values[path] = rng.standard_normal(leaf.shape, np.float32)
        live[path] = rng.random(leaf.shape) >= (sparsity if flag else 0.0)
        values[path][~live[path]] = 0.0
    num_bytes = sum(leaf.nbytes for leaf in values.values())
    messages = {
        "values and positions": values,
        "values under known masks": {p: wire_format.kept(values[p], live[p]) for p in paths},
        "masks": live,
        "top-k pairs": {p: wire_format.pairs(values[p], live[p]) for p in paths},
    }
    print(f"dense: {num_bytes:,} bytes")
    for name, message in messages.items():
        encoding, data = best_of(lambda message=message: wire_format.encode(message))
        decoding, _ = best_of(lambda data=data: wire_format.decode(data, known=live))
        counting, _ = best_of(lambda message=message: wire_format.num_bits(message))
        rates = [num_bytes / seconds / 1e6 for seconds in (encoding, decoding)]
        print(
            f"{name}: {len(data):,} bytes, encode {rates[0]:,.0f} MB/s, decode {rates[1]:,.0f} "
            f"MB/s, num_bits {1e3 * counting:.1f} ms"
        )


if __name__ == "__main__":
    main()
