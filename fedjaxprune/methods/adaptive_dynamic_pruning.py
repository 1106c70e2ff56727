"""Choose channels for every example; a client changes and sends what its own examples chose.

A light gate before each convolution predicts which channels an example needs; only these are
computed, in training and in inference. So a client's gradient reaches what its own data find
salient, the rest keeps the global values, and a client sends the filters that it kept most often.

We had access only to the abstracts of the paper. The rest follows its co-author's public code,
which has the gates, the proportion 0.7 and averaging of everything, gates and statistics included.
We differ where the code does not do what the abstracts say:

- *The strict gradient.* What no example of a batch kept takes no part in the step. There its
  gradient is zero, but momentum and weight decay move it all the same (``gradient: plain``).
- *The upload.* The code sends everything and multiplies sizes by a factor. Here the salient filters
  travel, one bit a channel says which, and what is not sent counts as no change.
- *The reference.* The code compares a gated VGG-16 with a VGG-11 without normalization. The
  reference here is the same network with all channels open (variant ``squeeze_excitation``: FedAvg
  with attention but without pruning), and the control is the same network whose gates draw as many
  channels at random (variant ``random_channels``).

How many channels a gate keeps is a setting of the network (``model.density``); any network whose
state and metrics are as `models.gates` says will do. Batch statistics couple examples: in training,
those that kept a channel pass gradients, through its mean and variance, to the convolution's
outputs of those that did not. Averages count absent entries as no change; the aggregator
`holder_mean` averages each entry over those who sent it.

References:
  Yu, Nguyen, Anwar and Jannesari, `Heterogeneous Federated Learning using Dynamic Model Pruning and
  Adaptive Gradient <https://arxiv.org/abs/2106.06921>`_, 2023 (first version: Adaptive Dynamic
  Pruning for Non-IID Federated Learning, 2021).
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from fedjaxprune import trees
from fedjaxprune.costs import ledger
from fedjaxprune.federated import aggregators, gated_updates, personalization
from fedjaxprune.method import Method, Needs, Paper
from fedjaxprune.models import gates
from fedjaxprune.rounds import facts
from fedjaxprune.rounds.protocol import FieldSpec, Hooks, Masking
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import Fraction, Settings, Share, setting
from fedjaxprune.traffic import PublishedBits
from fedjaxprune.types import (
    Aggregator,
    Algorithm,
    Masks,
    Params,
    RoundMetrics,
    RoundState,
    Schedule,
)

NAME = "adaptive_dynamic_pruning"  # of its published costs


class AdaptiveDynamicPruning(Settings):
    """Settings of adaptive dynamic pruning."""

    gradient: Literal["strict", "plain"] = setting(
        "strict",
        "Whether a step leaves alone what no example of its batch kept (strict), or momentum and "
        "weight decay move it (plain).",
    )
    upload: Literal["salient", "touched", "dense"] = setting(
        "salient",
        "What a client sends: the channels that its examples of the round kept most often, as many "
        "as a gate keeps, with their salient inputs (salient); those that any example kept, with "
        "all inputs, which in strict mode are all that changed (touched); or everything (dense).",
    )
    gate_sharing: Literal["global", "personal"] = setting(
        "global",
        "Whose the gates are: everybody's, or each client's own, which never travel; the deployed "
        "network then has the gates of the start.",
    )
    warm_up_fraction: Fraction = setting(
        0.0,
        "Part of the rounds, from the first, in which all channels are open; a line leads from "
        "there to the density of the network.",
        unit="fraction",
    )
    warm_up_end: Share = setting(
        0.5, "Part of the rounds after which a warm-up has reached the density.", unit="fraction"
    )

    @pydantic.model_validator(mode="after")
    def _check_order(self) -> "AdaptiveDynamicPruning":
        if self.warm_up_fraction > self.warm_up_end:
            raise ValueError(
                f"warm_up_fraction must be at most warm_up_end ({self.warm_up_end}), "
                f"got {self.warm_up_fraction}."
            )
        return self


def build(settings: AdaptiveDynamicPruning, task: Task) -> Algorithm:
    """Build adaptive dynamic pruning; where all channels are open, it is FedAvg.

    Raises:
      ValueError: the network has no gates, or the normalization or the aggregator does not fit.
    """
    _check(settings, task)
    is_strict, sends_all = settings.gradient == "strict", settings.upload == "dense"
    client = task.local_client(
        post_step=gated_updates.freeze_unused(task.protocol.optimizer) if is_strict else None
    )
    if settings.gate_sharing == "personal":
        client = personalization.keep_own(client, is_own=gates.is_gate)
    if settings.upload != "dense":
        client = gated_updates.report(client, rule=settings.upload)
    readers = task.facts.gate_readers() if settings.upload == "salient" else ()

    def upload_masks(fields: Mapping[str, Any], masks: Masks) -> dict[str, Masks]:
        del masks  # none of its weights is pruned
        bits = fields[gated_updates.SALIENT]
        delta = fields["delta"]
        return {
            "delta": jax.tree.map(
                jnp.logical_and,
                gated_updates.of_params(bits, delta),
                gated_updates.of_readers(bits, readers, delta),
            ),
            "model_state": gated_updates.of_state(bits, fields["model_state"]),
        }

    salient = FieldSpec(aggregators.vote_counts(), send="bits")
    shared = _without_gates if settings.gate_sharing == "personal" else None
    return training(
        task.protocol,
        client=client,
        fields={} if sends_all else {gated_updates.SALIENT: salient},
        masking=Masking(
            upload=shared, download=shared, upload_masks=None if sends_all else upload_masks
        ),
        hooks=_warm_up_hooks(settings, task) if settings.warm_up_fraction else None,
    )._replace(published={NAME: published_bits})


def warm_up(*, density: float, num_rounds: int, hold: float, until: float) -> Schedule:
    """Open all channels in the first rounds, then close them along a line.

    Args:
      density: where it leads, in (0, 1].
      num_rounds: of the run.
      hold: part of the rounds, from the first, in which all channels are open, in [0, 1); 0.1 is
        what was recommended to us, with no word on how long the line is.
      until: part of the rounds after which the density is reached, at least `hold`.
    """
    begin, end = round(hold * num_rounds), round(until * num_rounds)

    def schedule(round_index: jax.Array) -> jax.Array:
        passed = (round_index - begin).astype(jnp.float32) / jnp.float32(max(end - begin, 1))
        line = 1.0 + (density - 1.0) * jnp.clip(passed, 0.0, 1.0)
        return jnp.where(round_index >= end, jnp.float32(density), line.astype(jnp.float32))

    return schedule


def published_bits(metrics: RoundMetrics, state: RoundState) -> PublishedBits:
    """Charge 32 bits for each value that travels and one for each channel of a salient set."""
    present = np.asarray(metrics.participated)
    reached = ledger.received(present, np.asarray(metrics.sent.client_ids))
    statistics = trees.sizes(state.model_state)
    reply = metrics.sent.up["reply"]["model_state"]
    num_bits = sum(
        math.prod(leaf.shape[1:])
        for leaf in jax.tree.leaves(metrics.sent.up.get(gated_updates.SALIENT, {}))
        if leaf.dtype == np.bool_ and leaf.shape[0] == 0
    )
    values = np.asarray(metrics.num_uploaded, np.int64)[present].sum()
    of_state = (
        np.count_nonzero(present)
        * sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(reply.template))
        if isinstance(reply.live_counts, tuple)
        else np.asarray(reply.live_counts, np.int64)[present].sum()
    )
    down = int(np.asarray(metrics.num_downloaded, np.int64)[0].sum()) + sum(statistics)
    return PublishedBits(
        uplink=32 * int(values + of_state) + num_bits * int(np.count_nonzero(present)),
        downlink=32 * down * int(np.count_nonzero(reached)),
    )


def _check(settings: AdaptiveDynamicPruning, task: Task) -> None:
    """See that the network has gates, and that normalization and aggregator fit."""
    gates.density(task.facts.state)  # raises if there are no gates
    layers = gates.layers_of(task.facts.params)
    own = [path for path in trees.paths(task.facts.params) if path.startswith(tuple(layers))]
    is_normalized = any(path.endswith("/scale") for path in own)
    if is_normalized and not facts.has_batch_norm(task.facts) and _density(task) < 1.0:
        raise ValueError(
            "model.norm must be 'batch' for adaptive_dynamic_pruning with a model.density below 1, "
            "as statistics of a group run over channels that a gate has closed."
        )
    rule = task.protocol.aggregator
    if settings.upload != "dense" and not isinstance(rule, Aggregator | None):
        raise ValueError(
            "server.aggregator must be a mean, such as 'weighted_mean', for "
            f"adaptive_dynamic_pruning with method.upload {settings.upload!r}, as what a client "
            "does not send would count as no change."
        )


def _density(task: Task) -> float:
    """Read the density with which the network starts, as the decimals that it is written with."""
    init = jax.jit(task.model.init, inline=True)  # which has been traced
    density = jax.jit(lambda key: gates.density(init(key)[1]))(jax.random.key(0))
    return float(str(np.float32(density)))


def _warm_up_hooks(settings: AdaptiveDynamicPruning, task: Task) -> Hooks:
    """Set the gates' density before each round; a round that is dropped leaves it."""
    schedule = warm_up(
        density=_density(task),
        num_rounds=task.protocol.num_rounds,
        hold=settings.warm_up_fraction,
        until=settings.warm_up_end,
    )

    def before_round(state):
        density = schedule(state.round)
        return state._replace(model_state=gates.with_density(state.model_state, density))

    return Hooks(before_round=before_round)


def _without_gates(state: RoundState) -> Params:
    """Leave gates out of what travels, either way."""
    return personalization.shared(state.masks, is_own=gates.is_gate)


METHOD = Method(
    build=build,
    settings=AdaptiveDynamicPruning,
    paper=Paper(
        authors="Yu et al.",
        year=2023,
        title="Heterogeneous Federated Learning using Dynamic Model Pruning and Adaptive Gradient",
        arxiv="2106.06921",
    ),
    needs=Needs(gates=True),
    default_model="gated_resnet8",
    variants={
        "squeeze_excitation": {"model.density": 1.0, "gradient": "plain", "upload": "dense"},
        "random_channels": {"model.choice": "random"},
    },
    law_settings={"warm_up_fraction": 0.3, "client.optimizer.momentum": 0.9},
)
