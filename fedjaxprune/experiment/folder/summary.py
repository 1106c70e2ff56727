"""``summary.json``: the last values of a record, means and totals."""

import collections
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedjaxprune.experiment.folder import client_ids
from fedjaxprune.experiment.folder.layout import SCHEMA, SUMMARY, replace
from fedjaxprune.experiment.folder.record import Line, value

_AVERAGED = 10  # last tests


def summarize(header: Mapping[str, Any], lines: Sequence[Line]) -> dict[str, Any]:
    """Sum up a record of at least one round.

    Traffic and FLOPs are totals over rounds and clients. Accuracies are averaged over tests of the
    last stage alone: before it, nothing has been trained that is to last.
    """
    end = lines[-1]
    tested = [line for line in lines if value(line, "test.loss") is not None or line.get("test")]
    own = [line for line in tested if line["stage"] == end["stage"]]
    accuracies = [value(line, "test.accuracy") for line in own[-_AVERAGED:]]
    last = [one for one in accuracies if one is not None]
    coverage = [value(line, "mask.clients_per_weight") or 0.0 for line in lines]
    unchanged = [value(line, "mask.unchanged_fraction") or 0.0 for line in lines]
    newest = tested[-1]["test"] if tested else {}
    return {
        "schema": SCHEMA,
        "num_rounds": end["round"],
        "stages": dict(collections.Counter(line["stage"] for line in lines)),
        "train": {"loss": value(end, "train.loss")},
        "test": {
            **{name: newest.get(name) for name in ("loss", "accuracy", "error")},
            "accuracy_mean_last_10": math.fsum(last) / len(last) if last else None,
            "num_tests_averaged": len(last),
        },
        "mask": {
            "sparsity": value(end, "mask.sparsity"),
            "num_live": value(end, "mask.num_live"),
            "num_prunable": header.get("num_prunable"),
            "num_weights": header.get("num_weights"),
            "clients_per_weight": math.fsum(coverage),
            "unchanged_fraction": math.fsum(unchanged) / len(unchanged),
        },
        "traffic": {
            **{
                way: _totals(value(line, f"traffic.{way}") for line in lines)
                for way in ("up", "down", "dense")
            },
            "by_stage": _by_stage(lines),
            "by_client": _by_client(lines),
            "published": _published(lines),
        },
        "compute": _compute(lines),
        "clients": {"rejected": sum(value(line, "clients.rejected") or 0 for line in lines)},
        "time_s": round(math.fsum(line.get("time_s") or 0.0 for line in lines), 3),
    }


def write(folder: pathlib.Path, summary: Mapping[str, Any]) -> None:
    """Write the summary in one step."""
    replace(folder / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")


def _totals(parts: Iterable[Mapping[str, int] | None]) -> dict[str, int]:
    """Add up numbers by name."""
    total: collections.Counter[str] = collections.Counter()
    for part in parts:
        total.update(part or {})
    return dict(total)


def _by_stage(lines: Sequence[Line]) -> dict[str, dict[str, int]]:
    """Add up what each stage sent."""
    stages: dict[str, list[dict[str, int]]] = {}
    for line in lines:
        bits = {f"{way}_bits": value(line, f"traffic.{way}.total_bits") for way in ("up", "down")}
        stages.setdefault(line["stage"], []).append(bits)
    return {stage: _totals(bits) for stage, bits in stages.items()}


def _by_client(lines: Sequence[Line]) -> dict[str, Any]:
    """Say how the bits of both directions spread over the clients that were ever reached."""
    total: collections.Counter[int] = collections.Counter()
    for line in lines:
        for entry in value(line, "traffic.by_client") or ():
            bits = entry["up_bits"] + entry["down_bits"]
            total.update(dict.fromkeys(client_ids.of_text(entry["client_ids"]), bits))
    mean = sum(total.values()) / len(total) if total else None
    largest = max(total.values(), default=None)
    return {"num_clients": len(total), "mean_bits": mean, "largest_bits": largest}


def _published(lines: Sequence[Line]) -> dict[str, dict[str, int]]:
    """Add up what each published formula charges."""
    each = [value(line, "traffic.published") or {} for line in lines]
    names = dict.fromkeys(name for one in each for name in one)
    return {name: _totals(one.get(name) for one in each) for name in names}


def _compute(lines: Sequence[Line]) -> dict[str, Any]:
    """Add up the FLOPs of training, and take those of a prediction from the last test."""
    each = [value(line, "compute.training_flops") for line in lines]
    found: dict[str, Any] = {"training_flops": None if None in each else _totals(each)}
    predictions = [one for line in lines if (one := value(line, "compute.inference_flops"))]
    times = [one for line in lines if (one := value(line, "compute.client_time"))]
    names = ("seconds", "overlapped_seconds")
    return (
        found
        | ({"inference_flops": predictions[-1]} if predictions else {})
        | (
            {"client_time": {n: math.fsum(value(one, n) or 0.0 for one in times) for n in names}}
            if times
            else {}
        )
    )
