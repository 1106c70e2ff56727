"""Numbers of runs that can be compared: scores, and what they cost.

Means and sample deviations are over the seeds. The score of a classification is its accuracy; that
of a regression is its mean absolute error. The score at equal bytes is that of the last test before
a run had sent more than the budget.
"""

import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.analysis import groups as groups_lib
from fedjaxprune.experiment.analysis.groups import Group
from fedjaxprune.experiment.folder import load
from fedjaxprune.experiment.folder.load import RunData
from fedjaxprune.traffic import BITS_PER_MIB

NUM_TESTS = 10  # that the mean of the last tests is of, at most
WAYS = ("up", "down")
PASSES = ("forward", "input_gradient", "weight_gradient")  # of training


class Score(NamedTuple):
    """What a test measures.

    Attributes:
      path: in the record.
      name: of it.
      unit: that it is shown in; empty for that of the targets.
      scale: from the record to that unit.
      is_better_if_higher: whether it grows as a network learns.
    """

    path: str
    name: str
    unit: str
    scale: float
    is_better_if_higher: bool

    def text(self, number: float, digits: int = 2) -> str:
        """Write a score of the record with its unit."""
        if self.unit:
            return f"{self.scale * number:.{digits}f} {self.unit}"
        return f"{number:.4g}"


ACCURACY = Score("test.accuracy", "accuracy", "%", 100.0, True)
ERROR = Score("test.error", "error", "", 1.0, False)


class Curve(NamedTuple):
    """A run at its tests.

    Attributes:
      rounds: ``[T]`` completed.
      mib: ``[T]`` MiB sent until then, both ways, all clients.
      flops: ``[T]`` FLOPs of training until then, modeled; NaN where they are not known.
      score: ``[T]`` as the record has it; NaN where it is not known.
      loss: ``[T]`` test loss; NaN where it is not finite.
    """

    rounds: np.ndarray
    mib: np.ndarray
    flops: np.ndarray
    score: np.ndarray
    loss: np.ndarray


class Measures(NamedTuple):
    """Numbers of one run; NaN for what is not known, or was not reached.

    Attributes:
      sparsity: at the end.
      last: score of the last test.
      mean_last: mean score of the last tests, at most ten, of the last stage.
      num_averaged: how many tests that mean is of.
      final: `mean_last` where at least twice as many tests were made, else `last`: the mean of a
        short run would be of its beginning, too.
      at_budget: score of the last test within the budget of bytes.
      mib_to: MiB sent when the target was first reached.
      rounds_to: rounds completed then.
      up: MiB of all messages from the clients.
      down: MiB of all messages to the clients.
      dense: MiB that 32 bits a value would take, both ways.
      values_up: of `up`, weights, deltas and gradients.
      values_down: the same of `down`.
      masks: MiB of masks, both ways.
      flops: FLOPs of training, modeled.
      dense_flops: the same as if nothing were pruned.
    """

    sparsity: float
    last: float
    mean_last: float
    num_averaged: int
    final: float
    at_budget: float
    mib_to: float
    rounds_to: float
    up: float
    down: float
    dense: float
    values_up: float
    values_down: float
    masks: float
    flops: float
    dense_flops: float


class Comparison(NamedTuple):
    """All that a table shows.

    Attributes:
      groups: in the order of the runs.
      measures: for each group those of its runs.
      score: what tests measure.
      budget: MiB at which scores are compared.
      target: score to which costs are counted.
      notes: where budget and target come from, and why numbers are missing.
      is_relative: whether there are several groups, or a budget or target was given; without, the
        numbers at these say nothing.
    """

    groups: tuple[Group, ...]
    measures: tuple[tuple[Measures, ...], ...]
    score: Score
    budget: float
    target: float
    notes: tuple[str, ...]
    is_relative: bool


def of_folders(
    folders: Iterable[str | pathlib.Path],
    *,
    at_mib: float | None = None,
    to_accuracy: float | None = None,
) -> tuple[Comparison, list[str]]:
    """Compare runs by their folders; imports no part that they name.

    Args:
      folders: of runs; a folder that holds run folders stands for all of them.
      at_mib: see `compare`.
      to_accuracy: fraction of the test set; see `compare`.

    Returns:
      The comparison, and notes on runs that are left out and on what makes it doubtful.

    Raises:
      FedJaxPruneError: there is no run, one cannot be read, or they cannot be compared.
    """
    found, notes = load.read_all(folders)
    groups, more = groups_lib.group(found)
    return compare(groups, budget=at_mib, target=to_accuracy), [*notes, *more]


