"""Numbers of a group of runs against its rounds, as pictures need them: means over seeds."""

import collections
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedjaxprune.experiment.analysis import compare, groups
from fedjaxprune.experiment.analysis.compare import Curve, Score
from fedjaxprune.experiment.analysis.groups import Group
from fedjaxprune.experiment.folder import client_ids, load, record
from fedjaxprune.experiment.folder.load import RunData
from fedjaxprune.traffic import BITS_PER_MIB

QUANTILES = ("lowest", "lower_quartile", "median", "upper_quartile", "highest")
KINDS = ("values", "indices", "masks", "statistics", "framing")


class Line(NamedTuple):
    """One curve, ``[T]`` each."""

    x: np.ndarray
    mean: np.ndarray  # over the seeds
    deviation: np.ndarray | None  # sample deviation over the seeds; None for one seed


class Mark(NamedTuple):
    """Where a stage begins."""

    round: int  # its first, counted from 1 over all stages
    stage: str  # its name


def merged(members: Group, score: Score, *, x: str, y: str) -> Line:
    """Merge the seeds of a group at the rounds that all of them have tested."""
    curves = [compare.curve(run, score) for run in groups.counted(members)]
    rounds = curves[0].rounds
    for curve in curves[1:]:
        rounds = np.intersect1d(rounds, curve.rounds)
    return _line([_at(c, rounds, x) for c in curves], [_at(c, rounds, y) for c in curves])


def _at(curve: Curve, rounds: np.ndarray, field: str) -> np.ndarray:
    values = np.asarray(getattr(curve, field), np.float64)
    return values[np.isin(curve.rounds, rounds)]


def by_round(members: Group, read: Callable[[RunData], np.ndarray]) -> Line:
    """Merge the seeds of a group at the rounds that all of them have on record."""
    found = [read(run) for run in groups.counted(members)]
    length = min(map(len, found))
    rounds = np.arange(1, length + 1, dtype=np.float64)
    return _line([rounds] * len(found), [values[:length] for values in found])


def _line(xs: Sequence[np.ndarray], ys: Sequence[np.ndarray]) -> Line:
    several = np.stack(ys).astype(np.float64)
    deviation = np.std(several, axis=0, ddof=1) if len(ys) > 1 else None
    return Line(x=np.mean(np.stack(xs), axis=0), mean=np.mean(several, axis=0), deviation=deviation)


def constant(line: Line) -> float | None:
    """Give the one value that a curve has in all rounds and seeds; None if there are several."""
    known = line.mean[~np.isnan(line.mean)]
    varies = line.deviation is not None and bool(np.any(np.nan_to_num(line.deviation) > 1e-9))
    if not len(known) or varies or known.max() - known.min() > 1e-9 * max(1.0, abs(known.max())):
        return None
    return float(known[0])


def stages(run: RunData) -> list[Mark]:
    """List the stages of a run, if it has more than one."""
    marks: list[Mark] = []
    for line in run.lines:
        if not marks or marks[-1].stage != line["stage"]:
            marks.append(Mark(round=line["round"], stage=line["stage"]))
    return marks if len(marks) > 1 else []


def layers(run: RunData) -> tuple[list[str], np.ndarray, np.ndarray] | None:
    """Take the sparsity of every layer over time, with equal rounds put together.

    Gives the layers' paths, ``[B + 1]`` edges of the blocks of rounds, and ``[layers, B]`` per
    cent; None if the record does not have them.
    """
    found = [record.value(line, "mask.sparsity_by_layer") for line in run.lines]
    if not all(found):
        return None
    paths = list(found[0])
    table = 100 * np.array([[entry.get(path) for path in paths] for entry in found], np.float64)
    begins = np.flatnonzero(np.r_[True, np.any(table[1:] != table[:-1], axis=1)])
    return paths, np.r_[begins, len(table)] + 0.5, table[begins].T


def traffic(run: RunData) -> dict[str, np.ndarray]:
    """Add up the MiB sent until each round by direction and kind, those that occur."""
    totals = {}
    for kind in KINDS:
        for way in compare.WAYS:
            bits = np.nan_to_num(load.column(run, f"traffic.{way}.{kind}"))
            if bits.any():
                totals[f"{kind} {way}"] = np.cumsum(bits) / BITS_PER_MIB
    return totals


def participation(run: RunData) -> dict[int, int] | None:
    """Count clients by the number of rounds in which they sent something.

    None if the record does not name clients.
    """
    entries = [e for line in run.lines for e in record.value(line, "traffic.by_client") or ()]
    if not entries:
        return None
    senders = (client_ids.of_text(e["client_ids"]) for e in entries if e["up_bits"] > 0)
    times = collections.Counter(itertools.chain.from_iterable(senders))
    counts = collections.Counter(times.values())
    population = record.value(run.config, "data.num_clients")
    if isinstance(population, int) and population > len(times):
        counts[0] = population - len(times)
    return dict(sorted(counts.items()))


def spread(run: RunData) -> tuple[np.ndarray, dict[str, np.ndarray]] | None:
    """Take the clients' accuracies, in per cent, at the rounds that were tested."""
    rows = {name: 100 * load.column(run, f"clients.accuracy.{name}") for name in QUANTILES}
    tested = np.flatnonzero(~np.isnan(np.sum(list(rows.values()), axis=0)))
    if not len(tested):
        return None
    return (tested + 1).astype(np.int32), {name: row[tested] for name, row in rows.items()}
