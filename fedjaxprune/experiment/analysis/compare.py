"""Runs side by side: seeds of one configuration merged, and numbers that can be compared.

Means and sample deviations are over the seeds. An accuracy is the mean of a run's last ten tests;
the accuracy at equal bytes is that of the last test before a run has sent more than the budget.
"""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjaxprune.experiment.config.flat import identity
from fedjaxprune.experiment.config.flat.sections import UserError
from fedjaxprune.experiment.folder import load
from fedjaxprune.experiment.folder.load import Run
from fedjaxprune.experiment.folder.record import RoundRecord
from fedjaxprune.experiment.run import round_costs

BITS_PER_MIB = 8 * 2**20
NUM_TESTS = 10  # whose mean is a run's accuracy
TASK = ("dataset",)  # what runs must have in common: accuracies are of its test set


class Group(NamedTuple):
    """Runs that differ in nothing but their seed.

    Attributes:
      label: what tells the configuration from the others.
      runs: by seed, ascending.
    """

    label: str
    runs: tuple[Run, ...]


class Curve(NamedTuple):
    """A run at its tests.

    Attributes:
      rounds: ``[T]`` completed.
      mib: ``[T]`` MiB sent until then, both ways, all clients.
      flops: ``[T]`` FLOPs of training until then, modeled; NaN where they are not known.
      accuracy: ``[T]`` fraction of the test set.
      loss: ``[T]`` test loss; NaN where it is not finite.
    """

    rounds: np.ndarray
    mib: np.ndarray
    flops: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray


class Measures(NamedTuple):
    """Numbers of one run; NaN for what is not known, or was not reached.

    Attributes:
      sparsity: at the end.
      accuracy: mean of the last ten tests.
      accuracy_at: of the last test within the budget of bytes.
      mib_to: MiB sent when the given accuracy was first reached.
      rounds_to: rounds completed then.
      up: MiB of all messages from the clients.
      down: MiB of all messages to the clients.
      values_up: of these, weights, deltas and gradients.
      values_down: the same of `down`.
      masks: MiB of masks, both ways.
      flops: FLOPs of training, modeled.
    """

    sparsity: float
    accuracy: float
    accuracy_at: float
    mib_to: float
    rounds_to: float
    up: float
    down: float
    values_up: float
    values_down: float
    masks: float
    flops: float


class Comparison(NamedTuple):
    """All that a table shows.

    Attributes:
      groups: in the order of the runs.
      measures: for each group those of its runs.
      budget: MiB at which accuracies are compared.
      target: accuracy to which costs are counted.
    """

    groups: tuple[Group, ...]
    measures: tuple[tuple[Measures, ...], ...]
    budget: float
    target: float


