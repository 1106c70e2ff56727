"""What one GPU or TPU does with local training: how much of its ceiling, by which form and chunk.

- *sweep*: a cohort of the CNN and of ResNet-18 as a round trains it, by the number of clients that
  train at once and by the way in which they are convolved (`execution.convolutions`): examples per
  second, the share of the measured ceiling of a large float32 matrix product, and the most memory
  that the process had on the device so far.
- *selection*: the exact k largest of 23 million magnitudes against sorting them.

    python -m benchmarks.accelerator [--quick] [--minutes 9] [--only cnn] [--json FILE]

It stops in time: a case that would begin after ``--minutes`` is left out, and said so. Of several
accelerators only the first is used. ``--quick`` takes one small case of each kind and a minute on a
CPU, where all ways are one.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks import harness, local_training, networks, rounds
from benchmarks.harness import Contender

NETWORKS = ("cnn", "resnet18")
CHUNKS = (1, 4, 16, 64)
NUM_STEPS = {"cnn": 20, "resnet18": 4}
CASES = (*NETWORKS, "selection")


class Row(NamedTuple):
    """One case of the sweep.

    Attributes:
      network: its name.
      chunk: clients that train at once.
      way: how they are convolved.
      rate: examples per second, the median; None if it does not fit in memory.
      share: of the ceiling of a matrix product.
      compile_s: seconds that compiling took.
      peak_bytes: the most memory so far; None where the device does not tell.
    """

    network: str
    chunk: int
    way: str
    rate: float | None
    share: float | None
    compile_s: float | None
    peak_bytes: int | None


def plan(
    names: Sequence[str], *, chunks: Sequence[int], is_cpu: bool
) -> Iterator[tuple[str, int, Any]]:
    """List what the sweep tries; small chunks first, as what they need of memory is the least."""
    from fedjaxprune.kernels import side_by_side

    for name in names:
        for chunk in chunks:
            is_one = chunk == 1 or is_cpu  # then all ways are one program
            for way in (side_by_side.DEFAULT,) if is_one else side_by_side.WAYS:
                yield name, chunk, way


def measure(
    name: str, chunk: int, way: Any, *, ceiling: float, num_steps: int, repeats: int
) -> Row:
    """Time one case; `ceiling` is in GFLOP/s."""
    import jax

    from fedjaxprune.models import ways

    model = ways.convolve(networks.ours(name), way)
    try:
        work = local_training.make_ours(name, chunk, num_steps, model=model, chunk_size=chunk)
        timing = harness.compete({name: work}, repeats=repeats)[name]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Row(name, chunk, way, None, None, None, _peak())
    share = timing.median * networks.training_flops(name) / (ceiling * 1e9)
    return Row(name, chunk, way, timing.median, share, timing.compile_s, _peak())


def _peak() -> int | None:
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def selection(size: int) -> dict[str, Contender]:
    """Make the contenders of the selection, among so many scores."""
    import jax
    import jax.numpy as jnp

    from fedjaxprune.pruning import selection

    if size == rounds.SELECTED_AMONG:
        return rounds.selection_against_sorting(None)
    scores = jnp.abs(jax.random.normal(jax.random.key(0), [size]))
    count = jnp.int32(size // 100)
    select, select_s = harness.compiled(selection.top_k, scores, count)
    run = functools.partial(_wait, select, scores, count)
    return {rounds.OURS["selection"]: Contender(run, 1.0, select_s)}


def _wait(function: Any, *arguments: Any) -> None:
    import jax

    jax.block_until_ready(function(*arguments))


def line(row: Row) -> str:
    """Write a case as a line of text."""
    what = f"{row.network:10} {row.chunk:>3} at once  {row.way:11}"
    memory = "" if row.peak_bytes is None else f"  peak {row.peak_bytes / 2**20:,.0f} MiB"
    if row.rate is None or row.share is None:
        return f"{what} does not fit in memory{memory}"
    compiled = f"compile {row.compile_s:.1f} s"
    return f"{what} {row.rate:>12,.0f} examples/s {row.share:>6.1%}  {compiled}{memory}"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do all that fits in the time."""
    import jax

    begin = time.monotonic()
    is_cpu = jax.default_backend() == "cpu"
    chosen = harness.names(options.only, CASES)
    if options.quick:
        chosen = [name for name in chosen if name != "resnet18"]
    with jax.default_device(jax.devices()[0]):
        ceilings = harness.ceilings()
        ceiling = ceilings["matrix_product_gflops"]
        print(f"{harness.machine()['devices']}: a matrix product runs at {ceiling:,.0f} GFLOP/s")
        rows, left_out = [], []
        swept = [name for name in chosen if name in NETWORKS]
        for case in plan(swept, chunks=(1, 2) if options.quick else CHUNKS, is_cpu=is_cpu):
            if time.monotonic() - begin > 60 * options.minutes:
                left_out.append(" ".join(map(str, case)))
                continue
            steps = 1 if options.quick else NUM_STEPS[case[0]]
            repeats = 2 if options.quick else 5
            row = measure(*case, ceiling=ceiling, num_steps=steps, repeats=repeats)
            rows.append(row)
            print(line(row), flush=True)
        timings = {}
        if "selection" in chosen and time.monotonic() - begin <= 60 * options.minutes:
            among = 10**6 if options.quick else rounds.SELECTED_AMONG
            timings = harness.compete(selection(among), repeats=2 if options.quick else 5)
            print(harness.line("selection", rounds.OURS["selection"], timings, {}))
        elif "selection" in chosen:
            left_out.append("selection")
    if left_out:
        print(f"left out after {options.minutes:g} minutes: {', '.join(left_out)}.")
    return {
        "machine": harness.machine(),
        "ceilings": ceilings,
        "sweep": [row._asdict() for row in rows],
        "selection": harness.as_json(timings),
        "left_out": left_out,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a minute on a CPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case begins later")
    parser.add_argument("--only", action="append", help=f"one of {', '.join(CASES)}")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures there")
    options = parser.parse_args(arguments)
    harness.write(options.json, run(options))


if __name__ == "__main__":
    main()
