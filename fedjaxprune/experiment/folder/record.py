"""The run folder: who made it and with what, one line a round, and the summary.

::

    config.yaml     complete config and versions of the packages
    metrics.jsonl   one line a round
    summary.json    written at the end
    checkpoints/
    accuracy.png    written at the end
    failed.json     if an error ended the run: see `failure`
"""

import collections
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from fedjaxprune import __version__
from fedjaxprune.experiment.config.flat import files
from fedjaxprune.experiment.config.flat.sections import RunConfig, UserError
from fedjaxprune.experiment.config.flat.validation import validate
from fedjaxprune.experiment.run import round_costs

try:
    import fcntl
except ImportError:  # no POSIX: two processes in one folder go unnoticed
    fcntl = None

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
CHECKPOINTS, PICTURE = "checkpoints", "accuracy.png"
SKIPPED = "checkpoints-skipped"  # those that could not be used, put aside
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpy",
    "orbax-checkpoint",
    "scikit-learn",
    "tensorflow-datasets",
    "array_record",
    "pydantic",
)


class RoundRecord(NamedTuple):
    """One line of the record; None for what was not evaluated or is not finite.

    Attributes:
      stage: name of the algorithm's stage.
      round: rounds completed, counted from 1 over all stages.
      train_loss: mean of the clients' local losses in the round.
      test_loss: mean over the test set: cross-entropy in nats, or the squared error.
      test_accuracy: fraction of the test set classified rightly; None for a regression.
      sparsity: pruned fraction of the prunable weights after the round.
      num_kept: live prunable weights after the round.
      num_changed: mask entries that the round flipped.
      uplink_bits: measured: the length of all messages from the clients.
      downlink_bits: measured: the length of all messages to the clients.
      mask_bits: measured: the masks' part of both.
      statistics_bits: measured: the part of untrained statistics (BatchNorm) of both.
      uplink_parts: measured: `uplink_bits` by kind, as `accounts.LinkBits` has them.
      downlink_parts: measured: `downlink_bits` by kind.
      client_bits: measured, by client: entries with `uplink_bits` and `downlink_bits` of each of
        the clients in `client_ids`.
      modeled_bits: modeled: `uplink` and `downlink` by the name of a published formula.
      num_participating: clients that took part.
      num_rejected: of those, clients left out because their message was not finite.
      modeled_flops: modeled, of the clients' training; see `round_costs.RoundCosts`.
      mean_coverage: measured; see `round_costs.RoundCosts`.
      mask_stability: measured; see `round_costs.RoundCosts`.
      wall_s: seconds that the round took, with its test.
      inference_flops: of a prediction, an example, with gates as the test measured them (see
        `round_costs.of_inference`); None without gates or without a test.
      vote_agreement: share of a layer's filters that two voters decide alike, mean over all pairs,
        by convolution in the network's order; None in rounds in which nobody votes on filters.
      layer_sparsity: pruned fraction of each prunable leaf after the round, by its path.
      client_accuracy: how `test_accuracy` spreads over the clients; see `spread`.
      test_error: mean absolute error of a regression, in the unit of its targets.
    """

    stage: str
    round: int
    train_loss: float | None
    test_loss: float | None
    test_accuracy: float | None
    sparsity: float
    num_kept: int
    num_changed: int
    uplink_bits: int
    downlink_bits: int
    mask_bits: int
    statistics_bits: int
    uplink_parts: dict
    downlink_parts: dict
    client_bits: list
    modeled_bits: dict
    num_participating: int
    num_rejected: int
    modeled_flops: dict | None
    mean_coverage: float
    mask_stability: float
    wall_s: float
    inference_flops: dict | None = None
    vote_agreement: list | None = None
    layer_sparsity: dict | None = None
    client_accuracy: dict | None = None
    test_error: float | None = None


def finite(value: Any) -> float | None:
    """Make a number fit for JSON, which has no NaN: None where it is not finite."""
    number = float(value)
    return number if math.isfinite(number) else None


