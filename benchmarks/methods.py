"""Every method under one protocol: accuracy against bytes on Fashion-MNIST, fewer on CIFAR-10.

    python -m benchmarks.methods --jobs 2                            # all; goes on where it stopped
    python -m benchmarks.methods --only feddip-lenet5-sparsity-0.8   # one row
    python -m benchmarks.methods --table                             # from the runs that are there
    python -m benchmarks.methods --sweep cifar10 --jobs 2            # the smaller table
    python -m benchmarks.methods --sweep claims --jobs 2             # what some claims need besides
    python -m benchmarks.methods --sweep comparators --jobs 2        # methods that came later

``methods.yaml``, ``methods_cifar10.yaml``, ``methods_claims.yaml`` and ``methods_comparators.yaml``
beside this file are the protocols; a row is a case of one, with all partitions and seeds. Writes
``methods.md`` (the table, and rows against each other, as ``claims.py`` pairs them) and
``methods.svg`` (the picture) beside the run folders.
"""

import argparse
import concurrent.futures
import functools
import math
import multiprocessing
import os
import pathlib
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import claims, picture
from fedjaxprune.data.sources import tfds
from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.analysis import compare, groups
from fedjaxprune.experiment.config.identity import flat
from fedjaxprune.experiment.config.sections import plain
from fedjaxprune.experiment.folder import load, record
from fedjaxprune.experiment.run.listener import Listener
from fedjaxprune.experiment.sweeps import execute, plan

DEFAULT = "all"
SWEEPS = {
    DEFAULT: pathlib.Path(__file__).with_suffix(".yaml"),
    "cifar10": pathlib.Path(__file__).with_name("methods_cifar10.yaml"),
    "claims": pathlib.Path(__file__).with_name("methods_claims.yaml"),
    "comparators": pathlib.Path(__file__).with_name("methods_comparators.yaml"),
}
TITLES = {"iid": "IID", "dirichlet": "Dirichlet(0.5)"}
TABLE, PICTURE = "methods.md", "methods.svg"

_EVERYWHERE = """\
Mean ± deviation over seeds of the mean test accuracy of the last ten rounds. MiB are of whole runs,
all clients, as the ledger has them; what went before training (exploration, votes, masks, chosen
starts) is in them, and once more apart.

- Every run of a seed has the same examples at the same clients and the same initial weights of its
  network; the server's 2 % of the examples are nobody else's, whether a method asks for them or
  not. Cohorts are drawn by the round of the whole run: methods with equally many rounds before
  training have the same ones, others have not.
- Training is 1.1 passes over everybody's examples. Before it MPFL, pooled and averaged filters
  spend three more, pooled masks one, exploration 0.3, work at the server or at one client 0.02.
- Pooled masks and filters know the data of all, whose transfer nobody is charged for: bounds, not
  rivals.
"""
NOTES: Mapping[str, str] = {
    DEFAULT: f"""{_EVERYWHERE}\
- LeNet-5 for all that can. FedTiny needs BatchNorm (`resnet8`), adaptive dynamic pruning gates
  (`gated_resnet8`): FedAvg on the one and on the other its variant `squeeze_excitation`, which is
  FedAvg with all gates open, are their references. The learning rate was not tuned per method.
- Training starts from the initial weights but for FedTiny, magnitude masks and the explored start,
  which go on from weights that were trained before it.
- Knobs: a sparsity of the prunable weights (of all kernels for FedTiny), of the filters of each
  layer (of LeNet-5's 6 and 16 one always stays: 0.99 would be 0.95), the share of channels that
  gates keep, or the magnitude below which weights become zero. `pruned` is what came out: of all
  kernels, and for methods by filter of the convolutions' weights, which are 4 % of LeNet-5's
  (`feddp_threshold` prunes these alone, and its share is of all kernels).
- Cut down to the short training: five explorers of three epochs each (the paper's code: all, up to
  150), two exchanges that prune filters (nine), pools of five candidates (a tenth of 1 / density).
- Without momentum and weight decay gates' strict steps are plain ones.
- Clients take equally many steps, so FedNova is FedAvg but for one number a message.
- FedDIP and gradual pruning tighten until the end: the first of the last ten rounds are denser.
- Where partitions differ: IID / Dirichlet(0.5).
""",
    "cifar10": _EVERYWHERE,
    "claims": _EVERYWHERE,
    "comparators": f"""{_EVERYWHERE}\
- One sparsity, by ERK where a method lets it be chosen, and one learning rate for all: a check that
  no method is grossly wrong. 40 rounds are too few for methods that grow weights at zero, whose
  papers train for hundreds, and 20 steps are too few for FedFit's second epoch: its clients revise
  their masks after the last step.
- PruneFL has its own initial stage at one client and no ERK; SR-STE keeps two of four weights,
  FL-PQSU half of the filters, PruneTrain what its group lasso leaves (here: all).
- SSFL and Wanda first train or score densely, which is in the column before training.
""",
}


