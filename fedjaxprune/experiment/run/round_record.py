"""From a round's metrics to a line of the record.

The fields of a line, by dotted path; what was not measured is absent or None:

========================== ====================================================================
``round``                  rounds completed over all stages, counted from 1
``stage``, ``stage_round`` name of the stage, and rounds completed of it
``train.loss``             mean of the clients' local losses in the round
``test.loss``              mean over the test set: cross-entropy in nats, or the squared error
``test.accuracy``          fraction of the test set classified rightly; None for a regression
``test.error``             mean absolute error of a regression, in the unit of its targets
``mask``                   live prunable weights (``num_live``), mask entries that the round
                           flipped (``num_changed``), pruned fraction (``sparsity``), the same of
                           each prunable leaf (``sparsity_by_layer``), and
                           ``clients_per_weight`` and ``unchanged_fraction`` of `RoundCosts`
``traffic.up``, ``.down``  measured: bits of all messages from and to the clients, by kind
``traffic.dense``          32 bits for every parameter and statistic, to and from the same clients;
                           0 in rounds that do not train
``traffic.by_client``      measured: bits of each of the clients in ``client_ids``, which are text
                           (`client_ids.of_text` reads it)
``traffic.published``      by name, what a published formula charges
``compute.training_flops`` modeled, of the clients' training; see `RoundCosts`
``compute.inference_flops`` with gates and a test: of a prediction, an example
``compute.client_time``    modeled, where ``client.hardware`` is set: ``seconds`` until the slowest
                           client (``slowest_client``) has received, computed and sent, and
                           ``overlapped_seconds`` if these went on at once; see `costs.hardware`
``clients``                that took part (``participating``), of them left out as their message
                           was not finite (``rejected``), and how the test accuracy is spread over
                           the clients (``accuracy``)
``method``                 what the method itself reports (`Algorithm.diagnostics`)
``time_s``                 seconds that the round took, with its test
========================== ====================================================================
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fedjaxprune import __version__, live_weights, trees
from fedjaxprune.costs import hardware, ledger
from fedjaxprune.experiment.folder import client_ids
from fedjaxprune.experiment.folder.layout import SCHEMA
from fedjaxprune.experiment.folder.record import Line, finite
from fedjaxprune.experiment.run import client_accuracy, evaluation, round_costs
from fedjaxprune.traffic import Traffic
from fedjaxprune.types import RoundMetrics, RoundState

_DENSE_BITS = 32  # of a value


class Writer(NamedTuple):
    """Makes the record of one run."""

    header: dict[str, Any]  # its first line
    # ``(stage, stage_round, round, metrics, tested) -> line``, all read to the host
    line: Callable[[str, int, int, RoundMetrics, evaluation.Evaluation | None], Line]


def writer(parts: Any, shapes: RoundState, *, warn: Callable[[str], object]) -> Writer:
    """Count the network and the clients' classes once, for all lines."""
    profile = round_costs.profile(
        parts.model,
        shapes.params,
        parts.test.inputs,
        preprocess=parts.preprocess,
        prunable=parts.algorithm.counted or parts.algorithm.prunable,
        warn=warn,
    )
    classes = client_accuracy.of_population(parts.population, parts.test.labels)
    work = _work(parts)
    statistics = live_weights.without(shapes.model_state)
    num_dense = sum(trees.sizes(shapes.params)) + sum(trees.sizes(statistics))
    flags = profile.flags
    header = {
        "schema": SCHEMA,
        "fedjaxprune": __version__,
        "stages": [
            {"name": stage.name, "num_rounds": stage.num_rounds} for stage in parts.algorithm.stages
        ],
        "num_prunable": sum(n for n, flag in zip(profile.sizes, flags, strict=True) if flag),
        "num_weights": sum(profile.sizes),
    }

    def line_fn(stage, stage_round, number, metrics, tested):
        costs = round_costs.of_round(profile, metrics)
        sent = ledger.account(metrics, shapes, parts.algorithm)
        loss = metrics.train["loss"]
        weight = float(loss.weight)
        line = {
            "round": number,
            "stage": stage,
            "stage_round": stage_round,
            "train": {"loss": finite(float(loss.total) / weight) if weight > 0 else None},
            "test": {},
            "mask": {
                **_mask(profile, metrics, header["num_prunable"]),
                "clients_per_weight": costs.clients_per_weight,
                "unchanged_fraction": costs.unchanged_fraction,
            },
            "traffic": _traffic(sent, _dense(metrics, num_dense)),
            "compute": {"training_flops": costs.training_flops},
            "clients": {
                "participating": int(metrics.num_participating),
                "rejected": int(metrics.num_rejected),
            },
            "method": parts.algorithm.diagnostics(metrics),
        }
        if parts.hardware is not None and (flops := costs.training_flops) is not None:
            time = hardware.time_of_round(
                parts.hardware,
                sent.clients,
                flops=sum(flops[name] for name in round_costs.PARTS),
                work=work,
            )
            known = {name: one for name, one in time._asdict().items() if one is not None}
            line["compute"]["client_time"] = known
        if tested is not None:
            scores = evaluation.scores(tested, parts.test.labels, task=parts.task)
            error = None if scores.error is None else finite(scores.error)
            line["test"] = {
                "loss": finite(scores.loss),
                "accuracy": scores.accuracy,
                "error": error,
            }
            if (found := round_costs.of_inference(profile, metrics, tested.through)) is not None:
                line["compute"]["inference_flops"] = found
            if classes is not None:
                found = client_accuracy.of_clients(classes, tested.class_correct)
                line["clients"] |= {} if found is None else {"accuracy": found}
        return line

    return Writer(header, line_fn)


