"""FedMef: a random sparse start; weights are pressed towards zero in the round before they go.

1. ``draw``: one mask is drawn at random, with higher densities in small layers (ERK); it follows
   from the run's seed and does not travel;
2. ``train``: FedAvg under the masks. Every `prune_every` rounds each layer exchanges a share of its
   live weights, which decays along a cosine, for pruned ones of largest gradient. In such a round
   a client first marks the weights that are to go, the smallest of each layer that it received.
   While it trains it extrudes them (*budget-aware extrusion*): a penalty on their squares, and a
   learning rate that is held up for as long as there is something to press out, so that others take
   over what they know. It then sends the largest gradients of pruned weights as pairs of index and
   value. The server averages, drops the smallest live weights and grows those of largest mean
   gradient, from zero.

In step `s` of `T` the rate is at least ``(2 T - 2 s) / (2 T - s) * tanh(norm / 2)`` times the first
rate of the run, where the norm is that of the marked weights. So it acts only where the rate has
decayed (`client.learning_rate_decay`).

We had access to the abstract of the paper and to implementations by others. Inferred: the first
rate is that of the run and not of the round; counts are rounded down; no layer marks more weights
than are pruned in it; the server drops the smallest weights of the average (``drop: marked`` drops
the marked ones). All kernels are prunable (the paper never prunes the output layer). In the
authors' public library the penalty does not depend on its weight, marks pruned weights too, and
acts in every round; and gradients reach other weights than those that they are of.

With `dropped_activations` clients prune activations: each layer stores only the largest entries of
its input for the backward pass (`models.activations`), so its weights' gradients are approximate.

The paper puts a normalized sparse convolution in the place of batch normalization, so that small
batches and pruned activations do less harm: ``--model resnet18 --norm live_weights``, or
`models.layers.NormalizedConv` in a network of your own. Its formula is inferred.

References:
  Huang et al., `FedMef: Towards Memory-efficient Federated Dynamic Pruning
  <https://arxiv.org/abs/2403.14737>`_, 2024.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.costs import ledger, storage_models
from fedjaxprune.federated import extrusion, local_training, sparse_gradients, step_scales
from fedjaxprune.method import Method, Paper
from fedjaxprune.methods import _due_rounds, _fixed_masks
from fedjaxprune.models import activations
from fedjaxprune.pruning import drop_and_grow, scores
from fedjaxprune.rounds.protocol import FieldSpec
from fedjaxprune.rounds.stages import in_order
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import Fraction, NonNegative, Rounds, Sparsity, setting
from fedjaxprune.traffic import PublishedBits
from fedjaxprune.types import (
    Algorithm,
    Broadcast,
    Key,
    Masks,
    Params,
    PrunerInputs,
    RoundMetrics,
    RoundState,
)

LAST = 0.6  # where in a run the share has decayed to nothing: round 300 of 500, as published


class FedMef(_fixed_masks.FixedMaskSettings):
    """Settings; share and rounds of the exchanges are the published ones."""

    sparsity: Sparsity = setting(
        0.8, "Pruned fraction of the prunable weights, constant from the start.", unit="fraction"
    )
    allocation: _fixed_masks.Allocation = _fixed_masks.allocation_setting("erk")
    drop_fraction: Fraction = setting(
        0.4,
        "Share of a layer's live weights that the first exchanges replace; it decays along a "
        "cosine. 0 keeps the masks.",
        unit="fraction",
    )
    prune_every: Rounds | None = setting(
        None,
        "Rounds from one exchange of weights to the next.",
        unit="rounds",
        unset="10, or a third of last_prune_round if that is less",
    )
    last_prune_round: Rounds | None = setting(
        None,
        "Last round of training that may exchange weights; the share decays to 0 after it.",
        unit="round",
        unset="the one before three fifths of the run",
    )
    penalty: NonNegative = setting(
        1e-4,
        "Weight of the penalty on the squares of the marked weights; 0 switches it off.",
        unit="loss per square",
    )
    rate: Literal["held_up", "scheduled"] = setting(
        "held_up",
        "Learning rate in rounds that exchange weights: held up while marked weights are large, or "
        "the scheduled one.",
    )
    dropped_activations: Fraction = setting(
        0.0,
        "Share of the entries of a layer's input that clients do not store for the backward pass.",
        unit="fraction",
    )
    drop: Literal["smallest", "marked"] = setting(
        "smallest",
        "What the server drops: the smallest live weights of the average, or the marked ones.",
    )


def build(settings: FedMef, task: Task) -> Algorithm:
    """Draw one mask at random, and train under masks whose smallest weights are extruded.

    Raises:
      ValueError: nothing would be left of a layer, or no exchange would take place.
    """
    model = activations.pruned(task.model, settings.dropped_activations)
    draw = _fixed_masks.draw(settings, task)
    own = task._replace(model=model)
    if settings.drop_fraction == 0.0 or settings.sparsity == 0.0:
        algorithm = _fixed_masks.train_under(own, settings.sparsity, draw)
    else:
        algorithm = in_order(_train(settings, own), (draw,), sparsity=settings.sparsity)
    return algorithm._replace(published={"fedmef": formula})


def _train(settings: FedMef, task: Task) -> Algorithm:
    num_rounds = task.protocol.num_rounds
    period, until = _due_rounds.resolve(
        settings.prune_every,
        settings.last_prune_round,
        usual_last=int(LAST * num_rounds) - 1,
        num_rounds=num_rounds,
    )
    num_exchanged = _at_most_pruned(
        drop_and_grow.counts(
            fraction=drop_and_grow.cosine_decay(initial=settings.drop_fraction, until=until + 1),
            period=period,
            until=until,
            blocks=lambda paths: [0] * len(paths),  # all layers at once
            order="forward",
            prunable=masks_lib.is_kernel,
            rounding="down",
        )
    )
    schedule = task.protocol.learning_rate_scale
    lifted = (
        None if schedule is None or settings.rate == "scheduled" else extrusion.held_up(schedule)
    )
    client = task.local_client(
        penalties=(extrusion.penalty(settings.penalty),) if settings.penalty else (),
        report_grads=drop_and_grow.every(period=period, until=until),
        report_steps=local_training.last_step,
        step_scale=lifted,
    )

    def mark(broadcast: Broadcast) -> Masks:
        counts = num_exchanged(broadcast.masks, broadcast.round)
        return extrusion.marked(broadcast.params, broadcast.masks, counts)

    if settings.penalty or lifted is not None:
        client = step_scales.deriving(client, extrusion.MARKED, mark)
    fields = {"grads": FieldSpec(send="pairs")}
    score = scores.magnitude
    if settings.drop == "marked":  # the server has what clients derive it from

        def known(delta: Params, broadcast: Broadcast) -> Params:
            del delta
            return jax.tree.map(lambda bit: bit.astype(jnp.float32), mark(broadcast))

        score, fields[extrusion.MARKED] = _marked_first, FieldSpec(send="nothing", read=known)
    return training(
        task.protocol,
        client=sparse_gradients.top_gradients(client, num_pairs=num_exchanged),
        pruner=drop_and_grow.drop_and_grow(num_exchanged, drop=score),
        fields=fields,
    )


def _at_most_pruned(counts: drop_and_grow.CountFn) -> drop_and_grow.CountFn:
    """Bound the weights to exchange by those that can come in their place."""

    def bounded(masks, round_index):
        return jax.tree.map(
            lambda number, mask: jnp.minimum(number, jnp.sum(~mask, dtype=jnp.int32)),
            counts(masks, round_index),
            masks,
        )

    return bounded


def _marked_first(key: Key, inputs: PrunerInputs) -> Params:
    """Score live weights by magnitude, marked ones below all others."""
    sizes = scores.magnitude(key, inputs)
    return jax.tree.map(
        lambda size, mark: jnp.where(mark > 0.5, -1.0 / (1.0 + size), size),
        sizes,
        inputs.statistics[extrusion.MARKED],
    )


def formula(metrics: RoundMetrics, state: RoundState) -> PublishedBits:
    """Charge what its authors charge for such methods: sparse models, and pairs going up.

    Models are stored by `storage_models.fedrts_f4`, which contains the mask; a pair takes 32 bits
    and ``ceil(log2 n)`` in a leaf of `n` entries.

    References:
      Huang et al., `FedRTS <https://arxiv.org/abs/2501.19122>`_, 2025, appendix F.4.
    """
    stored = ledger.charge_storage(metrics, state, storage_models.fedrts_f4)
    counts, sizes = ledger.num_sent(metrics, "grads"), trees.sizes(state.params)
    return stored._replace(uplink=stored.uplink + sum(map(storage_models.pairs, counts, sizes)))


METHOD = Method(
    build=build,
    settings=FedMef,
    paper=Paper(
        "Huang et al.",
        2024,
        "FedMef: Towards Memory-efficient Federated Dynamic Pruning",
        arxiv="2403.14737",
        code="https://github.com/FedPruning/FedPruning",
    ),
    variants={
        "pruned_activations": {"dropped_activations": 0.5},
        "without_extrusion": {"penalty": 0.0, "rate": "scheduled"},
    },
    law_settings={
        "sparsity": 0.5,
        "drop_fraction": 0.8,
        "prune_every": 2,
        "last_prune_round": 5,
        "penalty": 0.1,
    },
    nothing_pruned={"sparsity": 0.0},
)