class Point(NamedTuple):
    """What a row's runs of one partition came to.

    Attributes:
      accuracies: fractions, by seed.
      up: MiB from all clients over the whole run, mean over the seeds like all that follows.
      down: MiB to all clients.
      one_off: MiB, both ways, of the stages before training.
      sparsity: at the end.
      flops: of training, over the whole run.
      one_off_flops: of these, in the stages before training.
      open_share: FLOPs of a prediction through gates, as a share of those with all of them open;
        NaN without gates.
    """

    accuracies: Mapping[int, float]
    up: float
    down: float
    one_off: float
    sparsity: float
    flops: float
    one_off_flops: float
    open_share: float


class Row(NamedTuple):
    """A configuration of a method.

    Attributes:
      name: for ``--only``.
      config: settings of one of its runs, by full path.
      points: by partition, where a run has finished.
      partitions: that there should be.
      num_seeds: runs of a partition that there should be.
    """

    name: str
    config: Mapping[str, Any]
    points: dict[str, Point]
    partitions: tuple[str, ...]
    num_seeds: int


def rows_of(members: Sequence[plan.Member]) -> dict[str, list[plan.Member]]:
    """Put the members of a sweep into rows, whose runs differ in partition and seed alone.

    A row is named by its method and network, and by the settings in which it differs from other
    rows of both.
    """
    rows: dict[str, list[plan.Member]] = {}
    alike: dict[str, list[dict[str, Any]]] = {}
    settings = {one.name: _settings(one) for one in members}
    for one in members:
        label = f"{one.config.method.name}-{one.config.model.name}"
        alike.setdefault(label, []).append(settings[one.name])
    for one in members:
        words = [f"{one.config.method.name}-{one.config.model.name}"]
        own = settings[one.name]
        for path, value in own.items():
            if any(other.get(path, value) != value for other in alike[words[0]]):
                words.append(f"{path.rpartition('.')[2]}-{value}")
        name = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words))
        rows.setdefault(name, []).append(one)
    return rows


def _settings(member: plan.Member) -> dict[str, Any]:
    """Give what can tell a row from others: settings of the method, the network and the rounds."""
    found = flat(plain(member.config))
    sections = ("method.", "model.", "federation.")
    return {path: value for path, value in found.items() if path.startswith(sections)}


def measure(found: Sequence[load.RunData]) -> Point:
    """Take the means of a row's finished runs of one partition."""
    measured = compare.compare([groups.Group(label="", runs=tuple(found))]).measures[0]
    before = [np.array([x["stage"] != run.lines[-1]["stage"] for x in run.lines]) for run in found]
    pairs = list(zip(found, before, strict=True))
    gates = [record.value(run.lines[-1], "compute.inference_flops") for run in found]
    return Point(
        accuracies={
            run.config["seed"]: one.mean_last for run, one in zip(found, measured, strict=True)
        },
        up=compare.mean([one.up for one in measured]),
        down=compare.mean([one.down for one in measured]),
        one_off=compare.mean([float(compare.sent(run)[early].sum()) for run, early in pairs]),
        sparsity=compare.mean([one.sparsity for one in measured]),
        flops=compare.mean([one.flops for one in measured]),
        one_off_flops=compare.mean(
            [float(compare.flops(run)[early].sum()) for run, early in pairs]
        ),
        open_share=compare.mean([one["gated"] / one["open"] if one else math.nan for one in gates]),
    )


