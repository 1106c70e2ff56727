"""Adaptive dynamic pruning: examples choose channels, and a client changes what its own chose.

A light gate before each convolution predicts which channels an example needs; only these are
computed, in training and in inference. So a client's gradient reaches what its own data find
salient, the rest keeps the global values, and a client sends the filters that it kept most often.

Only the abstracts of the paper were to be had; the rest follows its co-author's public code, which
has the gates, the proportion 0.7 and averaging of everything, gates and statistics included. We
differ where the code does not do what the abstracts say:

- *The strict gradient.* What no example of a batch kept takes no part in the step. There its
  gradient is zero, but momentum and weight decay move it all the same (``gradient="plain"``).
- *The upload.* The code sends everything and multiplies sizes by a factor. Here the salient filters
  travel, one bit a channel says which, and what stays away counts as no change.
- *The reference.* The code compares a gated VGG-16 with a VGG-11 without normalization. The
  reference here is the same network with all channels open (`squeeze_excitation`), and the control
  is the same network whose gates draw as many channels at random (``choice="random"``).

Batch statistics couple examples: in training, those that kept a channel pass gradients, through its
mean and variance, to the convolution's outputs of those that did not.

References:
  Yu, Nguyen, Anwar and Jannesari, `Heterogeneous Federated Learning using Dynamic Model Pruning and
  Adaptive Gradient <https://arxiv.org/abs/2106.06921>`_, 2023 (first version: Adaptive Dynamic
  Pruning for Non-IID Federated Learning, 2021).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.costs import ledger
from fedjaxprune.federated import aggregators, gated_updates, local_training, personalization
from fedjaxprune.federated.gated_updates import Reader
from fedjaxprune.models import gates as gating
from fedjaxprune.rounds.protocol import FieldSpec, Hooks, Masking, Protocol
from fedjaxprune.rounds.training import training
from fedjaxprune.structure.channels import groups
from fedjaxprune.traffic import PublishedBits
from fedjaxprune.types import (
    Algorithm,
    Masks,
    Model,
    Params,
    PrunableFn,
    RoundMetrics,
    RoundState,
    Schedule,
)

NAME = "adaptive_dynamic_pruning"


def adaptive_dynamic_pruning(
    model: Model,
    setup: Protocol,
    *,
    density: float | Schedule,
    readers: Sequence[Reader],
    gradient: Literal["strict", "plain"] = "strict",
    upload: Literal["salient", "touched", "dense"] = "salient",
    gates: Literal["global", "personal"] = "global",
    prunable: PrunableFn = masks_lib.is_kernel,
) -> Algorithm:
    """Train a gated network, each client on what its own examples find salient.

    With a density of 1 all channels are open, and it is FedAvg of a squeeze-and-excitation network.
    Averages count absent entries as no change; ``setup.aggregator=aggregators.holder_mean()``
    averages each over those who sent it instead.

    Args:
      model: a gated network (`models.gated`), or any whose state and metrics are as `gating` says.
      setup: what every method shares (public code: SGD 0.01 with momentum 0.9 and weight decay
        1e-5, 10 local epochs of batches of 64).
      density: part of its channels that each gate keeps (rho), in (0, 1], or a schedule of it
        (`warm_up`); predictions after a round use the round's.
      readers: kernels whose inputs are one gated layer's channels, from `readers_of`; of their
        salient filters only the salient inputs travel. () sends all inputs.
      gradient: ``"strict"`` leaves alone what no example of a batch kept; ``"plain"`` lets momentum
        and weight decay have it.
      upload: ``"salient"`` sends the channels that a client's examples of the round kept most
        often, as many as a gate keeps; ``"touched"`` those that any of them kept, with all their
        inputs, which in strict mode are all that changed; ``"dense"`` all.
      gates: ``"personal"`` gates stay on their client, go nowhere, and start as everybody's; what
        the server deploys has those of the start.
      prunable: what the record's sparsity is about; nothing is pruned for good.

    Raises:
      ValueError: if an option is out of range or unknown; in `init`, if the network has no gates.
    """
    if gradient not in ("strict", "plain"):
        raise ValueError(f"gradient must be 'strict' or 'plain', got {gradient!r}.")
    if upload not in ("salient", "touched", "dense"):
        raise ValueError(f"upload must be 'salient', 'touched' or 'dense', got {upload!r}.")
    if gates not in ("global", "personal"):
        raise ValueError(f"gates must be 'global' or 'personal', got {gates!r}.")
    scheduled = density if callable(density) else _constant(density)

    client = local_training.local_sgd(
        model.loss,
        batcher=setup.batcher,
        optimizer=setup.optimizer,
        learning_rate_scale=setup.learning_rate_scale,
        post_step=gated_updates.freeze_unused(setup.optimizer) if gradient == "strict" else None,
    )
    if gates == "personal":
        client = personalization.keep_own(client, is_own=gating.is_gate)
    if upload != "dense":
        client = gated_updates.report(client, rule=upload)
    read = tuple(readers) if upload == "salient" else ()

    def narrow(fields: Mapping[str, Any]) -> dict[str, Masks]:
        bits = fields[gated_updates.SALIENT]
        delta = fields["delta"]
        return {
            "delta": jax.tree.map(
                jnp.logical_and,
                gated_updates.of_params(bits, delta),
                gated_updates.of_readers(bits, read, delta),
            ),
            "model_state": gated_updates.of_state(bits, fields["model_state"]),
        }

    masking = _without_gates() if gates == "personal" else Masking()
    trained = training(
        setup,
        client=client,
        prunable=prunable,
        fields={gated_updates.SALIENT: FieldSpec(aggregators.vote_counts(), send="bits")},
        masking=masking._replace(upload_masks=None if upload == "dense" else narrow),
        hooks=_density_hooks(scheduled),
    )

    def init_fn(params, model_state):
        gating.density(model_state)  # complains if there are no gates
        return trained.init(params, model_state)

    return trained._replace(init=init_fn, published={NAME: formula})


def squeeze_excitation(model: Model, setup: Protocol) -> Algorithm:
    """Do FedAvg of a gated network with all channels open: attention without pruning.

    The reference of `adaptive_dynamic_pruning`: what is gained over the network without gates is
    not gained by pruning.

    Args:
      model: a gated network.
      setup: what every method shares.
    """
    return adaptive_dynamic_pruning(
        model, setup, density=1.0, readers=(), gradient="plain", upload="dense"
    )


def warm_up(*, density: float, num_rounds: int, hold: float, until: float = 0.5) -> Schedule:
    """Open all channels in the first rounds, then close them along a line.

    Args:
      density: where it leads, in (0, 1].
      num_rounds: of the run.
      hold: part of the rounds, from the first, in which all channels are open, in [0, 1); 0.1 is
        what was recommended to us, with no word on how long the line is.
      until: part of the rounds after which the density is reached, at least `hold`.

    Raises:
      ValueError: if an option is out of range.
    """
    _check_density(density)
    if not 0.0 <= hold <= until <= 1.0 or hold == 1.0:
        raise ValueError(
            f"hold and until must be in order in [0, 1], hold below 1; got {hold} and {until}."
        )
    begin, end = round(hold * num_rounds), round(until * num_rounds)

    def schedule(round_index: jax.Array) -> jax.Array:
        passed = (round_index - begin).astype(jnp.float32) / jnp.float32(max(end - begin, 1))
        line = 1.0 + (density - 1.0) * jnp.clip(passed, 0.0, 1.0)
        return jnp.where(round_index >= end, jnp.float32(density), line.astype(jnp.float32))

    return schedule


def readers_of(model: Model, inputs: Any) -> tuple[Reader, ...]:
    """Find the kernels of gated layers that read the channels of one other gated layer alone.

    The network is walked (`channels.groups`), nothing is computed. Where layers are added up, as on
    a residual network's main path, channels have several makers, and kernels that read them are
    none.

    Args:
      model: a gated network.
      inputs: of a batch of two or more, arrays or shapes.
    """
    params, state = jax.eval_shape(model.init, jax.random.key(0))
    leaves = dict(zip(trees.paths(params), jax.tree.leaves(params), strict=True))
    layers = gating.layers_of(params)

    def owner(path: str) -> str | None:
        return next((layer for layer in layers if path.startswith(f"{layer}/")), None)

    def in_order(member: groups.Member) -> bool:
        size = leaves[member.path].shape[member.axis]
        return bool(np.array_equal(member.indices, np.arange(size)[:, None]))

    found = []
    for group in groups.analyze(model.predict, params, state, inputs).groups:
        makers = [member for member in group.members if member.role == "filter"]
        (layer, *others) = {owner(member.path) for member in makers}
        if layer is None or others or not all(map(in_order, makers)):
            continue
        found += [
            Reader(member.path, member.axis, layer)
            for member in group.members
            if member.role == "input"
            and owner(member.path) is not None
            and masks_lib.is_kernel(member.path, leaves[member.path])
            and in_order(member)
        ]
    return tuple(found)


def formula(metrics: RoundMetrics, state: RoundState) -> PublishedBits:
    """Charge 32 bits for each value that travels and one for each channel of a salient set."""
    present = np.asarray(metrics.participated)
    reached = ledger.received(present, np.asarray(metrics.sent.client_ids))
    statistics = trees.sizes(state.model_state)
    reply = metrics.sent.up["reply"]["model_state"].live_counts
    num_bits = sum(
        math.prod(leaf.shape[1:])
        for leaf in jax.tree.leaves(metrics.sent.up.get(gated_updates.SALIENT, {}))
        if leaf.dtype == np.bool_ and leaf.shape[0] == 0
    )
    values = np.asarray(metrics.num_uploaded, np.int64)[present].sum()
    of_state = (
        np.count_nonzero(present) * sum(statistics)
        if isinstance(reply, tuple)
        else np.asarray(reply, np.int64)[present].sum()
    )
    down = int(np.asarray(metrics.num_downloaded, np.int64)[0].sum()) + sum(statistics)
    return PublishedBits(
        uplink=32 * int(values + of_state) + num_bits * int(np.count_nonzero(present)),
        downlink=32 * down * int(np.count_nonzero(reached)),
    )


def _constant(density: float) -> Schedule:
    _check_density(density)
    return lambda round_index: jnp.float32(density)


def _check_density(density: float) -> None:
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1], got {density}.")


def _without_gates() -> Masking:
    """Leave gates out of what travels, either way."""

    def travelling(state: RoundState) -> Params:
        return personalization.shared(state.masks, is_own=gating.is_gate)

    return Masking(upload=travelling, download=travelling)


def _density_hooks(schedule: Schedule) -> Hooks:
    """Set the gates' density before each round; a round in which nobody was heard leaves it."""

    def before_round(state: RoundState) -> RoundState:
        steered = gating.with_density(state.model_state, schedule(state.round))
        return state._replace(model_state=steered)

    def after_round(
        before: RoundState, after: RoundState, metrics: RoundMetrics
    ) -> tuple[RoundState, RoundMetrics]:
        heard = metrics.num_participating > metrics.num_rejected
        density = jnp.where(
            heard, gating.density(after.model_state), gating.density(before.model_state)
        )
        kept = gating.with_density(after.model_state, density)
        return after._replace(model_state=kept), metrics

    return Hooks(before_round, after_round)
