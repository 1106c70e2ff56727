"""FedFit: clients exchange weights by what these do to the loss to second order (Fisher scores).

1. ``draw``: one mask is drawn at random, with higher densities in small layers (ERK); it follows
   from the run's seed and does not travel;
2. ``train``: every `prune_every` rounds, a client scores all weights at each batch of its first
   epoch. The curvature of a weight is estimated from second moments of its layer's inputs and of
   the gradients of its outputs. It drops the live weights whose removal would raise the loss least,
   grows as many of the pruned ones whose best step would lower it most, at value zero, and trains
   its other epochs under these masks of its own. It sends its live weights, its masks and scores.
   The server drops, in each layer, the live weights of lowest mean score, and grows as many of
   those that clients grew, of highest mean score. In other rounds it is FedAvg under the masks.

With `w` a weight, `G` its gradient and `F` the curvature, a removal raises the loss by
``w**2 * F / 2 - G * w``, and the best step lowers it by ``G**2 / (2 * F)``. `F` is the sum of
squared inputs times the sum of squared output gradients, divided by the rows of an example: a
diagonal of the empirical Fisher information if both are independent (``curvature: joint`` sums
their products). Scores of clients count alike; a client that did not grow a weight says 0.

We had access to the abstract of the paper and to the authors' code; its formulas were not legible,
so all of this follows the code, or is inferred. Different: in the code, masks are all ones until
the first readjustment prunes them in one shot (`dense_rounds` trains densely first, and prunes by
mean removal scores, charged as dense); clients never find the scores and fall back to magnitudes
and gradients; the curvature is too large by the rows of an example times the square of all rows,
so that the gradient hardly counts (``curvature_scale: code``). There the server prunes the union of
the clients' masks by removal scores, where all grown weights have 0: with several clients masks
then hardly change (``decision: union``). ``decision: fresh`` measures these scores again in the
last epoch (of two or more), under the client's own masks, and prunes the union by them. What is
dropped is not grown at once, and a weight whose gain is 0 is not grown. The rounds are those of the
read-me's example.

A weight that a client dropped counts as zero in the mean. With ``absent: holders`` the mean is over
the clients that hold it. A robust ``server.aggregator`` takes it for unchanged. If nobody answers
when dense training ends, masks keep the largest weights (a stage ``settle``) [inferred]. A device
that holds a sparse model needs memory for two dense trees of scores and the dense gradient in a
readjusting round, unless it works through them layer by layer. Every kernel must meet the examples
in products that can be followed (`structure.moments`); a use that cannot is refused.

References:
  Bi et al., FedFit: Federated Dynamic Sparse Training via Fisher Information scoring, ICML 2026;
  Huang et al., `FedRTS <https://arxiv.org/abs/2501.19122>`_, 2025.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune.costs import ledger, storage_models
from fedjaxprune.federated import aggregators, mask_revision
from fedjaxprune.federated.corrections import fednova
from fedjaxprune.method import Method, Needs, Paper
from fedjaxprune.methods import _due_rounds, _fixed_masks, _scored_masks
from fedjaxprune.pruning import curvature as curvature_lib
from fedjaxprune.pruning import drop_and_grow, pruners, schedules, scores
from fedjaxprune.rounds.protocol import FieldSpec, Masking, joining
from fedjaxprune.rounds.stages import in_order
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import INT_MAX, Fraction, Rounds, Sparsity, setting
from fedjaxprune.structure import moments as moments_lib
from fedjaxprune.traffic import PublishedBits
from fedjaxprune.types import (
    Aggregator,
    Algorithm,
    Params,
    PrunerInputs,
    RoundMetrics,
    RoundState,
    Stage,
)

LAST = 0.6  # where in a run the share has decayed to nothing: round 300 of 500, as in the read-me
SCORES = "scores"  # the field, and the statistic that the server's pruner sees
REMOVAL, GAIN = "removal", "gain"
SCORE = scores.statistic(SCORES)


class FedFit(_fixed_masks.FixedMaskSettings):
    """Settings; those of the read-me's example are the defaults."""

    sparsity: Sparsity = setting(
        0.9, "Pruned fraction of the prunable weights, the same in all rounds.", unit="fraction"
    )
    allocation: _fixed_masks.Allocation = _fixed_masks.allocation_setting("erk")
    drop_fraction: Fraction = setting(
        0.2,
        "Share of a layer's live weights that clients and server exchange, at the start of its "
        "decay along a cosine; 0 keeps the masks.",
        unit="fraction",
    )
    prune_every: Rounds | None = setting(
        None,
        "Rounds before the first readjustment, and from one to the next.",
        unit="rounds",
        unset="10, or a third of last_prune_round if that is less",
    )
    last_prune_round: Rounds | None = setting(
        None,
        "Last round of training that may readjust; the share decays to 0 after it.",
        unit="round",
        unset="the one at three fifths of the run",
    )
    epochs_before: int = setting(
        1,
        "Local epochs of a client in which it scores weights, before it revises its masks.",
        unit="epochs",
        ge=1,
        le=10_000,
    )
    decision: Literal["exchange", "union", "fresh"] = setting(
        "exchange",
        "What the server does: it exchanges weights by mean scores, or keeps the best of the union "
        "of the clients' masks by their removal scores, or by such that are measured again in the "
        "last epoch.",
    )
    curvature: curvature_lib.Form = setting(
        "factored",
        "Curvature of a weight: product of the sums of squared inputs and output gradients, or sum "
        "of their products.",
    )
    curvature_scale: curvature_lib.Scale = setting(
        "fisher", "Its scale: that of the Fisher information, or that of the public code."
    )
    drop_score: Literal["removal", "first_order", "second_order", "magnitude"] = setting(
        "removal",
        "By what live weights are ranked: the rise of the loss, one of its two terms alone, or "
        "their magnitude (ablations).",
    )
    grow_score: Literal["gain", "gradient"] = setting(
        "gain",
        "By what pruned weights are ranked: the fall of the loss, or the size of their gradient "
        "(an ablation).",
    )
    dense_rounds: int = setting(
        0,
        "Rounds of dense FedAvg before the masks, which then follow from removal scores of the "
        "last of these; with 0 they are drawn at random. A sparsity of 0 has none of these rounds.",
        unit="rounds",
        ge=0,
        le=INT_MAX,
    )
    absent: Literal["zero", "holders"] = setting(
        "zero",
        "Whether a weight that a client dropped counts as zero in the mean, or not at all.",
    )


