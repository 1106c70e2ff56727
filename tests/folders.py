"""Run folders with a record that can be checked by hand, made without a run."""

import copy
import json
import pathlib

import numpy as np
import yaml

from fedjaxprune.experiment.folder import layout

MIB = 8 * 2**20
VERSIONS = {"fedjaxprune": "0", "jax": "0"}
CONFIG = {
    "method": {"name": "fedavg"},
    "model": {"name": "mlp", "hidden_size": 64},
    "data": {
        "dataset": {"name": "digits"},
        "partition": {"name": "iid"},
        "num_clients": 6,
        "normalize": False,
        "augment": False,
    },
    "federation": {
        "num_rounds": 100,
        "cohort_size": 3,
        "sampling": {"name": "uniform"},
        "attack": {"name": "none"},
        "dropout_rate": 0.0,
    },
    "client": {
        "epochs": 2,
        "steps": None,
        "batch_size": 16,
        "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.0},
        "learning_rate_decay": 0.998,
        "proximal_mu": 0.0,
        "correction": {"name": "none"},
        "hardware": {"name": "none"},
    },
    "server": {
        "optimizer": {"name": "fedavg", "server_learning_rate": 1.0},
        "aggregator": {"name": "weighted_mean"},
        "data_fraction": None,
    },
    "uplink": {"name": "identity", "error_feedback": False, "whole_below": 0},
    "downlink": {"name": "identity"},
    "evaluation": {"every": 1, "start": 1},
    "checkpoints": {"every": 10, "keep": 3},
    "execution": {"devices": "auto", "chunk_size": 1, "compute_dtype": "float32"},
    "seed": 0,
}


def changed(tree, changes):
    """Give a nested dict with other values at some dotted paths; ... takes a field away."""
    made = copy.deepcopy(tree)
    for path, value in changes.items():
        *sections, name = path.split(".")
        place = made
        for section in sections:
            place = place.setdefault(section, {})
        if value is ...:
            del place[name]
        else:
            place[name] = value
    return made


def line(round, *, accuracy=None, mib=2, stage="train", stage_round=None, changes=None):
    """Make a line in which clients and server have sent `mib` MiB, half of them each."""
    bits = mib * MIB // 2
    kinds = dict.fromkeys(("values", "indices", "masks", "statistics", "framing"), 0)
    tested = accuracy is not None
    made = {
        "round": round,
        "stage": stage,
        "stage_round": stage_round or round,
        "train": {"loss": 1.0},
        "test": {"loss": 2.0 - accuracy, "accuracy": accuracy, "error": None} if tested else {},
        "mask": {
            "num_live": 500,
            "num_changed": 100,
            "sparsity": 0.5,
            "sparsity_by_layer": {"a/kernel": 0.25 if round < 3 else 0.75, "b/kernel": 0.5},
            "clients_per_weight": 1.5,
            "unchanged_fraction": 0.9,
        },
        "traffic": {
            "up": {"total_bits": bits, **kinds, "values": bits},
            "down": {
                "total_bits": bits, **kinds, "values": bits - MIB // 4, "masks": MIB // 4,
            },
            "dense": {"up_bits": 2 * MIB, "down_bits": 2 * MIB},
            "by_client": [
                {"client_ids": f"0 {round % 3}", "up_bits": bits // 2, "down_bits": bits // 3},
                {"client_ids": "5", "up_bits": 0, "down_bits": bits // 3},
            ],
            "published": {},
        },
        "compute": {
            "training_flops": {
                "forward": 10**9,
                "input_gradient": 10**9,
                "weight_gradient": 10**9,
                "dense_forward": 4 * 10**9,
                "dense_input_gradient": 4 * 10**9,
                "dense_weight_gradient": 4 * 10**9,
            },
        },
        "clients": {"participating": 2, "rejected": 0},
        "method": {},
        "time_s": 1.0,
    }  # fmt: skip
    if tested:
        made["clients"]["accuracy"] = {
            "lowest": accuracy - 0.1,
            "lower_quartile": accuracy - 0.05,
            "median": accuracy,
            "upper_quartile": accuracy + 0.05,
            "highest": accuracy + 0.1,
            "mean": accuracy,
            "deviation": 0.05,
        }
    return changed(made, changes or {})


def write(
    folder: pathlib.Path, lines, settings=None, *, seed=0, finished=True, parts=None
) -> pathlib.Path:
    """Write a run folder.

    Args:
      folder: to be made.
      lines: of the record.
      settings: by dotted path, over those of a FedAvg run.
      seed: of the run.
      finished: whether it has a summary.
      parts: whose code ran.
    """
    config = changed(CONFIG, {**(settings or {}), "seed": seed})
    if config["client"]["steps"] is not None:
        del config["client"]["epochs"]
    stored = {
        "schema": layout.SCHEMA, **config, "parts": parts or {},
        "command": f"fedjaxprune run --method {config['method']['name']}", "versions": VERSIONS,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / layout.CONFIG).write_text(yaml.safe_dump(stored, sort_keys=False))
    stages = list(dict.fromkeys(one["stage"] for one in lines))
    header = {
        "schema": layout.SCHEMA,
        "fedjaxprune": "0",
        "stages": [
            {"name": name, "num_rounds": sum(one["stage"] == name for one in lines)}
            for name in stages
        ],
        "num_prunable": 1000,
        "num_weights": 1100,
    }
    rows = [json.dumps(one) + "\n" for one in (header, *lines)]
    (folder / layout.METRICS).write_text("".join(rows))
    if finished:
        (folder / layout.SUMMARY).write_text("{}\n")
    return folder


def rising(finals, **arguments):
    """Make lines with these accuracies, one a round."""
    return [line(n, accuracy=a, **arguments) for n, a in enumerate(finals, start=1)]


def big(folder):
    """Make a run of 1,000 rounds of a network of 50 layers that changes in every round."""
    random = np.random.default_rng(0)
    paths = [f"stage_{n // 10}/block_{n % 10}/conv/kernel" for n in range(50)]
    rates = random.uniform(0, 1, size=(1000, 50)).round(6)
    lines = [
        changed(one, {"mask.sparsity_by_layer": dict(zip(paths, row.tolist(), strict=True))})
        for one, row in zip(rising(random.uniform(0, 1, 1000).tolist()), rates, strict=True)
    ]
    return write(folder, lines, {"federation.num_rounds": 1000})