def group(found: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Put seeds of one configuration together.

    Returns:
      The groups in the order of their first runs, and notes on runs that are left out because
      another one has the same settings and seed.

    Raises:
      UserError: the runs are of different tasks.
    """
    first = found[0]
    for run, name in itertools.product(found, TASK):
        if run.config.get(name) != first.config.get(name):
            raise UserError(
                f"{str(first.folder)!r} and {str(run.folder)!r} cannot be compared: {name} is "
                f"{first.config.get(name)!r} in the one and {run.config.get(name)!r} in the other."
            )
    by_key: dict[str, dict[Any, Run]] = {}
    notes = []
    for run in found:
        key = json.dumps(identity.configuration(run.config), sort_keys=True, default=str)
        seeds = by_key.setdefault(key, {})
        seed = run.config.get(identity.SEED)
        other = seeds.setdefault(seed, run)
        if other is not run:
            kept, left = (run, other) if _rank(run) > _rank(other) else (other, run)
            seeds[seed] = kept
            notes.append(
                f"{str(left.folder)!r} is left out: it has the settings and the seed of "
                f"{str(kept.folder)!r}."
            )
    members = [list(seeds.values()) for seeds in by_key.values()]
    labels = _labels([runs_[0].config for runs_ in members])
    groups = [
        Group(label=label, runs=tuple(sorted(runs_, key=_seed)))
        for label, runs_ in zip(labels, members, strict=True)
    ]
    return groups, notes


def _rank(run: Run) -> tuple[bool, int]:
    """Prefer finished runs, then longer ones."""
    return run.state == "finished", len(run.lines)


def _seed(run: Run) -> int:
    seed = run.config.get(identity.SEED)
    return seed if isinstance(seed, int) else -1


def _labels(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Name configurations by their methods and by what else differs among them."""
    shown = [identity.configuration(config) for config in configs]
    names = dict.fromkeys(name for config in shown for name in config)
    differing = [
        name
        for name in names
        if name != "algorithm" and len({repr(c[name]) for c in shown if name in c}) > 1
    ]
    # What is alike among all that have it still tells those apart that lack it (fedavg and feddip).
    labels = []
    for config in shown:
        parts = [str(config.get("algorithm"))]
        parts += [f"{name} {config[name]}" for name in differing if name in config]
        labels.append(", ".join(parts))
    return [
        label if labels.count(label) == 1 else f"{label} ({number})"
        for number, label in enumerate(labels, start=1)
    ]


def curve(run: Run) -> Curve:
    """Read a run at its tests."""
    mib = np.cumsum([(line.uplink_bits + line.downlink_bits) / BITS_PER_MIB for line in run.lines])
    flops = np.cumsum([round_flops(line) for line in run.lines])
    at = [n for n, line in enumerate(run.lines) if line.test_accuracy is not None]
    tested = [run.lines[n] for n in at]
    return Curve(
        rounds=np.array([line.round for line in tested], np.int64),
        mib=mib[at],
        flops=flops[at],
        accuracy=np.array([line.test_accuracy for line in tested], np.float64),
        loss=np.array([_number(line.test_loss) for line in tested], np.float64),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def round_flops(line: RoundRecord) -> float:
    """Add up a round's FLOPs of training under masks; NaN where they are not known."""
    entry = line.modeled_flops
    return math.nan if not entry else float(sum(entry.get(p, 0) for p in round_costs.PARTS))


def counted(members: Group) -> tuple[Run, ...]:
    """Choose the runs whose numbers stand for a group: the finished ones, or all if none is."""
    return tuple(run for run in members.runs if run.state == "finished") or members.runs


def compare(
    groups: Sequence[Group], *, budget: float | None = None, target: float | None = None
) -> Comparison:
    """Measure every group.

    Args:
      groups: what to compare.
      budget: MiB at which accuracies are compared; None for the smallest total of a run.
      target: accuracy to which costs are counted; None for the lowest mean of a group, rounded
        down to a whole per cent. Neither is taken from runs that have not finished, if any has.
    """
    curves = [[curve(run) for run in counted(members)] for members in groups]
    done = [members for members in groups if counted(members)[0].state == "finished"] or groups
    if budget is None:
        budget = min(_total(run) for members in done for run in counted(members))
    if target is None:
        finals = [mean([_final(run) for run in counted(members)]) for members in done]
        known = [value for value in finals if not math.isnan(value)]
        target = math.floor(100 * min(known)) / 100 if known else math.nan
    measures = [
        tuple(
            _measure(run, one, budget, target)
            for run, one in zip(counted(members), several, strict=True)
        )
        for members, several in zip(groups, curves, strict=True)
    ]
    return Comparison(groups=tuple(groups), measures=tuple(measures), budget=budget, target=target)


def _total(run: Run) -> float:
    return sum(line.uplink_bits + line.downlink_bits for line in run.lines) / BITS_PER_MIB


def _final(run: Run) -> float:
    """Average the last tests of the stage that the run ends with."""
    tests = [
        line.test_accuracy
        for line in run.lines
        if line.stage == run.lines[-1].stage and line.test_accuracy is not None
    ]
    return mean(tests[-NUM_TESTS:])


def _measure(run: Run, one: Curve, budget: float, target: float) -> Measures:
    within = np.flatnonzero(one.mib <= budget * (1 + 1e-9))
    reached = np.flatnonzero(one.accuracy >= target)
    first = int(reached[0]) if len(reached) else None
    values_up, values_down = parts(run, "up").get("values"), parts(run, "down").get("values")
    return Measures(
        sparsity=run.lines[-1].sparsity,
        accuracy=_final(run),
        accuracy_at=float(one.accuracy[within[-1]]) if len(within) else math.nan,
        mib_to=math.nan if first is None else float(one.mib[first]),
        rounds_to=math.nan if first is None else float(one.rounds[first]),
        up=sum(line.uplink_bits for line in run.lines) / BITS_PER_MIB,
        down=sum(line.downlink_bits for line in run.lines) / BITS_PER_MIB,
        values_up=_number(values_up) / BITS_PER_MIB,
        values_down=_number(values_down) / BITS_PER_MIB,
        masks=sum(line.mask_bits for line in run.lines) / BITS_PER_MIB,
        flops=sum(round_flops(line) for line in run.lines),
    )


def parts(run: Run, direction: str) -> dict[str, int]:
    """Add up a run's bits in one direction (``"up"`` or ``"down"``) by kind.

    Records from before the ledger had all masks on the way down and no framing; what they had of
    statistics cannot be told apart by direction, and such runs have no parts.
    """
    total: dict[str, int] = {}
    for line in run.lines:
        kinds = line.uplink_parts if direction == "up" else line.downlink_parts
        if not kinds and not line.statistics_bits:
            masks = 0 if direction == "up" else line.mask_bits
            bits = line.uplink_bits if direction == "up" else line.downlink_bits
            kinds = {"values": bits - masks, "masks": masks}
        for kind, bits in kinds.items():
            total[kind] = total.get(kind, 0) + bits
    return total


def mean(values: Sequence[float]) -> float:
    """Average what is known; NaN where nothing is."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def deviation(values: Sequence[float]) -> float:
    """Take the sample deviation of what is known; NaN for fewer than two values."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.stdev(known) if len(known) > 1 else math.nan


def states(members: Group) -> str:
    """Say how the runs of a group stand, where they are not all finished."""
    if all(run.state == "finished" for run in members.runs):
        return ""
    return "; ".join(
        f"seed {run.config.get(identity.SEED)} {load.standing(run)}"
        for run in members.runs
        if run.state != "finished"
    )