def compare(
    groups: Sequence[Group], *, budget: float | None = None, target: float | None = None
) -> Comparison:
    """Measure every group.

    Args:
      groups: what to compare.
      budget: MiB at which scores are compared; None for the least that a run sent in all, or
        where that is more, what every run had sent at its first test.
      target: accuracy to which costs are counted; None for what every run reached at its end. The
        budget and the target are taken from finished runs, if there are any.

    Raises:
      ConfigError: an accuracy is asked for of a regression.
    """
    runs = [groups_lib.counted(members) for members in groups]
    score = score_of(groups)
    if target is not None and score is ERROR:
        raise ConfigError(
            f"--to-accuracy must be left out, got {100 * target:g}: these runs are of a "
            "regression, which has no accuracy."
        )
    curves = [[curve(run, score) for run in several] for several in runs]
    done = [n for n, members in enumerate(groups) if groups_lib.is_finished(members)]
    pairs = [
        pair for n in done or range(len(groups)) for pair in zip(runs[n], curves[n], strict=True)
    ]
    notes: list[str] = []
    is_relative = len(groups) > 1 or budget is not None or target is not None
    if budget is None:
        least = min(sum(sent(run)) for run, _ in pairs)
        first = max((float(one.mib[known][0]) for _, one in pairs if (known := _known(one)).any()),
                    default=0.0)  # fmt: skip
        budget = max(least, first)
        why = "the least that a run sent in all" if least >= first else (
            "what every run had sent at its first test"
        )  # fmt: skip
        notes.append(f"{budget:,.4g} MiB is {why}.")
    if target is None:
        target = _reached_by_all(pairs, score)
        if not math.isnan(target):
            notes.append(f"every finished run reached {score.text(target, 0)}." if done else
                         f"every run has reached {score.text(target, 0)}.")  # fmt: skip
    measures = tuple(
        tuple(_measure(run, one, score, budget, target) for run, one in zip(r, c, strict=True))
        for r, c in zip(runs, curves, strict=True)
    )
    notes = notes if is_relative else []
    for members, several, own in zip(groups, curves, measures, strict=True):
        notes += _missing(members, several, own, score, budget, target)
    return Comparison(tuple(groups), measures, score, budget, target, tuple(notes), is_relative)


def score_of(groups: Sequence[Group]) -> Score:
    """Choose what is compared: errors where there are no accuracies."""
    runs = [run for members in groups for run in members.runs]
    known = [one for one in (ACCURACY, ERROR) if any(_any(load.column(r, one.path)) for r in runs)]
    return known[0] if known else ACCURACY


def curve(run: RunData, score: Score) -> Curve:
    """Read a run at its tests."""
    values, loss = load.column(run, score.path), load.column(run, "test.loss")
    at = np.flatnonzero(~np.isnan(values) | ~np.isnan(loss))
    return Curve(
        rounds=np.array([run.lines[n]["round"] for n in at], np.int64),
        mib=np.cumsum(sent(run))[at],
        flops=np.cumsum(flops(run))[at],
        score=values[at],
        loss=loss[at],
    )


def flops(run: RunData, prefix: str = "") -> np.ndarray:
    """Add up each round's FLOPs of training, ``[rounds]``; NaN where they are not known.

    Args:
      run: whose.
      prefix: empty for those under the masks, ``dense_`` for those as if nothing were pruned.
    """
    return sum(
        (load.column(run, f"compute.training_flops.{prefix}{name}") for name in PASSES),
        start=np.zeros(len(run.lines)),
    )


def mib(run: RunData, path: str) -> float:
    """Add up a number of bits over the rounds, in MiB; 0 where it is nowhere in the record."""
    return float(np.nansum(load.column(run, path))) / BITS_PER_MIB


def mean(values: Sequence[float]) -> float:
    """Average what is known; NaN where nothing is."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def deviation(values: Sequence[float]) -> float:
    """Take the sample deviation of what is known; NaN for fewer than two values."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.stdev(known) if len(known) > 1 else math.nan