def _work(parts: Any) -> np.ndarray:
    """Tell how many examples each client passes over in a round, ``[N]``, up to a factor."""
    sizes = np.diff(np.asarray(parts.population.offsets))
    return sizes if parts.config.client.steps is None else np.minimum(sizes, 1)


def _mask(profile: round_costs.Profile, metrics: RoundMetrics, num_prunable: int) -> dict[str, Any]:
    """Count what is live."""
    leaves = zip(profile.paths, profile.sizes, metrics.num_live.tolist(), strict=True)
    prunable = [one for one, flag in zip(leaves, profile.flags, strict=True) if flag]
    num_live = sum(live for _, _, live in prunable)
    return {
        "num_live": num_live,
        "num_changed": int(metrics.num_changed),
        "sparsity": (num_prunable - num_live) / num_prunable if num_prunable else 0.0,
        "sparsity_by_layer": {
            path: round(1.0 - live / max(1, size), 6) for path, size, live in prunable
        },
    }


def _dense(metrics: RoundMetrics, num_values: int) -> dict[str, int]:
    """Charge the whole network, both ways, in a round in which clients train."""
    trains = any("delta" in message for message in metrics.sent.up.values())
    here = np.asarray(metrics.participated)
    reached = ledger.received(here, np.asarray(metrics.sent.client_ids))
    bits = _DENSE_BITS * num_values * trains
    return {"up_bits": bits * int(here.sum()), "down_bits": bits * int(reached.sum())}


def _traffic(traffic: Traffic, dense: dict[str, int]) -> dict[str, Any]:
    """Give a round's traffic as the record has it."""
    return {
        "up": {"total_bits": traffic.uplink_bits, **traffic.uplink._asdict()},
        "down": {"total_bits": traffic.downlink_bits, **traffic.downlink._asdict()},
        "dense": dense,
        "by_client": [
            {
                "client_ids": client_ids.to_text(entry.client_ids),
                "up_bits": entry.uplink_bits,
                "down_bits": entry.downlink_bits,
            }
            for entry in traffic.clients
        ],
        "published": {
            name: {"up_bits": bits.uplink, "down_bits": bits.downlink}
            for name, bits in traffic.published.items()
        },
    }