def versions() -> dict[str, str]:
    """List what the run is made with."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "fedjaxprune": __version__,
        **packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def default_folder(config: RunConfig) -> pathlib.Path:
    """Name a new folder under ``runs/`` by method, data and time."""
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    data = config.dataset.replace("/", "-").replace(":", "-")
    folder = pathlib.Path("runs") / f"{config.algorithm}-{data}-{time}"
    number = 2
    while folder.exists():
        folder = folder.with_name(f"{config.algorithm}-{data}-{time}-{number}")
        number += 1
    return folder


def check_free(folder: pathlib.Path) -> None:
    """Check early that a run may start in `folder`, without touching anything.

    Raises:
      UserError: something is there already, or nothing can be written there.
    """
    try:
        if (folder / CONFIG).exists():
            raise UserError(
                f"out: the folder {str(folder)!r} holds a run already; continue it with "
                f"`fedjaxprune run --resume {folder}` or give a folder that does not exist."
            )
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"out: {str(folder)!r} exists and is no run; give a folder that is empty or does "
                "not exist."
            )
        parent = folder.absolute()
        while not parent.exists():
            parent = parent.parent
    except OSError as error:
        raise _unwritable(folder, error) from None
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        reason = "is not writable" if parent.is_dir() else "is no folder"
        raise UserError(
            f"out: cannot make the run folder {str(folder)!r}, as {str(parent)!r} {reason}; "
            "give a folder that can be written to."
        )


def _unwritable(folder: pathlib.Path, error: OSError) -> UserError:
    """Say that `folder` cannot be written to."""
    return UserError(
        f"out: cannot make the run folder {str(folder)!r} ({error.strerror or error}); "
        "give a folder that can be written to."
    )


def create(folder: pathlib.Path, config: RunConfig) -> None:
    """Make the run folder with its config in one step: it is whole or it is not there.

    Raises:
      UserError: the folder cannot be made.
    """
    check_free(folder)
    draft = folder.absolute().with_name(f".{folder.absolute().name}.new")
    try:
        shutil.rmtree(draft, ignore_errors=True)  # left by a run that was killed in this moment
        draft.mkdir(parents=True)
        text = files.to_yaml(config, versions=versions())
        (draft / CONFIG).write_text(text, encoding="utf-8")
        draft.rename(folder.absolute())
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise _unwritable(folder, error) from None


def stored(folder: pathlib.Path) -> tuple[RunConfig, dict[str, str]]:
    """Read a run's config and the versions that it was made with.

    Raises:
      UserError: there is no run in `folder`, or its config cannot be read.
    """
    path = folder / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"resume: {str(folder)!r} holds no run (no readable {CONFIG} in it); "
            "start one without --resume."
        ) from None
    values = files.read_yaml(text, source=str(path))
    config = validate(values, sources=dict.fromkeys(values, str(path)))
    made_with = files.read_versions(text, source=str(path))
    lost = [name for name in RunConfig.model_fields if name not in values and name != "out"]
    if made_with is None:
        lost.append(files.VERSIONS)
    if made_with is None or lost:  # defaults must not fill what was lost
        raise UserError(
            f"resume: {str(path)!r} is not the whole config of a run: "
            f"it lacks {', '.join(lost[:3])}{' and more' if len(lost) > 3 else ''}."
        )
    return config, made_with


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[None]:
    """Keep other processes from working in the same folder; a killed one lets go by itself.

    Raises:
      UserError: another process is at work in it.
    """
    with (folder / CONFIG).open("rb") as file:
        if fcntl is not None:
            for last in (False, False, True):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if last:
                        raise UserError(
                            f"another process is running in {str(folder)!r}; wait for its end."
                        ) from None
                    time.sleep(0.05)  # somebody may just be looking whether it runs
        yield


def append(folder: pathlib.Path, line: RoundRecord) -> None:
    """Write one round to the record, at once."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line._asdict(), allow_nan=False) + "\n")


def read(folder: pathlib.Path) -> list[RoundRecord]:
    """Read the record, but for a last line that a kill tore.

    Raises:
      UserError: a line that others follow is damaged, or the rounds are not in turn.
    """
    path = folder / METRICS
    try:
        *rows, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    lines: list[RoundRecord] = []
    for number, row in enumerate(rows, start=1):
        line = _parse(row)
        if line is None or line.round != number:
            if number == len(rows) and not torn and line is None:
                break
            raise UserError(
                f"the record {str(path)!r} is damaged in line {number}, which should be round "
                f"{number}; mend it or start a new run (nothing was changed)."
            )
        lines.append(line)
    return lines