def _any(values: np.ndarray) -> bool:
    return bool(np.any(~np.isnan(values)))


def _known(one: Curve) -> np.ndarray:
    return ~np.isnan(one.score)


def sent(run: RunData) -> np.ndarray:
    """Give the MiB of all messages of each round, both ways, ``[rounds]``."""
    ways = [np.nan_to_num(load.column(run, f"traffic.{way}.total_bits")) for way in WAYS]
    return sum(ways, start=np.zeros(len(run.lines))) / BITS_PER_MIB


def _reached_by_all(pairs: Sequence[tuple[RunData, Curve]], score: Score) -> float:
    """Round the worst final score, to whole per cents or two digits, to what all reached."""
    finals = [_finals(run, score)[3] for run, _ in pairs]
    known = [value for value in finals if not math.isnan(value)]
    if not known:
        return math.nan
    if score.is_better_if_higher:
        return math.floor(100 * min(known) + 1e-9) / 100
    worst = max(known)
    unit = 10.0 ** (math.floor(math.log10(worst)) - 1) if worst > 0 else 1.0
    return math.ceil(worst / unit - 1e-9) * unit


def _finals(run: RunData, score: Score) -> tuple[float, float, int, float]:
    """Give the last score, the mean of the last ones, their number, and which is final."""
    stage = run.lines[-1]["stage"]
    own = np.array([line["stage"] == stage for line in run.lines])
    tests = load.column(run, score.path)[own]
    known = tests[~np.isnan(tests)].tolist()
    if not known:
        return math.nan, math.nan, 0, math.nan
    averaged = known[-NUM_TESTS:]
    average = statistics.fmean(averaged)
    return known[-1], average, len(averaged), average if len(known) >= 2 * NUM_TESTS else known[-1]


def _measure(run: RunData, one: Curve, score: Score, budget: float, target: float) -> Measures:
    within = np.flatnonzero(_known(one) & (one.mib <= budget * (1 + 1e-9)))
    sign = 1.0 if score.is_better_if_higher else -1.0
    reached = np.flatnonzero(sign * one.score >= sign * target - 1e-12)
    first = int(reached[0]) if len(reached) else None
    last, mean_last, num_averaged, final = _finals(run, score)
    return Measures(
        sparsity=float(load.column(run, "mask.sparsity")[-1]),
        last=last,
        mean_last=mean_last,
        num_averaged=num_averaged,
        final=final,
        at_budget=float(one.score[within[-1]]) if len(within) else math.nan,
        mib_to=math.nan if first is None else float(one.mib[first]),
        rounds_to=math.nan if first is None else float(one.rounds[first]),
        up=mib(run, "traffic.up.total_bits"),
        down=mib(run, "traffic.down.total_bits"),
        dense=sum(mib(run, f"traffic.dense.{way}_bits") for way in WAYS) or math.nan,
        values_up=mib(run, "traffic.up.values"),
        values_down=mib(run, "traffic.down.values"),
        masks=sum(mib(run, f"traffic.{way}.masks") for way in WAYS),
        flops=float(np.sum(flops(run))),
        dense_flops=float(np.sum(flops(run, "dense_"))),
    )


def _missing(
    members: Group,
    curves: Sequence[Curve],
    measures: Sequence[Measures],
    score: Score,
    budget: float,
    target: float,
) -> list[str]:
    """Say why a group has no number at the budget or the target."""
    tested = [one for one in curves if _known(one).any()]
    if not tested:
        return [f"{members.label} has no test with a finite {score.name} on record."]
    notes = []
    if all(math.isnan(one.at_budget) for one in measures):
        first = min(float(one.mib[_known(one)][0]) for one in tested)
        notes.append(
            f"{members.label} has no test within {budget:,.4g} MiB: it had sent {first:,.4g} MiB "
            "at its first."
        )
    if all(math.isnan(one.mib_to) for one in measures) and not math.isnan(target):
        best = max if score.is_better_if_higher else min
        found = best(float(best(one.score[_known(one)])) for one in tested)
        notes.append(
            f"{members.label} has not reached {score.text(target)}: its best test is "
            f"{score.text(found)}."
        )
    return notes