def build(settings: FedFit, task: Task) -> Algorithm:
    """Draw one mask at random, and train under masks that follow scores.

    Raises:
      ValueError: nothing would be left of a layer, or the rounds or epochs do not fit the run.
    """
    if settings.dense_rounds and settings.sparsity:
        before = (_dense_start(settings, task), _scored_masks.settle(settings, task))
    else:
        before = (_fixed_masks.draw(settings, task),)
    if settings.drop_fraction == 0.0:
        algorithm = _fixed_masks.train_under(task, settings.sparsity, *before)
    else:
        algorithm = in_order(_train(settings, task), before, sparsity=settings.sparsity)
    return algorithm._replace(published={"fedfit": formula})


def readjusting_rounds(settings: FedFit, num_rounds: int) -> tuple[int, int]:
    """Resolve the rounds from one readjustment to the next, and the last that may have one.

    Raises:
      ValueError: there would be none, though one was asked for.
    """
    until = min(settings.last_prune_round or max(2, int(LAST * num_rounds)), num_rounds)
    period = settings.prune_every or min(10, max(1, until // 3))
    if period >= until and (settings.prune_every or settings.last_prune_round):
        raise ValueError(
            f"method.prune_every must be less than {until}, the last round in which weights may be "
            f"exchanged, got {period} (method.drop_fraction 0 keeps the masks)."
        )
    return period, until


def _train(settings: FedFit, task: Task) -> Algorithm:
    period, until = readjusting_rounds(settings, task.protocol.num_rounds)
    if settings.sparsity == 0.0 or period >= until:
        plain = training(task.protocol, client=task.local_client())
        notes = (_due_rounds.ONE_ROUND,) if settings.sparsity else ()
        return plain._replace(has_fixed_masks=True, notes=notes)
    is_due = schedules.every(period, start=period, until=until)
    decay = drop_and_grow.cosine_decay(initial=settings.drop_fraction, until=until)
    num_exchanged = drop_and_grow.share_counts(fraction=lambda index: decay(index - 1))  # from 0
    exchange = pruners.exempt(
        drop_and_grow.drop_and_grow(
            num_exchanged, drop=scores.statistic(REMOVAL), grow=scores.statistic(GAIN)
        ),
        masks_lib.is_kernel,
    )

    is_fresh = settings.decision == "fresh"

    def revise(key, masks, params, found, broadcast):
        inputs = PrunerInputs(params, None, broadcast.round, statistics=found)
        return exchange.update(key, masks, (), inputs)[0]

    def scored(before, after):  # the weights of which scores travel
        if settings.decision == "union":
            return before
        return after if is_fresh else jax.tree.map(jnp.logical_or, before, after)

    if settings.decision == "exchange":
        pruner = drop_and_grow.drop_and_grow(num_exchanged, drop=SCORE, grow=SCORE)
    else:
        pruner = pruners.prune_union(score=SCORE)
    rule = task.protocol.aggregator  # a robust one judges whole messages
    is_mean = isinstance(rule, Aggregator | None)
    counts_zeros = is_mean and settings.absent == "zero"
    if counts_zeros:
        _check_correction(task)
    by_holders = aggregators.holder_mean() if is_mean and settings.absent == "holders" else None
    revision = _revision(settings, task, is_fresh=is_fresh)
    return training(
        task.protocol,
        client=task.mask_revising_client(revision._replace(masks=revise, is_due=is_due)),
        pruner=pruners.when(is_due, pruner),
        fields={
            "delta": FieldSpec(aggregate=by_holders),
            "masks": FieldSpec(aggregate=aggregators.vote_weights(), to_pruner=True),
            SCORES: _scores_field(task),
        },
        masking=Masking(
            upload=lambda state: masks_lib.full(state.params),
            upload_masks=lambda fields, masks: {SCORES: scored(masks, fields["masks"])},
            absent="zero" if counts_zeros else "unchanged",
        ),
    )


def _check_correction(task: Task) -> None:
    """Refuse deltas in a unit in which a weight that became zero cannot be written."""
    correction = task.protocol.correction
    if correction is not None and fednova.STEPS in correction.fields:
        raise ValueError(
            "client.correction 'fednova' divides deltas by steps, so a weight that a client "
            "dropped cannot count as zero in their mean: set method.absent to 'holders'."
        )


def _dense_start(settings: FedFit, task: Task) -> Stage:
    """Train densely; in the last round all weights are scored, and the server prunes by that."""

    def is_due(index):
        return index == settings.dense_rounds - 1

    revision = _revision(settings, task, is_fresh=False)
    train = training(
        task.protocol,
        client=task.mask_revising_client(revision._replace(is_due=is_due)),
        pruner=pruners.when(
            is_due,
            pruners.prune_to(
                settings.sparsity, score=SCORE, allocation=_fixed_masks.share_out(settings, task)
            ),
        ),
        fields={SCORES: _scores_field(task)},
        masking=Masking(upload_masks=lambda fields, masks: {SCORES: masks}),
        name="start",
    )
    return train.stages[0]._replace(num_rounds=settings.dense_rounds)


def _revision(settings: FedFit, task: Task, *, is_fresh: bool) -> mask_revision.MaskRevision:
    """Score weights in a client's first epochs, and keep the masks: the caller says more."""
    epochs = settings.epochs_before
    most = task.num_epochs - is_fresh
    if most < 1:
        raise ValueError(
            "method.decision 'fresh' scores weights again in the last epoch, so client.epochs must "
            f"be at least 2, got {task.num_epochs} (1 where the protocol counts steps)."
        )
    if epochs > most:
        raise ValueError(
            f"method.epochs_before must be at most {most}, as clients train {task.num_epochs} "
            "epochs (1 where the protocol counts steps)"
            + (" and score again in the last" if is_fresh else "")
            + f", got {epochs}."
        )

    def report(found, before, after):
        return jax.tree.map(
            lambda was, keeps, is_live, promise: jnp.where(
                keeps if is_fresh else was, is_live, jnp.where(keeps, promise, 0.0)
            ),
            before,
            after,
            found[REMOVAL],
            found[GAIN],
        )

    again = mask_revision.after_epochs(task.num_epochs - 1, num_epochs=task.num_epochs)
    return mask_revision.MaskRevision(
        masks=lambda key, masks, params, found, broadcast: masks,
        is_due=lambda index: index < 0,
        num_steps_before=mask_revision.after_epochs(epochs, num_epochs=task.num_epochs),
        judgement=mask_revision.Judgement(
            judge=judge(settings, task.model.loss),
            report=report,
            num_steps_before=again if is_fresh else None,
        ),
    )


def judge(settings: FedFit, loss: mask_revision.LossFn) -> mask_revision.JudgeFn:
    """Make the function that scores all weights on a batch, beside its loss and gradient."""
    kinds = ("joint", "rows") if settings.curvature == "joint" else ("inputs", "outputs", "rows")
    look = moments_lib.of_loss(loss, prunable=masks_lib.is_kernel, kinds=kinds)

    def judge_fn(params, model_state, batch, key):
        found, grads, moments = look(params, model_state, batch, key)
        curvature = curvature_lib.fisher(
            moments,
            jnp.sum(batch.weights > 0),
            form=settings.curvature,
            scale=settings.curvature_scale,
        )
        return found, grads, _scores(settings, params, grads, curvature)

    return judge_fn


def _scores(settings: FedFit, params: Params, grads: Params, curvature: Params) -> dict[str, Any]:
    """Rank live weights and pruned ones, as the settings say."""
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)

    def sizes(tree):
        return jax.tree.map(lambda leaf: jnp.abs(leaf.astype(jnp.float32)), tree)

    if settings.drop_score == "magnitude":
        worth = sizes(params)
    else:
        first = nothing if settings.drop_score == "second_order" else grads
        second = nothing if settings.drop_score == "first_order" else curvature
        worth = curvature_lib.removal(params, first, second)
    is_gain = settings.grow_score == "gain"
    return {REMOVAL: worth, GAIN: curvature_lib.gain(grads, curvature) if is_gain else sizes(grads)}


def _scores_field(task: Task) -> FieldSpec:
    """Send the scores of kernels, whose clients count alike."""
    return FieldSpec(
        joining(task.protocol, by="clients"), travels=masks_lib.is_kernel, to_pruner=True
    )


def formula(metrics: RoundMetrics, state: RoundState) -> PublishedBits:
    """Charge sparse models as values and a bitmap, and 32 bits for each score that goes up."""
    stored = ledger.charge_storage(metrics, state, storage_models.fedrts_bitmap)
    field = metrics.sent.up.get("reply", {}).get(SCORES)
    if field is None:
        return stored
    who = np.asarray(field.clients) & np.asarray(metrics.participated)
    num_scores = int(np.asarray(field.live_counts, np.int64)[who].sum())
    return stored._replace(uplink=stored.uplink + 32 * num_scores)


METHOD = Method(
    build=build,
    settings=FedFit,
    paper=Paper(
        "Bi et al.",
        2026,
        "FedFit: Federated Dynamic Sparse Training via Fisher Information scoring",
        code="https://github.com/Serena-28/Fedfit",
    ),
    needs=Needs(products=True),
    variants={
        "union": {"decision": "union"},
        "joint": {"curvature": "joint"},
        "dense_start": {"dense_rounds": 10, "decision": "union", "curvature_scale": "code"},
    },
    law_settings={
        "sparsity": 0.5,
        "drop_fraction": 0.5,
        "prune_every": 2,
        "last_prune_round": 6,
    },
    nothing_pruned={"sparsity": 0.0},
)
