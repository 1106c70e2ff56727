"""What all benchmarks share: binding to cores, timing in alternation, ceilings, tables, JSON."""

import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Run = Callable[[], None]  # do the work once, to the end

PACKAGES = ("fedjaxprune", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "pfl")


class Contender(NamedTuple):
    """One way to do a case's work.

    Attributes:
      run: does the work once and waits for it.
      amount: how much of the case's unit (examples, rounds) one call does.
      compile_s: seconds that compiling took, apart; None where nothing is compiled.
      seconds: for a contender in another process: does the work and tells how long it took there;
        `run` is not called then.
    """

    run: Run
    amount: float
    compile_s: float | None = None
    seconds: Callable[[], float] | None = None


class Timing(NamedTuple):
    """How fast a contender was, in units per second, over its repeats."""

    rates: tuple[float, ...]
    compile_s: float | None

    @property
    def median(self) -> float:
        """The figure that is reported."""
        return statistics.median(self.rates)


def bind(threads: int) -> None:
    """Bind the process to so many cores, one XLA device each; call before JAX is first used."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < threads:
            raise SystemExit(
                f"--threads {threads} needs as many cores, but there are {len(cores)}."
            )
        os.sched_setaffinity(0, cores[-threads:])
    import jax

    jax.config.update("jax_num_cpu_devices", threads)


def compete(
    contenders: Mapping[str, Contender], *, repeats: int, patience_s: float = math.inf
) -> dict[str, Timing]:
    """Time every contender `repeats` times, in turns, after a warm-up of each.

    Short work is not warm after one: its memory comes from the system. Of work so long that
    warming up is a small part of it the first time counts. What would take longer than `patience_s`
    is timed less often, but twice.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    wanted: dict[str, int] = {}
    for name, contender in contenders.items():
        first = _seconds(contender)
        wanted[name] = max(min(2, repeats), int(min(repeats, patience_s / first)))
        if first < 1:
            _seconds(contender)
        elif first > 5:
            rates[name].append(contender.amount / first)
    for _ in range(repeats):
        for name, contender in contenders.items():
            if len(rates[name]) < wanted[name]:
                time.sleep(0.05)  # let the other side's idle threads stop spinning
                rates[name].append(contender.amount / _seconds(contender))
    return {
        name: Timing(tuple(rates[name]), contender.compile_s)
        for name, contender in contenders.items()
    }


def _seconds(contender: Contender) -> float:
    if contender.seconds is not None:
        return contender.seconds()
    begin = time.perf_counter()
    contender.run()
    return time.perf_counter() - begin


def everywhere(mesh: Any, tree: Any) -> Any:
    """Put a tree on all devices of a mesh; without one leave it where it is."""
    import jax

    if mesh is None:
        return tree
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def compiled(function: Any, *arguments: Any) -> tuple[Any, float]:
    """Compile for these arguments; give what can be called and the seconds that it took."""
    import jax

    begin = time.perf_counter()
    result = jax.jit(function).lower(*arguments).compile()
    return result, time.perf_counter() - begin


def machine() -> dict[str, Any]:
    """Name hardware and versions."""
    import jax

    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        "versions": found,
    }


def _cpu() -> str:
    """Name the processor."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def ceilings() -> dict[str, float]:
    """Measure what the machine can do at best: a large matrix product and a large copy."""
    import jax
    import jax.numpy as jnp

    is_cpu = jax.default_backend() == "cpu"
    size = 2048 if is_cpu else 8192
    matrix = jnp.ones([size, size], jnp.float32)
    product = jax.jit(lambda x: x @ x)
    vector = jnp.ones([2**26 if is_cpu else 2**30], jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    figures = {}
    for name, function, operand, amount in (
        ("matrix_product_gflops", product, matrix, 2 * size**3 / 1e9),
        ("copy_gb_per_s", copy, vector, 2 * vector.nbytes / 1e9),
    ):
        work = functools.partial(_call, function, operand)
        work()
        figures[name] = max(_rate(work, amount) for _ in range(5))
    return figures


def _call(function: Any, operand: Any) -> None:
    import jax

    jax.block_until_ready(function(operand))


def _rate(work: Run, amount: float) -> float:
    begin = time.perf_counter()
    work()
    return amount / (time.perf_counter() - begin)


def line(case: str, ours: str, timings: Mapping[str, Timing], targets: Mapping[str, float]) -> str:
    """Write a case as lines of text: every contender, and how ours compares."""
    rows = []
    for name, timing in timings.items():
        spread = f"{timing.median:>10,.1f} ({min(timing.rates):,.1f} to {max(timing.rates):,.1f})"
        compile_s = "" if timing.compile_s is None else f"  compile {timing.compile_s:.1f} s"
        ratio = ""
        if name != ours:
            value = timings[ours].median / timing.median
            target = targets.get(name)
            verdict = "" if target is None else f" (target {target:g})"
            ratio = f"  ours is {value:.2f} times as fast{verdict}"
        rows.append(f"{case:28} {name:24} {spread:>34}{ratio}{compile_s}")
    return "\n".join(rows)


def as_json(timings: Mapping[str, Timing]) -> dict[str, Any]:
    """Make a case fit for JSON."""
    return {
        name: {"median": t.median, "rates": list(t.rates), "compile_s": t.compile_s}
        for name, t in timings.items()
    }


def elsewhere(module: str, *arguments: object) -> Any:
    """Run a benchmark's module in a process of its own, and read the JSON of its last line."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def write(path: pathlib.Path | None, result: Mapping[str, Any]) -> None:
    """Write JSON, if a path is given, in a folder that may be new."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


def names(chosen: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """List the chosen ones, all if there are none; see that they exist."""
    unknown = sorted(set(chosen or ()) - set(known))
    if unknown:
        raise SystemExit(f"unknown case {unknown[0]!r}: must be one of {', '.join(known)}.")
    return [name for name in known if not chosen or name in chosen]
