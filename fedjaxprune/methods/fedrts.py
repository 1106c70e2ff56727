"""FedRTS: a random sparse start whose masks are drawn from posteriors of which weights are good.

1. ``draw``: one mask is drawn at random, with higher densities in small layers (ERK); it follows
   from the run's seed and does not travel;
2. ``train``: the server keeps a Beta posterior for every prunable weight. In each round it looks
   which live weights are in the core (the largest of a layer, all but the share that may change) of
   the averaged model, and of each client's model. Every `prune_every` rounds the clients also name
   the pruned weights of largest gradient, by their places alone, and the server draws one number
   from each posterior: the largest draws of a layer are its new mask. Weights that come back start
   from zero; posteriors are never reset. The share decays along a cosine, and exchanges end after
   three fifths of the run. The number of live weights of a layer is constant.

As in the paper: the averaged model has the share `server_share` of an outcome and the clients have
the rest (an appendix of the paper has it the other way round); outcomes of pruned weights come in
exchange rounds only; of these the averaged model says 1/2 (the number is from the public codes).

Inferred, or different: an outcome weighs as much as there are clients in a cohort (the paper has 10
for its 10 clients). Rounds are counted from 1, so that no exchange follows a single round of votes.
After the last exchange round posteriors stay as they are. A layer reconsiders at most as many
weights as are pruned in it. Clients take gradients at their last local batch, before its step (the
paper takes one more batch after training). A client's votes are read off its delta as it arrives,
so they cost nothing. All kernels are prunable (the paper never prunes the output layer). In the
authors' public library the method never changes a mask.

References:
  Huang et al., `FedRTS <https://arxiv.org/abs/2501.19122>`_, 2025.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from fedjaxprune import trees
from fedjaxprune.costs import ledger, storage_models
from fedjaxprune.federated import local_training, sparse_gradients
from fedjaxprune.method import Method, Paper
from fedjaxprune.methods import _due_rounds, _fixed_masks
from fedjaxprune.pruning import drop_and_grow, posteriors
from fedjaxprune.rounds.protocol import FieldSpec
from fedjaxprune.rounds.stages import in_order
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import Fraction, Positive, Rounds, Sparsity, setting
from fedjaxprune.traffic import PublishedBits
from fedjaxprune.types import Algorithm, RoundMetrics, RoundState

LAST = 0.6  # where in a run the share has decayed to nothing: round 300 of 500, as published
USUAL_COHORT = 10  # clients of a round, as published


class FedRTS(_fixed_masks.FixedMaskSettings):
    """Settings; all defaults are published ones."""

    sparsity: Sparsity = setting(
        0.8, "Pruned fraction of the prunable weights, constant from the start.", unit="fraction"
    )
    allocation: _fixed_masks.Allocation = _fixed_masks.allocation_setting("erk")
    drop_fraction: Fraction = setting(
        0.4,
        "Share of a layer's live weights that the first rounds reconsider; it decays along a "
        "cosine. 0 keeps the masks.",
        unit="fraction",
    )
    prune_every: Rounds | None = setting(
        None,
        "Rounds from one draw of new masks to the next.",
        unit="rounds",
        unset="10, or a third of last_prune_round if that is less",
    )
    last_prune_round: Rounds | None = setting(
        None,
        "Last round of training that may change masks; the share decays to 0 after it.",
        unit="round",
        unset="the one before three fifths of the run",
    )
    server_share: float = setting(
        0.5,
        "Share of the averaged model in an outcome; the rest is the clients'.",
        unit="fraction",
        ge=0,
        le=1,
    )
    outcome_weight: Positive | None = setting(
        None,
        "What one outcome adds to a posterior that starts from 1 + 1.",
        unset="the number of clients in a cohort",
    )
    decision: Literal["sample", "mean"] = setting(
        "sample",
        "Whether new masks follow draws from the posteriors, or their means (an ablation).",
    )


def build(settings: FedRTS, task: Task) -> Algorithm:
    """Draw one mask at random, and train under masks that posteriors decide.

    Raises:
      ValueError: nothing would be left of a layer, or no masks would be drawn again.
    """
    draw = _fixed_masks.draw(settings, task)
    if settings.drop_fraction == 0.0 or settings.sparsity == 0.0:
        algorithm = _fixed_masks.train_under(task, settings.sparsity, draw)
    else:
        algorithm = in_order(_train(settings, task), (draw,), sparsity=settings.sparsity)
    return algorithm._replace(published={"fedrts": formula})


def _train(settings: FedRTS, task: Task) -> Algorithm:
    num_rounds = task.protocol.num_rounds
    period, until = _due_rounds.resolve(
        settings.prune_every,
        settings.last_prune_round,
        usual_last=int(LAST * num_rounds) - 1,
        num_rounds=num_rounds,
    )
    is_due = drop_and_grow.every(period=period, until=until)
    reconsidered = posteriors.reconsidered(
        drop_and_grow.cosine_decay(initial=settings.drop_fraction, until=until + 1)
    )

    def num_places(masks, round_index):
        counts = reconsidered(masks, round_index)
        return jax.tree.map(lambda n: jnp.where(is_due(round_index), n, 0), counts)

    def vote(delta, broadcast):
        def core():
            trained = jax.tree.map(jnp.add, broadcast.params, delta)
            counts = reconsidered(broadcast.masks, broadcast.round)
            return posteriors.core(trained, broadcast.masks, counts)

        like = jax.eval_shape(core)
        return jax.lax.cond(
            broadcast.round < until, core, lambda: jax.tree.map(jnp.zeros_like, like)
        )

    client = task.local_client(report_grads=is_due, report_steps=local_training.last_step)
    return training(
        task.protocol,
        client=sparse_gradients.top_places(client, num_places=num_places),
        pruner=posteriors.thompson_sampling(
            reconsidered,
            is_due=is_due,
            until=until,
            weight=settings.outcome_weight or task.cohort_size or USUAL_COHORT,
            share=settings.server_share,
            decision=settings.decision,
        ),
        fields={
            posteriors.VOTES: FieldSpec(send="nothing", read=vote),
            posteriors.PLACES: FieldSpec(send="places", to_pruner=True),
        },
    )


def formula(metrics: RoundMetrics, state: RoundState) -> PublishedBits:
    """Charge what the paper charges: sparse models, and places going up.

    Models are stored by `storage_models.fedrts_f4`; a place takes ``ceil(log2 n)`` bits in a leaf
    of `n` entries. The encoding contains the mask.

    References:
      Huang et al., `FedRTS <https://arxiv.org/abs/2501.19122>`_, 2025, appendix F.4.
    """
    stored = ledger.charge_storage(metrics, state, storage_models.fedrts_f4)
    counts, sizes = ledger.num_sent(metrics, posteriors.PLACES), trees.sizes(state.params)
    place_bits = sum(map(storage_models.places, counts, sizes))
    return stored._replace(uplink=stored.uplink + place_bits)


METHOD = Method(
    build=build,
    settings=FedRTS,
    paper=Paper(
        "Huang et al.",
        2025,
        "FedRTS: Federated Robust Pruning via Combinatorial Thompson Sampling",
        arxiv="2501.19122",
        code="https://github.com/FedPruning/FedPruning",
    ),
    variants={"posterior_mean": {"decision": "mean"}},
    law_settings={
        "sparsity": 0.5,
        "drop_fraction": 0.8,
        "prune_every": 2,
        "last_prune_round": 5,
    },
    nothing_pruned={"sparsity": 0.0},
)
