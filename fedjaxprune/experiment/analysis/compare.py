"""Numbers of runs that can be compared: scores, and what they cost.

Means and sample deviations are over the seeds. The score of a classification is its accuracy; that
of a regression is its mean absolute error. The score at equal bytes is that of the last test before
a run had sent more than the budget.
"""

import math
import pathlib
import statistics
from collections.abc import Iterable, Iterator, Sequence
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
    """What a test measures."""

    path: str  # in the record
    name: str
    unit: str  # that it is shown in; empty for that of the targets
    scale: float  # from the record to that unit
    is_better_if_higher: bool

    def text(self, number: float, digits: int = 2) -> str:
        """Write a score of the record with its unit."""
        if self.unit:
            return f"{self.scale * number:.{digits}f} {self.unit}"
        return f"{number:.4g}"


ACCURACY = Score("test.accuracy", "accuracy", "%", 100.0, True)
ERROR = Score("test.error", "error", "", 1.0, False)


class Curve(NamedTuple):
    """A run at its tests, ``[T]`` each; NaN for what is not known."""

    run: RunData
    rounds: np.ndarray  # completed
    mib: np.ndarray  # MiB sent until then, both ways, all clients
    flops: np.ndarray  # FLOPs of training until then, modeled
    seconds: np.ndarray  # of the clients' devices until then, modeled
    score: np.ndarray  # as the record has it
    loss: np.ndarray  # test loss


class Measures(NamedTuple):
    """Numbers of one run; NaN for what is not known, or was not reached."""

    sparsity: float  # at the end
    last: float  # score of the last test
    mean_last: float  # mean score of the last tests, at most ten, of the last stage
    num_averaged: int  # how many tests that mean is of
    # `mean_last` where at least twice as many tests were made, else `last`: the mean of a short run
    # would be of its beginning, too.
    final: float
    at_budget: float  # score of the last test within the budget of bytes
    mib_to: float  # MiB sent when the target was first reached
    rounds_to: float  # rounds completed then
    up: float  # MiB of all messages from the clients
    down: float  # MiB of all messages to the clients
    dense: float  # MiB that 32 bits a value would take, both ways
    values_up: float  # of `up`, weights, deltas and gradients
    values_down: float  # the same of `down`
    masks: float  # MiB of masks, both ways
    flops: float  # FLOPs of training, modeled
    dense_flops: float  # the same as if nothing were pruned
    seconds: float  # of the clients' devices, modeled
    overlapped_seconds: float  # the same if messages and arithmetic overlap


class Comparison(NamedTuple):
    """All that a table shows."""

    groups: tuple[Group, ...]  # in the order of the runs
    measures: tuple[tuple[Measures, ...], ...]  # for each group those of its runs
    score: Score  # what tests measure
    budget: float  # MiB at which scores are compared
    target: float  # score to which costs are counted
    notes: tuple[str, ...]  # where budget and target come from, and why numbers are missing
    # Whether there are several groups, or a budget or target was given; without, the numbers at
    # these say nothing.
    is_relative: bool


def of_folders(
    folders: Iterable[str | pathlib.Path],
    *,
    at_mib: float | None = None,
    to_accuracy: float | None = None,
) -> tuple[Comparison, list[str]]:
    """Compare runs, or all runs in folders of runs; imports no part that they name.

    The accuracy is a fraction of the test set. The notes are on runs that are left out and on what
    makes the comparison doubtful.
    """
    found, notes = load.read_all(folders)
    groups, more = groups_lib.group(found)
    return compare(groups, budget=at_mib, target=to_accuracy), [*notes, *more]


