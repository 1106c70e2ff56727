"""Run folders with a record that anybody can do sums with, made without a run."""

import json
import pathlib

import numpy as np

from fedjaxprune.experiment.config.flat import files
from fedjaxprune.experiment.config.flat.sections import RunConfig
from fedjaxprune.experiment.folder import record

MIB = 8 * 2**20
VERSIONS = {"fedjaxprune": "0", "jax": "0"}


def line(round, *, accuracy=None, mib=2, stage="train", **changes):
    """Make a line in which clients and server have sent `mib` MiB, half of them each."""
    bits = mib * MIB // 2
    kinds = dict.fromkeys(("values", "positions", "masks", "statistics", "framing"), 0)
    made = record.RoundRecord(
        stage=stage,
        round=round,
        train_loss=1.0,
        test_loss=None if accuracy is None else 2.0 - accuracy,
        test_accuracy=accuracy,
        sparsity=0.5,
        num_kept=500,
        num_changed=100,
        uplink_bits=bits,
        downlink_bits=bits,
        mask_bits=MIB // 4,
        statistics_bits=0,
        uplink_parts={**kinds, "values": bits},
        downlink_parts={**kinds, "values": bits - MIB // 4, "masks": MIB // 4},
        client_bits=[
            {"uplink_bits": bits // 2, "downlink_bits": bits // 3, "client_ids": [0, round % 3]},
            {"uplink_bits": 0, "downlink_bits": bits // 3, "client_ids": [5]},
        ],
        modeled_bits={},
        num_participating=2,
        num_rejected=0,
        modeled_flops={
            "forward": 10**9,
            "input_gradient": 10**9,
            "weight_gradient": 10**9,
            "dense_forward": 4 * 10**9,
            "dense_input_gradient": 4 * 10**9,
            "dense_weight_gradient": 4 * 10**9,
        },
        mean_coverage=1.5,
        mask_stability=0.9,
        wall_s=1.0,
        layer_sparsity={"a/kernel": 0.25 if round < 3 else 0.75, "b/kernel": 0.5},
        client_accuracy=None
        if accuracy is None
        else {
            "lowest": accuracy - 0.1,
            "lower_quartile": accuracy - 0.05,
            "median": accuracy,
            "upper_quartile": accuracy + 0.05,
            "highest": accuracy + 0.1,
            "mean": accuracy,
            "deviation": 0.05,
        },
    )
    return made._replace(**changes)


def write(folder: pathlib.Path, lines, *, finished=True, **settings) -> pathlib.Path:
    """Write a run folder; settings go over the defaults of a FedAvg run."""
    config = RunConfig(**{"algorithm": "fedavg", "num_clients": 6, "cohort_size": 3, **settings})
    folder.mkdir(parents=True)
    (folder / record.CONFIG).write_text(files.to_yaml(config, versions=VERSIONS))
    rows = [json.dumps(one._asdict()) + "\n" for one in lines]
    (folder / record.METRICS).write_text("".join(rows))
    if finished:
        (folder / record.SUMMARY).write_text("{}\n")
    return folder


def rising(finals, *, mib=2, **changes):
    """Make lines with these accuracies, one a round."""
    return [line(n, accuracy=a, mib=mib, **changes) for n, a in enumerate(finals, start=1)]


def big(folder):
    """Make a run of 1,000 rounds of a network of 50 layers that changes in every round."""
    random = np.random.default_rng(0)
    paths = [f"stage_{n // 10}/block_{n % 10}/conv/kernel" for n in range(50)]
    rates = random.uniform(0, 1, size=(1000, 50)).round(6)
    lines = [
        one._replace(layer_sparsity=dict(zip(paths, row.tolist(), strict=True)))
        for one, row in zip(rising(random.uniform(0, 1, 1000).tolist()), rates, strict=True)
    ]
    return write(folder, lines, rounds=1000)
