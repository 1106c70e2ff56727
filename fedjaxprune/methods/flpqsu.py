"""FL-PQSU: prune filters once before training, round what travels, send what has improved.

1. ``prepare``: the server trains on its own examples for `server_epochs`, and keeps of every
   layer the filters of largest L1 norm, with the weights that they have. `widths` says how many a
   layer keeps, else `sparsity` does. What reads a channel that is gone goes, too;
2. ``train``: FedAvg under the filters in force. After its round a client compares the mean loss of
   its last epoch with that of the last time that it sent something. It sends what it has trained if
   the loss is lower, and otherwise one bit that says so.

Rounding is the business of uplink and downlink, as for any method: ``flpqsu/quantized`` rounds both
to the nearest of 256 levels, with error feedback.

We had access to the abstract of the paper and to the authors' code, and differ from the code in
these points:

- The code pairs kept units of dense layers with the wrong inputs, as it sorts units by their norms.
  Here filters and units keep their order, bias and normalization go with their filter, and dense
  layers keep their units unless ``layers: all`` is set.
- The code rounds weights both ways, and the server keeps means of rounded weights. Here clients
  receive rounded weights and send rounded changes of them; the server's weights are exact. The
  range of a layer always contains zero, so zero stays zero.
- The code compares the loss of the last batch.
- In the code a silent client counts with the model that it sent last, so the server keeps a model
  of each client. Here the mean is over the clients that send, by examples, and a round in which
  nobody sends changes nothing. The training loss on record is that of the clients that send.

References:
  Xu et al., `Accelerating Federated Learning for IoT in Big Data Analytics with Pruning,
  Quantization and Selective Updating <https://doi.org/10.1109/ACCESS.2021.3063291>`_, 2021.
"""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from fedjaxprune.federated import aggregators, selective_sending
from fedjaxprune.method import Method, Needs, Paper
from fedjaxprune.methods import _filter_rounds
from fedjaxprune.pruning.structured import filters
from fedjaxprune.rounds import server_work
from fedjaxprune.rounds.protocol import FieldSpec
from fedjaxprune.rounds.task import Task
from fedjaxprune.settings import INT_MAX, Counts, setting
from fedjaxprune.traffic import SILENT
from fedjaxprune.types import Algorithm, Client, RoundMetrics, Stage


class FLPQSU(_filter_rounds.FilterSettings):
    """Settings of FL-PQSU."""

    widths: Counts | None = setting(
        None,
        "Filters that each layer keeps, in the order of the parameters.",
        unit="filters",
        unset="the fraction that sparsity leaves of each layer",
    )
    server_epochs: int = setting(
        0,
        "Passes of the server over its own examples before it prunes; with 0, weights are those of "
        "the start, or of dense_rounds.",
        unit="epochs",
        ge=0,
        le=INT_MAX,
    )
    remove: filters.Drops = setting(
        "channels",
        "What training leaves out: pruned filters, or also the weights that read their channels, "
        "which changes no output and saves traffic.",
    )
    send: Literal["improved", "always"] = setting(
        "improved",
        "Whether a client sends what it has trained only if its loss is below that of the last "
        "time that it sent something, or always.",
    )


def build(settings: FLPQSU, task: Task) -> Algorithm:
    """Build FL-PQSU.

    Raises:
      ValueError: the network has no filters, `widths` do not fit them, or the server has no
        examples to train on.
    """
    plan = _filter_rounds.make_plan(task, settings, num_steps=0)
    counts = _counts(settings, plan)
    if settings.send == "always":
        client, fields = task.local_client(), {}
    else:
        client, fields = _selective(task), {SILENT: FieldSpec(aggregators.vote_counts(), "bits")}
    before = (_prepare(settings, task, plan, counts),)
    trained = _filter_rounds.train_after(task, settings, plan, before, client=client, fields=fields)
    return trained if settings.send == "always" else trained._replace(diagnostics=diagnostics)


def diagnostics(metrics: RoundMetrics) -> dict[str, Any]:
    """Say how many of the clients that took part sent nothing."""
    field = metrics.sent.up.get(SILENT, {}).get(SILENT)
    if field is None:
        return {}
    present = np.asarray(metrics.participated)
    return {"num_silent": int(np.count_nonzero(np.asarray(field.clients) & present))}


def _counts(settings: FLPQSU, plan: _filter_rounds.Plan) -> list[int]:
    """Say how many filters each layer keeps."""
    sizes = [group.size for group in plan.layers]
    if settings.widths is None:
        wanted = filters.even_steps(settings.sparsity, 1)[1:]
        return [size - int(filters.quotas(wanted, size).nearest[0]) for size in sizes]
    widths = list(settings.widths)
    if len(widths) != len(sizes) or any(w > size for w, size in zip(widths, sizes, strict=True)):
        raise ValueError(
            f"method.widths must have a number for each of the {len(sizes)} layers, at most "
            f"{', '.join(map(str, sizes))}, got {', '.join(map(str, widths))}."
        )
    return widths


def _prepare(settings: FLPQSU, task: Task, plan: _filter_rounds.Plan, counts: list[int]) -> Stage:
    """Train at the server, and keep the largest filters."""
    train = None
    if settings.server_epochs:
        batcher = task.batches(epochs=settings.server_epochs)
        train = server_work.train_at(task.local_client(batcher=batcher), task.server_source())

    def work(key, state, population):
        metrics = server_work.no_loss()
        if train is not None:
            state, metrics = train(key, state, population)
        wanted = [jnp.int32(count) for count in counts]
        keep = filters.ranked(plan.layers, state.params, state.method.keep, wanted, order=1)
        step = jnp.int32(plan.num_steps)  # the last one, and the only one
        return _filter_rounds.apply_filters(plan, task.protocol, state, keep, step=step), metrics

    return server_work.server_round("prepare", work)


def _selective(task: Task) -> Client:
    """Make the local training that is sent only if the loss has fallen."""

    def make(loss, post_step):
        own = task._replace(model=task.model._replace(loss=loss))
        return own.local_client(post_step=post_step)

    return selective_sending.if_improved(make, task.model.loss, num_epochs=task.num_epochs)


METHOD = Method(
    build=build,
    settings=FLPQSU,
    paper=Paper(
        "Xu et al.",
        2021,
        "Accelerating Federated Learning for IoT in Big Data Analytics with Pruning, Quantization "
        "and Selective Updating",
        code="https://github.com/fangvv/FL-PQSU",
    ),
    needs=lambda settings: Needs(
        convolutions=settings.layers == "convolutions",
        server_examples=settings.server_epochs > 0,
    ),
    default_model="resnet8",
    variants={
        "quantized": {
            "uplink.name": "quantize",
            "uplink.rounding": "nearest",
            "uplink.error_feedback": True,
            "downlink.name": "quantize",
        },
    },
    law_settings={"layers": "all", "server_epochs": 2},
    nothing_pruned={"sparsity": 0.0, "server_epochs": 0, "send": "always"},
)