def compare(
    groups: Sequence[Group], *, budget: float | None = None, target: float | None = None
) -> Comparison:
    """Measure every group.

    The budget is in MiB; None stands for the least that a run sent in all, or where that is more,
    what every run had sent at its first test. The target is an accuracy; None stands for what every
    run reached at its end. Both are taken from finished runs, if there are any.
    """
    score = score_of(groups)
    if target is not None and score is ERROR:
        raise ConfigError(
            f"--to-accuracy must be left out, got {100 * target:g}: these runs are of a "
            "regression, which has no accuracy."
        )
    curves = [[curve(run, score) for run in groups_lib.counted(members)] for members in groups]
    done = [n for n, members in enumerate(groups) if groups_lib.is_finished(members)]
    shown = [one for n in done or range(len(groups)) for one in curves[n]]
    notes: list[str] = []
    is_relative = len(groups) > 1 or budget is not None or target is not None
    if budget is None:
        least = min(sum(sent(one.run)) for one in shown)
        first = max(map(_mib_at_first, _tested(shown)), default=0.0)
        budget, why = max(
            (least, "the least that a run sent in all"),
            (first, "what every run had sent at its first test"),
            key=lambda pair: pair[0],
        )
        notes.append(f"{budget:,.4g} MiB is {why}.")
    if target is None:
        target = _reached_by_all([one.run for one in shown], score)
        if not math.isnan(target):
            who = "every finished run reached" if done else "every run has reached"
            notes.append(f"{who} {score.text(target, 0)}.")
    measures = tuple(
        tuple(_measure(one, score, budget, target) for one in several) for several in curves
    )
    made = Comparison(tuple(groups), measures, score, budget, target, (), is_relative)
    return made._replace(notes=(*(notes if is_relative else ()), *_missing(made, curves)))


def score_of(groups: Sequence[Group]) -> Score:
    """Choose what is compared: errors where there are no accuracies."""
    runs = [run for members in groups for run in members.runs]
    found = (one for one in (ACCURACY, ERROR) if any(known(load.column(r, one.path)) for r in runs))
    return next(found, ACCURACY)


def curve(run: RunData, score: Score) -> Curve:
    """Read a run at its tests."""
    values, loss = load.column(run, score.path), load.column(run, "test.loss")
    at = np.flatnonzero(~np.isnan(values) | ~np.isnan(loss))
    rounds = np.array([run.lines[n]["round"] for n in at], np.int64)
    mib, done, taken = (np.cumsum(each)[at] for each in (sent(run), flops(run), seconds(run)))
    return Curve(run, rounds, mib, done, taken, values[at], loss[at])


def flops(run: RunData, prefix: str = "") -> np.ndarray:
    """Add up each round's FLOPs of training, ``[rounds]``; NaN where they are not known.

    The prefix is empty for those under the masks, ``dense_`` for those as if nothing were pruned.
    """
    return sum(
        (load.column(run, f"compute.training_flops.{prefix}{name}") for name in PASSES),
        start=np.zeros(len(run.lines)),
    )


def seconds(run: RunData, prefix: str = "") -> np.ndarray:
    """Read each round's modeled time, ``[rounds]``; NaN where it is not modeled.

    The prefix is ``overlapped_`` for that of messages and arithmetic at once.
    """
    return load.column(run, f"compute.client_time.{prefix}seconds")


def mib(run: RunData, path: str) -> float:
    """Add up a number of bits over the rounds, in MiB; 0 where it is nowhere in the record."""
    return float(np.nansum(load.column(run, path))) / BITS_PER_MIB


def known(values: Iterable[float]) -> list[float]:
    """Leave out NaN."""
    return [value for value in values if not math.isnan(value)]


def mean(values: Sequence[float]) -> float:
    """Average what is known; NaN where nothing is."""
    return statistics.fmean(known(values)) if known(values) else math.nan


def deviation(values: Sequence[float]) -> float:
    """Take the sample deviation of what is known; NaN for fewer than two values."""
    return statistics.stdev(known(values)) if len(known(values)) > 1 else math.nan


def _tested(curves: Iterable[Curve]) -> list[Curve]:
    return [one for one in curves if known(one.score)]