def collect(members: Sequence[plan.Member]) -> list[Row]:
    """Read what has been run, row by row, in the order of the sweep."""
    rows = []
    for name, several in rows_of(members).items():
        parts: dict[str, list[plan.Member]] = {}
        for member in several:
            parts.setdefault(member.config.data.partition.name, []).append(member)
        points = {}
        for partition, of_it in parts.items():
            there = [one.folder for one in of_it if execute.is_finished(one)]
            if there:
                points[partition] = measure(load.read_all(there)[0])
        first = next(iter(parts.values()))
        config = flat(plain(first[0].config))
        rows.append(Row(name, config, points, partitions=tuple(parts), num_seeds=len(first)))
    return rows


def knob(config: Mapping[str, Any], *, usual_rounds: int) -> str:
    """Say where a method's knob stands, and what is not as usual about it."""
    words = (_knob(config), *variant(config, usual_rounds=usual_rounds))
    return ", ".join(filter(None, words))


def _knob(config: Mapping[str, Any]) -> str:
    if (threshold := config.get("method.threshold")) is not None:
        return f"threshold {threshold}"
    if (density := config.get("model.density", 1.0)) < 1.0:
        return f"gates {density}"
    sparsity = config.get("method.sparsity", 0.0)
    if not sparsity or config.get("method.mode") == "unpruned":
        return ""
    return f"filters {sparsity}" if "method.remove" in config else str(sparsity)


def variant(config: Mapping[str, Any], *, usual_rounds: int) -> tuple[str, ...]:
    """Say in which ways a row differs from the others of its method, beside the knob."""
    rounds = config["federation.num_rounds"]
    said = {
        "fixed masks": config.get("method.drop_fraction") == 0,
        "just as many": config.get("method.consensus") == "top_k",
        f"{rounds} rounds": rounds != usual_rounds,
    }
    return tuple(words for words, holds in said.items() if holds)


def accuracy(point: Point | None, num_seeds: int) -> str:
    """Write a mean ± deviation in per cent, and how many seeds are there if not all are."""
    if point is None:
        return "-"
    values = [100 * value for value in point.accuracies.values()]
    text = f"{compare.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {compare.deviation(values):.2f}"
    return text if len(values) == num_seeds else f"{text} ({len(values)} of {num_seeds})"


def _both(row: Row, field: str) -> str:
    """Write a number of both partitions, once if it is the same."""
    known = [getattr(row.points[one], field) for one in row.partitions if one in row.points]
    texts = [f"{100 * one:.1f}" if field == "sparsity" else f"{one:.2f}" for one in known]
    return " / ".join(dict.fromkeys(texts))


