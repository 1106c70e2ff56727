"""Numbers of a group of runs against its rounds, as pictures need them: means over seeds."""

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjaxprune.experiment.analysis import compare
from fedjaxprune.experiment.analysis.compare import Curve, Group
from fedjaxprune.experiment.folder.load import Run
from fedjaxprune.experiment.folder.record import RoundRecord

QUANTILES = ("lowest", "lower_quartile", "median", "upper_quartile", "highest")


class Line(NamedTuple):
    """One curve.

    Attributes:
      x: ``[T]``.
      mean: ``[T]`` over the seeds.
      deviation: ``[T]`` sample deviation over the seeds; None for one seed.
    """

    x: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray | None


class Mark(NamedTuple):
    """Where a stage begins.

    Attributes:
      round: its first, counted from 1 over all stages.
      stage: its name.
    """

    round: int
    stage: str


def merged(members: Group, *, x: str, y: str) -> Line:
    """Merge the seeds of a group at the rounds that all of them have tested.

    Args:
      members: the group.
      x: the field of `compare.Curve` to draw against.
      y: the field to draw.
    """
    curves = [compare.curve(run) for run in compare.counted(members)]
    rounds = curves[0].rounds
    for curve in curves[1:]:
        rounds = np.intersect1d(rounds, curve.rounds)
    return _line([_at(c, rounds, x) for c in curves], [_at(c, rounds, y) for c in curves])


def _at(curve: Curve, rounds: np.ndarray, field: str) -> np.ndarray:
    values = np.asarray(getattr(curve, field), np.float64)
    return values[np.isin(curve.rounds, rounds)]


def by_round(members: Group, read: Callable[[RoundRecord], float | None]) -> Line:
    """Merge the seeds of a group at the rounds that all of them have on record."""
    found = compare.counted(members)
    length = min(len(run.lines) for run in found)
    rounds = np.arange(1, length + 1, dtype=np.float64)
    values = [
        np.array([math.nan if (v := read(line)) is None else v for line in run.lines[:length]])
        for run in found
    ]
    return _line([rounds] * len(found), values)


def _line(xs: Sequence[np.ndarray], ys: Sequence[np.ndarray]) -> Line:
    several = np.stack(ys).astype(np.float64)
    deviation = np.std(several, axis=0, ddof=1) if len(ys) > 1 else None
    return Line(x=np.mean(np.stack(xs), axis=0), mean=np.mean(several, axis=0), deviation=deviation)


def churn(line: RoundRecord) -> float | None:
    """Tell what share of the prunable mask bits a round flipped, in per cent."""
    if line.mask_stability is not None:
        return 100 * (1 - line.mask_stability)
    num_prunable = line.num_kept / (1 - line.sparsity) if line.sparsity < 1 else 0
    return 100 * line.num_changed / num_prunable if num_prunable else None


def stages(run: Run) -> list[Mark]:
    """List the stages of a run, if it has more than one."""
    marks: list[Mark] = []
    for line in run.lines:
        if not marks or marks[-1].stage != line.stage:
            marks.append(Mark(round=line.round, stage=line.stage))
    return marks if len(marks) > 1 else []


def layers(run: Run) -> tuple[list[str], np.ndarray, np.ndarray] | None:
    """Take the sparsity of every layer over time, alike rounds put together.

    Returns:
      The layers' paths, ``[B + 1]`` edges of the blocks of rounds, and ``[layers, B]`` per cent;
      None if the record does not have them.
    """
    found = [line.layer_sparsity for line in run.lines if isinstance(line.layer_sparsity, dict)]
    if len(found) != len(run.lines) or not found[0]:
        return None
    paths = list(found[0])
    table = np.array([[100 * entry.get(path, math.nan) for path in paths] for entry in found])
    begins = np.flatnonzero(np.r_[True, np.any(table[1:] != table[:-1], axis=1)])
    edges = np.r_[begins + 0.5, len(table) + 0.5]
    return paths, edges, table[begins].T


def traffic(run: Run) -> dict[str, np.ndarray]:
    """Add up the MiB sent until each round by direction and kind, those that occur."""
    sent: dict[str, list[float]] = {}
    for index, line in enumerate(run.lines):
        one = run._replace(lines=[line])
        for direction in ("up", "down"):
            for kind, bits in compare.parts(one, direction).items():
                row = sent.setdefault(f"{kind} {direction}", [0.0] * len(run.lines))
                row[index] = bits / compare.BITS_PER_MIB
    totals = {name: np.cumsum(row) for name, row in sent.items()}
    return {name: total for name, total in totals.items() if total[-1] > 0}


def participation(run: Run) -> dict[int, int] | None:
    """Count clients by the number of rounds in which they sent something.

    None if the record does not name clients.
    """
    times: collections.Counter[int] = collections.Counter()
    is_known = False
    for line in run.lines:
        for entry in line.client_bits:
            is_known = True
            if entry["uplink_bits"] > 0:
                times.update(entry["client_ids"])
    if not is_known:
        return None
    counts = collections.Counter(times.values())
    population = run.config.get("num_clients")
    if isinstance(population, int) and population > len(times):
        counts[0] = population - len(times)
    return dict(sorted(counts.items()))


def spread(run: Run) -> tuple[np.ndarray, dict[str, np.ndarray]] | None:
    """Take the clients' accuracies, in per cent, at the rounds that were tested."""
    tested = [line for line in run.lines if line.client_accuracy]
    entries: list[Any] = [line.client_accuracy for line in tested]
    if not entries or not all(set(QUANTILES) <= set(entry) for entry in entries):
        return None
    rounds = np.array([line.round for line in tested], np.int32)
    return rounds, {name: np.array([100 * entry[name] for entry in entries]) for name in QUANTILES}