def _mib_at_first(one: Curve) -> float:
    return float(one.mib[~np.isnan(one.score)][0])


def sent(run: RunData) -> np.ndarray:
    """Give the MiB of all messages of each round, both ways, ``[rounds]``."""
    ways = [np.nan_to_num(load.column(run, f"traffic.{way}.total_bits")) for way in WAYS]
    return sum(ways, start=np.zeros(len(run.lines))) / BITS_PER_MIB


def _reached_by_all(runs: Iterable[RunData], score: Score) -> float:
    """Round the worst final score, to whole per cents or two digits, to what all reached."""
    finals = known(_finals(run, score)[3] for run in runs)
    if not finals:
        return math.nan
    if score.is_better_if_higher:
        return math.floor(100 * min(finals) + 1e-9) / 100
    worst = max(finals)
    unit = 10.0 ** (math.floor(math.log10(worst)) - 1) if worst > 0 else 1.0
    return math.ceil(worst / unit - 1e-9) * unit


def _finals(run: RunData, score: Score) -> tuple[float, float, int, float]:
    """Give the last score, the mean of the last ones, their number, and which is final."""
    stage = run.lines[-1]["stage"]
    own = np.array([line["stage"] == stage for line in run.lines])
    tests = known(load.column(run, score.path)[own].tolist())
    if not tests:
        return math.nan, math.nan, 0, math.nan
    averaged = tests[-NUM_TESTS:]
    average = statistics.fmean(averaged)
    return tests[-1], average, len(averaged), average if len(tests) >= 2 * NUM_TESTS else tests[-1]


def _measure(one: Curve, score: Score, budget: float, target: float) -> Measures:
    run, sign = one.run, 1.0 if score.is_better_if_higher else -1.0
    within = np.flatnonzero(~np.isnan(one.score) & (one.mib <= budget * (1 + 1e-9)))
    reached = np.flatnonzero(sign * one.score >= sign * target - 1e-12)
    return Measures(
        float(load.column(run, "mask.sparsity")[-1]),
        *_finals(run, score),
        at_budget=float(one.score[within[-1]]) if len(within) else math.nan,
        mib_to=float(one.mib[reached[0]]) if len(reached) else math.nan,
        rounds_to=float(one.rounds[reached[0]]) if len(reached) else math.nan,
        up=mib(run, "traffic.up.total_bits"),
        down=mib(run, "traffic.down.total_bits"),
        dense=sum(mib(run, f"traffic.dense.{way}_bits") for way in WAYS) or math.nan,
        values_up=mib(run, "traffic.up.values"),
        values_down=mib(run, "traffic.down.values"),
        masks=sum(mib(run, f"traffic.{way}.masks") for way in WAYS),
        flops=float(np.sum(flops(run))),
        dense_flops=float(np.sum(flops(run, "dense_"))),
        seconds=float(np.sum(seconds(run))),
        overlapped_seconds=float(np.sum(seconds(run, "overlapped_"))),
    )


def _missing(compared: Comparison, curves: Sequence[Sequence[Curve]]) -> Iterator[str]:
    """Say why a group has no number at the budget or the target."""
    score, budget, target = compared.score, compared.budget, compared.target
    for members, several, own in zip(compared.groups, curves, compared.measures, strict=True):
        tested = _tested(several)
        if not tested:
            yield f"{members.label} has no test with a finite {score.name} on record."
            continue
        if not known(one.at_budget for one in own):
            yield (
                f"{members.label} has no test within {budget:,.4g} MiB: it had sent "
                f"{min(map(_mib_at_first, tested)):,.4g} MiB at its first."
            )
        if not known(one.mib_to for one in own) and not math.isnan(target):
            best = max if score.is_better_if_higher else min
            found = best(value for one in tested for value in known(one.score))
            yield (
                f"{members.label} has not reached {score.text(target)}: its best test is "
                f"{score.text(float(found))}."
            )
