"""``--chunk-size auto``: how many clients train side by side, by a short measured trial.

What a chunk costs depends on the network, the batch and the device, and nobody should have to know
how. So a few steps of local training are timed with 1, 2, 4, ... clients at once (`chunk_trial`)
until more of them are slower or do not fit, and the fastest is taken. What was measured is kept in
the user's cache folder: the same network on the same machine is not tried again.

A trial costs compilations, so it begins, and continues, only where the run is long enough to save
more than that. Other sizes differ in rounding only; a run keeps the size that it began with.
"""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fedjaxprune.experiment import reading
from fedjaxprune.experiment.folder import layout
from fedjaxprune.kernels import side_by_side

FILE = "chunk_size.json"  # in the run folder
CACHED = "chunk_sizes.json"  # in the cache folder
TIE = 0.04  # sizes whose speeds differ by less are alike, and the smaller is taken
SHARE = 0.1  # of the time that a run trains: what its trial may take, compiling included
_DRAWS = 16  # cohorts that say how well chunks are used

Rate = float | None  # examples per second on all devices; None for what does not fit
MeasureFn = Callable[[int], Rate]
WarnFn = Callable[[str], object]


class Work(NamedTuple):
    """What there is to do, as far as the choice depends on it."""

    steps: np.ndarray  # ``[N]`` local steps of each client in a round
    batch_size: int  # examples of a step
    cohort_size: int  # clients of a round
    devices: int  # that share a cohort
    num_rounds: int

    @property
    def largest(self) -> int:
        """The largest chunk: all clients that a device has."""
        return -(-self.cohort_size // self.devices)

    @property
    def num_examples(self) -> float:
        """Examples that the run trains on, about."""
        per_round = float(np.mean(self.steps)) * self.batch_size * self.cohort_size
        return per_round * self.num_rounds


class Estimate(NamedTuple):
    """What is expected before anything was measured, in seconds."""

    training_s: float  # that the run trains
    trial_s: float  # that the first size of a trial takes, compiling included


UNKNOWN = Estimate(training_s=math.inf, trial_s=0.0)


class Figure(NamedTuple):
    """What a trial of one size found."""

    rate: Rate  # examples per second on all devices; None if it does not fit in memory
    cost_s: float  # seconds that the trial took


class Choice(NamedTuple):
    """The size that was chosen, and why."""

    size: int  # clients that train at once
    figures: Mapping[int, Figure]  # what trials found, by chunk size
    # share of a chunk's work that is some client's: the rest is filling, where clients take
    # different numbers of steps or the chunk does not divide the cohort
    used: Mapping[int, float]
    sentence: str
    way: side_by_side.Way | None = None  # to convolve clients at once; None if ways were not tried


def candidates(largest: int) -> list[int]:
    """List the sizes that may be tried: powers of 2, and all clients of a device."""
    powers = [2**i for i in range(largest.bit_length())]
    return powers if powers[-1] == largest else [*powers, largest]


def used(work: Work, size: int) -> float:
    """Compute what share of the steps of chunks of `size` are some client's own, on average.

    Clients of a chunk wait for the one with most steps. Cohorts are dealt out as `cohort.run` does
    it: clients of like size share a chunk.
    """
    rng = np.random.default_rng(0)
    own = paid = 0.0
    for _ in range(_DRAWS):
        drawn = rng.choice(work.steps.size, work.cohort_size, replace=False)
        steps = np.sort(work.steps[drawn])[::-1]
        own += steps.sum()
        longest = [steps[device :: work.devices][::size].sum() for device in range(work.devices)]
        paid += max(longest) * size * work.devices
    return own / paid if paid else 1.0


def choose(
    work: Work,
    measure: MeasureFn,
    known: Mapping[int, Figure],
    *,
    estimate: Estimate = UNKNOWN,
    share: float = SHARE,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """Choose the fastest chunk size, measuring what is not known.

    Sizes are tried in order until one is slower than the best or does not fit, or until trying one
    more, at the price of the last, would take more than a share of the run's training.
    """
    if work.largest == 1:
        return _one("a device has one client a round, so there is nothing to choose")
    figures: dict[int, Figure] = {}
    shares: dict[int, float] = {}
    speeds: dict[int, float] = {}
    expected, cost = estimate
    spent, ending = 0.0, ""
    for size in candidates(work.largest):
        if size not in known:
            if spent + cost > share * expected:
                ending = f"; more were not tried in a run that trains for {_seconds(expected)}"
                break
            before = clock()
            rate = measure(size)
            figures[size] = Figure(rate, clock() - before)
            spent += figures[size].cost_s
        else:
            figures[size] = known[size]
        rate, cost = figures[size]
        if rate is None:
            ending = f"; {size} do not fit in memory"
            break
        shares[size] = used(work, size)
        speeds[size] = rate * shares[size]
        expected = work.num_examples / max(speeds.values())
        if speeds[size] < (1 - TIE) * max(speeds.values()):
            break
    if not figures:
        return _one(f"no trial, as the run trains for about {_seconds(expected)} only")
    if not speeds:
        return _one("not even one client at a time fits in memory")._replace(figures=figures)
    best = max(speeds.values())
    size = min(size for size, speed in speeds.items() if speed >= (1 - TIE) * best)
    told = ", ".join(f"{speed:,.0f} with {size}" for size, speed in speeds.items())
    when = f"measured in {_seconds(spent)}" if spent else "measured earlier"
    sentence = f"chunk size {size} (auto): examples/s {told}, {when}{ending}."
    return Choice(size, figures, shares, sentence)


def fastest(choices: Mapping[side_by_side.Way, Choice]) -> Choice:
    """Take the way of convolving clients that trains fastest; of those that are alike the first.

    Where no size was tried with the first one, it is the choice, and no way.
    """

    def speed(choice: Choice) -> float:
        shares = choice.used.items()
        return max((share * (choice.figures[n].rate or 0.0) for n, share in shares), default=0.0)

    first, *_ = choices.values()
    if not first.used:
        return first
    best = max(map(speed, choices.values()))
    way, found = next(pair for pair in choices.items() if speed(pair[1]) >= (1 - TIE) * best)
    told = "; ".join(f"{one}: {choice.sentence}" for one, choice in choices.items())
    sentence = f"chunk size {found.size}, convolutions {way} (auto). {told}"
    return found._replace(way=way, sentence=sentence)


def _one(reason: str) -> Choice:
    """Let clients train one by one."""
    return Choice(1, {}, {}, f"chunk size 1 (auto): {reason}.")


def _seconds(value: float) -> str:
    """Write a number of seconds with two digits."""
    return f"{value:,.1f} s" if value < 9.95 else f"{value:,.0f} s"


def folder() -> pathlib.Path:
    """Find the command's cache folder: in ``XDG_CACHE_HOME``, else in ``~/.cache``."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from None
    return pathlib.Path(base) / "fedjaxprune"


def save(key: str, figures: Mapping[int, Figure]) -> None:
    """Keep what was found; where a folder cannot be written to, nothing is kept."""
    with contextlib.suppress(OSError):
        path = folder() / CACHED
        path.parent.mkdir(parents=True, exist_ok=True)
        everything = _read(lambda sentence: None)
        merged = {**_figures(everything.get(key, {})), **figures}
        everything[key] = _plain({size: merged[size] for size in sorted(merged)})
        layout.replace(path, json.dumps(everything, indent=1))


def _read(warn: WarnFn) -> dict[str, Any]:
    """Read what earlier trials found; a file that is not sound is as good as none."""
    path = pathlib.Path(CACHED)
    try:
        path = folder() / CACHED
        found = reading.from_json(reading.text(path, may_link=True))
        for figures in found.values():
            _figures(figures)
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, KeyError, OverflowError):
        warn(
            f"the file of measured chunk sizes {str(path)!r} is damaged and not used; the next "
            "trial writes it anew."
        )
        return {}


def _plain(figures: Mapping[int, Figure]) -> dict[str, Any]:
    """Write figures for JSON."""
    return {
        str(size): {"examples_per_s": figure.rate, "trial_s": round(figure.cost_s, 3)}
        for size, figure in figures.items()
    }


def _figures(found: Any) -> dict[int, Figure]:
    """Read what `_plain` wrote; one of Python's errors if it is something else."""
    figures = {}
    for size, values in found.items():
        rate, cost = values["examples_per_s"], float(values["trial_s"])
        rate = None if rate is None else float(rate)
        if int(size) < 1 or not (rate is None or 0 < rate < math.inf) or not 0 <= cost < math.inf:
            raise ValueError(f"no figure: {size}: {values}")
        figures[int(size)] = Figure(rate, cost)
    return figures


def auto(
    work: Work,
    measure: MeasureFn,
    *,
    key: str,
    estimate: Callable[[], Estimate],
    warn: WarnFn,
    share: float = SHARE,
) -> Choice:
    """Choose by what the cache holds and a trial of the rest, which the cache then holds too.

    It does not hold what did not fit: another time there may be more memory.
    """
    known = _figures(_read(warn).get(key, {})) if work.largest > 1 else {}
    first = UNKNOWN if known or work.largest == 1 else estimate()
    choice = choose(work, measure, known, estimate=first, share=share)
    measured = {size: one for size, one in choice.figures.items() if size not in known}
    if found := {size: one for size, one in measured.items() if one.rate is not None}:
        save(key, found)
    return choice


def to_text(choice: Choice) -> str:
    """Write a choice for a run folder."""
    record = {
        "chunk_size": choice.size,
        **({} if choice.way is None else {"convolutions": choice.way}),
        "figures": _plain(choice.figures),
        "used": {str(size): round(share, 4) for size, share in choice.used.items()},
        "sentence": choice.sentence,
    }
    return json.dumps(record, indent=1) + "\n"


def local_steps(sizes: np.ndarray, config: Any) -> np.ndarray:
    """Count the local steps of clients that hold `sizes` examples, ``[N]``."""
    section = config.client
    if section.steps is not None:
        return np.where(sizes > 0, section.steps, 0)
    return section.epochs * -(-sizes // section.batch_size)