def _parse(row: str) -> RoundRecord | None:
    """Read one line; None if it is none of a record."""
    try:
        line = RoundRecord(**json.loads(row))
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = RoundRecord.__annotations__.items()
    fits = (isinstance(getattr(line, name), kind) for name, kind in kinds)
    return line if all(fits) else None


def cut(folder: pathlib.Path, num_rounds: int) -> list[RoundRecord]:
    """Shorten the record to its first `num_rounds` rounds, in one step, and return them."""
    lines = read(folder)[:num_rounds]
    rows = [json.dumps(line._asdict(), allow_nan=False) + "\n" for line in lines]
    _replace(folder / METRICS, "".join(rows))
    return lines


def sync(folder: pathlib.Path) -> None:
    """Make the record durable, before a checkpoint relies on it."""
    with (folder / METRICS).open("rb") as file:
        os.fsync(file.fileno())


def summarize(lines: Sequence[RoundRecord]) -> dict[str, Any]:
    """Sum up a record: the last values, the mean of the last ten tests, totals.

    Tests of the last stage alone are averaged: before it, nothing has been trained that is to last.
    """
    tested = [line for line in lines if (line.test_accuracy, line.test_error) != (None, None)]
    end = lines[-1]
    own = [line for line in tested if line.stage == end.stage]
    last = [line.test_accuracy for line in own[-10:] if line.test_accuracy is not None]
    return {
        "num_rounds": end.round,
        "stage_rounds": dict(collections.Counter(line.stage for line in lines)),
        "test_accuracy": tested[-1].test_accuracy if tested else None,
        "test_accuracy_mean_of_last_10": math.fsum(last) / len(last) if last else None,
        "num_tests_averaged": len(last),
        "test_loss": tested[-1].test_loss if tested else None,
        "test_error": tested[-1].test_error if tested else None,
        "train_loss": end.train_loss,
        "sparsity": end.sparsity,
        "num_kept": end.num_kept,
        "uplink_bits": sum(line.uplink_bits for line in lines),
        "downlink_bits": sum(line.downlink_bits for line in lines),
        "mask_bits": sum(line.mask_bits for line in lines),
        "statistics_bits": sum(line.statistics_bits for line in lines),
        "uplink_parts": _totals(line.uplink_parts for line in lines),
        "downlink_parts": _totals(line.downlink_parts for line in lines),
        "stage_bits": _by_stage(lines),
        "client_bits": _by_client(lines),
        "modeled_bits": _modelled(lines),
        "num_rejected": sum(line.num_rejected for line in lines),
        **round_costs.summarize(lines),
        "wall_s": round(math.fsum(line.wall_s for line in lines), 3),
    }


def _totals(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Add up numbers by name."""
    total: collections.Counter[str] = collections.Counter()
    for part in parts:
        total.update(part)
    return dict(total)


def _by_stage(lines: Sequence[RoundRecord]) -> dict[str, dict[str, int]]:
    """Add up what each stage sent."""
    stages: dict[str, list[dict[str, int]]] = {}
    for line in lines:
        bits = {"uplink_bits": line.uplink_bits, "downlink_bits": line.downlink_bits}
        stages.setdefault(line.stage, []).append(bits)
    return {stage: _totals(bits) for stage, bits in stages.items()}


def _by_client(lines: Sequence[RoundRecord]) -> dict[str, Any]:
    """Say how the bits of both directions spread over the clients that were ever reached."""
    total: collections.Counter[int] = collections.Counter()
    for line in lines:
        for entry in line.client_bits:
            bits = entry["uplink_bits"] + entry["downlink_bits"]
            total.update(dict.fromkeys(entry["client_ids"], bits))
    if not total:
        return {"num_clients": 0, "mean": None, "largest": None}
    return {
        "num_clients": len(total),
        "mean": sum(total.values()) / len(total),
        "largest": max(total.values()),
    }


def _modelled(lines: Sequence[RoundRecord]) -> dict[str, dict[str, int]]:
    """Add up what each formula charges."""
    names = dict.fromkeys(name for line in lines for name in line.modeled_bits)
    return {name: _totals(line.modeled_bits.get(name, {}) for line in lines) for name in names}


def write_summary(folder: pathlib.Path, summary: dict[str, Any]) -> None:
    """Write the summary in one step."""
    _replace(folder / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")


def _replace(path: pathlib.Path, text: str) -> None:
    """Write a file so that it is never seen half written."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
