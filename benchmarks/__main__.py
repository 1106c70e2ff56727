"""All speed benchmarks in one run: ours against its rivals, and against what the machine can do.

    python -m benchmarks [--quick] [--threads 2] [--only feddip] [--pfl-python PATH] [--out FOLDER]

Writes ``FOLDER/benchmarks.json`` and ``FOLDER/benchmarks.md`` (by default ``runs/benchmarks``) with
medians, spread, hardware, versions, and compile time apart from run time. Each case runs in a
process of its own, so that none finds another's memory or threads. ``--quick`` takes few steps and
repeats and leaves out the ResNets and the obvious JAX round, which take minutes to compile or to
run: under five minutes on two cores, and noisy. Rivals that are not installed are left out, and
said so: ``pip install -e '.[torch]'``, ``pip install pfl``.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks import cifar10_cohort, harness, local_training, networks, rounds

_APART = ("scanned_metrics", "scanned_wide", "feddip_short")  # others stand for them
# What `--quick` runs.
QUICK = ("lenet5", "cnn", *(case for case in rounds.CASES if case not in _APART), "cifar10_cohort")
CASES = (*networks.CASES, *rounds.CASES, "cifar10_cohort")


def command(name: str, options: argparse.Namespace) -> list[str]:
    """Say how a case is run by itself."""
    if name in networks.CASES:
        arguments = ["benchmarks.local_training", "--only", name]
        if options.quick:
            arguments += ["--against", local_training.TORCH, "--against", local_training.LOOP]
    elif name in rounds.CASES:
        arguments = ["benchmarks.rounds", "--only", name]
    else:
        arguments = ["benchmarks.cifar10_cohort", "--pfl-python", options.pfl_python]
    arguments += ["--threads", str(options.threads)]
    return [sys.executable, "-m", *arguments, *(["--quick"] if options.quick else [])]


def targets(name: str) -> dict[str, float]:
    """Say how many times as fast as each rival a case is to be."""
    if name in networks.CASES:
        return local_training.TARGETS[name]
    return rounds.TARGETS[name] if name in rounds.CASES else cifar10_cohort.TARGETS


def ours(name: str) -> str:
    """Name the contender that is to be the faster."""
    known = {**dict.fromkeys(networks.CASES, local_training.OURS), **rounds.OURS}
    return known.get(name, cifar10_cohort.OURS)


def table(result: dict[str, Any]) -> str:
    """Write all cases as a Markdown table."""
    machine = result["machine"]
    found = result["ceilings"]
    lines = [
        f"{machine['cores']} cores of {machine['cpu']}; {machine['devices']}; Python "
        f"{machine['python']}; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + ".",
        "",
        f"Ceilings: matrix product {found['matrix_product_gflops']:,.0f} GFLOP/s, copy "
        f"{found['copy_gb_per_s']:,.1f} GB/s.",
        "",
        "| case | contender | per second, median (least to most) | ours against it | target | "
        "compile, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, timings in result["cases"].items():
        best = timings[ours(name)]["median"]
        for contender, timing in timings.items():
            rates = timing["rates"]
            ratio = "" if contender == ours(name) else f"{best / timing['median']:.2f}"
            target = targets(name).get(contender)
            compile_s = timing["compile_s"]
            lines.append(
                f"| {name} | {contender} | {timing['median']:,.2f} ({min(rates):,.2f} to "
                f"{max(rates):,.2f}) | {ratio} | {'' if target is None else f'{target:.2f}'} | "
                f"{'' if compile_s is None else f'{compile_s:.1f}'} |"
            )
    return "\n".join(lines + reached(result)) + "\n"


def reached(result: dict[str, Any]) -> list[str]:
    """Write what local training makes of the matrix product's speed, as a Markdown table."""
    names = [name for name in result["cases"] if name in networks.CASES]
    if not names:
        return []
    ceiling = result["ceilings"]["matrix_product_gflops"]
    lines = [
        "",
        "Local training, forward and backward, by the layers' plain sums (Winograd's way does with "
        "fewer):",
        "",
        "| network | MFLOP an example | GFLOP/s | of the matrix product |",
        "|---|---|---|---|",
    ]
    for name in names:
        flops = networks.training_flops(name)
        speed = result["cases"][name][local_training.OURS]["median"] * flops / 1e9
        lines.append(
            f"| {name} | {flops / 1e6:,.1f} | {speed:,.0f} | {100 * speed / ceiling:.0f} % |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="All speed benchmarks, ours against its rivals."
    )
    parser.add_argument("--quick", action="store_true", help="under five minutes: noisy")
    parser.add_argument("--threads", type=int, default=2, help="cores, one device each (2)")
    parser.add_argument("--only", action="append", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument(
        "--pfl-python", default=sys.executable, metavar="PATH", help="interpreter that has pfl"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/benchmarks"), metavar="FOLDER"
    )
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}.")
    chosen = harness.names(options.only, QUICK if options.quick and not options.only else CASES)
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"threads": options.threads, "quick": options.quick, "cases": {}}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            path = pathlib.Path(folder) / f"{name}.json"
            print(f"== {name}", flush=True)
            done = subprocess.run([*command(name, options), "--json", str(path)], check=False)
            if done.returncode or not path.exists():
                failed.append(name)
                continue
            result["cases"] |= json.loads(path.read_text())["cases"]
    harness.bind(options.threads)
    result |= {"machine": harness.machine(), "ceilings": harness.ceilings(), "failed": failed}
    (options.out / "benchmarks.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "benchmarks.md").write_text(table(result))
    print(table(result))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; what they said stands above.")


if __name__ == "__main__":
    main()