def table(rows: Sequence[Row], *, sweep: str = DEFAULT) -> str:
    """Write the rows that have a run as a Markdown table."""
    partitions = rows[0].partitions  # the same in all of a sweep
    head = ["network", "method", "knob", "pruned, %", *(f"{TITLES[p]}, %" for p in partitions)]
    head += ["up, MiB", "down, MiB", "of both, before training", "`python -m benchmarks.methods`"]
    lines = [head, ["---"] * len(head)]
    usual = rows[0].config["federation.num_rounds"]
    for row in rows:
        if row.points:
            cells = [str(row.config["model.name"]), f"`{row.config['method.name']}`"]
            cells += [knob(row.config, usual_rounds=usual), _both(row, "sparsity")]
            cells += [accuracy(row.points.get(one), row.num_seeds) for one in partitions]
            cells += [_both(row, field) for field in ("up", "down", "one_off")]
            option = "" if sweep == DEFAULT else f"--sweep {sweep} "
            lines.append([*cells, f"`{option}--only {row.name}`"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(rows: Sequence[Row], folder: pathlib.Path, *, sweep: str = DEFAULT) -> str:
    """Write table and picture of what there is; return the table."""
    text = f"{NOTES[sweep]}\n{table(rows, sweep=sweep)}"
    if found := claims.table(rows, claims.CLAIMS.get(sweep, ()), TITLES):
        text += f"\n{found}"
    (folder / TABLE).write_text(text, encoding="utf-8")
    picture.draw([_series(row, usual=rows[0].config) for row in rows], TITLES, folder / PICTURE)
    return text


def _series(row: Row, *, usual: Mapping[str, Any]) -> picture.Place:
    """Say where a row's points lie in the picture, and how they look."""
    model = str(row.config["model.name"])
    words = [model] if model != usual["model.name"] else []
    words += variant(row.config, usual_rounds=usual["federation.num_rounds"])
    return picture.Place(
        method=str(row.config["method.name"]),
        variant=", ".join(words),
        points={
            name: (
                point.up + point.down,
                100 * compare.mean([*point.accuracies.values()]),
                100 * compare.deviation([*point.accuracies.values()]),
            )
            for name, point in row.points.items()
        },
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description="Every method under one protocol."
    )
    parser.add_argument("--sweep", choices=list(SWEEPS), default=DEFAULT, help="which table (all)")
    parser.add_argument("--only", action="append", metavar="ROW", help="as the table names it")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side (1)")
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        metavar="FOLDER",
        help="runs/methods, or runs/methods-SWEEP",
    )
    options = parser.parse_args(arguments)
    if options.folder is None:
        options.folder = pathlib.Path(
            "runs", "methods" if options.sweep == DEFAULT else f"methods-{options.sweep}"
        )
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}.")
    try:
        sweep = plan.read(str(SWEEPS[options.sweep]), folder=options.folder)
    except ConfigError as error:
        parser.error(str(error))
    rows = rows_of(sweep.members)
    if unknown := [name for name in options.only or [] if name not in rows]:
        parser.error(f"--only must be one of {', '.join(rows)}, got {unknown[0]}.")
    chosen = [one for name in options.only or rows for one in rows[name]]
    failed = {}
    if not options.table:
        failed = run(chosen, sweep.source, jobs=options.jobs)
    if options.folder.is_dir():
        print(write(collect(sweep.members), options.folder, sweep=options.sweep))
    if failed:
        raise SystemExit(f"failed: {'; '.join(f'{name} ({why})' for name, why in failed.items())}")


def turn(member: plan.Member) -> tuple[bool, int]:
    """Say when a member's turn is: seed by seed, further seeds of the dear networks last."""
    seed = member.config.seed
    return member.config.model.name != "lenet5" and seed > 0, seed


def run(members: Sequence[plan.Member], source: str, *, jobs: int) -> dict[str, str]:
    """Run what is missing, each process on cores of its own; return what failed, and why.

    A process makes many runs: starting one for each and reading the data anew would take as long
    as most of the runs.
    """
    missing = sorted((one for one in members if not execute.is_finished(one)), key=turn)
    if not missing:
        return {}
    context = multiprocessing.get_context("spawn")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = context.Queue()
    for number in range(jobs):
        shares.put(cores[number::jobs])
    failed = {}
    with concurrent.futures.ProcessPoolExecutor(jobs, context, _settle, (shares,)) as pool:
        coming = {
            pool.submit(_run, one.name, str(one.folder.parent), source): one.name for one in missing
        }
        try:
            for number, done in enumerate(concurrent.futures.as_completed(coming), start=1):
                name, why = coming[done], done.result()
                print(
                    f"{number} of {len(missing)}: {name}{f': failed: {why}' if why else ''}",
                    flush=True,
                )
                if why:
                    failed[name] = why
        except BaseException:  # else the pool would run all that is left
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return failed


def _settle(shares: Any) -> None:
    """Set a process up for many runs."""
    if cores := shares.get():
        os.sched_setaffinity(0, cores)
    threading.Thread(target=_follow, daemon=True).start()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    tfds.read = functools.cache(tfds.read)


def _follow() -> None:
    """End with the process that gave the work, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(name: str, folder: str, source: str) -> str | None:
    """Run a member, which a process reads anew: its parts are not sent from one to another."""
    member = _members(source, folder)[name]
    why = execute.attempt(member, Listener())
    jax.clear_caches()  # else compiled rounds pile up in memory
    return why


@functools.cache
def _members(source: str, folder: str) -> Mapping[str, plan.Member]:
    return {one.name: one for one in plan.read(source, folder=pathlib.Path(folder)).members}


if __name__ == "__main__":
    main()
