"""PruneFL: the size of the model follows from what each weight gains per second of a round.

1. ``prune_alone``: one client trains and prunes alone, on its first examples, until the number of
   live weights settles; everybody starts from its weights and masks;
2. ``train``: every `prune_every` rounds the clients send squared gradients of all weights. The
   server makes candidates of the smallest live weights of each layer and of all pruned ones, and
   lets in, in descending order of squared gradient over time, those that raise the sum of squared
   gradients (the loss taken off) per second of a round. Weights that come back start from zero.

The time of a round is linear in the live weights of each layer. By default all weights take the
same time, and what does not depend on the masks takes as long as all prunable weights together
(`times: equal`). With `times: modeled` a weight takes the multiply-adds that it has in a round's
passes over the largest client's examples (in its local steps where the protocol counts these), and
64 bits of traffic; the seconds of each are inferred from the published times of VGG-11. `sparsity`
bounds the size; without it the size is an outcome. A revision drops at most its share of the live
weights, so a short run may end with more than the bound.

As in the authors' code: all kernels are prunable, the first and the last included; gains of biases
and normalization count, their time belongs to the constant; the share of candidates halves every
10,000 rounds. Different: an exact number of candidates is dropped (there ties are kept), the bound
is not exceeded (there by one weight), and what comes back starts from zero (`regrown: stale` gives
it the value that it had, as there). Inferred: by default the squares are those of the mean gradient
of the revision round (`accumulate: since_last` adds up all rounds since the last, as in the code,
and keeps a dense state for each client). A client's squares weigh as its examples do; they are
squared at the client. Of leaves that are never pruned only the sum of squares travels. The accuracy
of the first stage is that of its training passes; a momentum of the local optimizer does not last
from batch to batch in it.

References:
  Jiang et al., `PruneFL <https://arxiv.org/abs/1909.12326>`_, 2022; Huang et al., `FedRTS
  <https://arxiv.org/abs/2501.19122>`_, 2025 (the start from random masks).
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from fedjaxprune import masks as masks_lib
from fedjaxprune.costs import flops, ledger, storage_models
from fedjaxprune.federated import squared_gradients
from fedjaxprune.method import Method, Paper
from fedjaxprune.methods import _due_rounds, _fixed_masks, _gradual, _settling
from fedjaxprune.pruning import cost_benefit, drop_and_grow, pruners, schedules
from fedjaxprune.rounds import facts as facts_lib
from fedjaxprune.rounds.protocol import FieldSpec, Masking
from fedjaxprune.rounds.stages import in_order
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import (
    INT_MAX,
    Count,
    Fraction,
    NonNegative,
    Positive,
    Rounds,
    Settings,
    Sparsity,
    setting,
)
from fedjaxprune.traffic import PublishedBits
from fedjaxprune.types import Algorithm, FormulaFn, PrunerInputs, Schedule, Stage

BITS = 64  # that a weight takes, down and up
USUAL_SHARE = 0.3  # of a layer's live weights that are candidates, as published
FIELDS = (cost_benefit.GAINS, cost_benefit.OTHER_GAINS)


class PruneFL(Settings):
    """Settings; those that are published are the defaults."""

    sparsity: Sparsity | None = setting(
        None,
        "Least pruned fraction of the prunable weights: beyond it no weight is let in.",
        unit="fraction",
        unset="none, as the gains and times decide",
    )
    initial_sparsity: Sparsity | None = setting(
        None,
        "The same at the start; it moves to the sparsity at a constant pace over the run.",
        unit="fraction",
        unset="the sparsity",
    )
    start_from: Literal["client", "random", "dense"] = setting(
        "client",
        "What training starts from: what one client found alone, random masks of this sparsity "
        "with ERK densities (as compared with in FedRTS), or the dense model.",
    )
    client_id: int = setting(0, "The client that prunes alone.", unit="client", ge=0, le=INT_MAX)
    initial_examples: Count = setting(
        200, "Its first examples, on which it does so.", unit="examples"
    )
    initial_passes: Count = setting(1000, "Passes over these at most.", unit="passes")
    initial_prune_every: Count = setting(
        50, "Passes from one revision of its masks to the next.", unit="passes"
    )
    further_pruning: bool = setting(True, "Whether masks are revised in training, too.")
    drop_fraction: Fraction = setting(
        USUAL_SHARE,
        "Share of a layer's live weights that a revision makes candidates; 0 only grows.",
        unit="fraction",
    )
    halve_every: Rounds = setting(
        10_000, "Rounds of training in which this share halves.", unit="rounds"
    )
    prune_every: Rounds | None = setting(
        None,
        "Rounds from one revision of the masks to the next.",
        unit="rounds",
        unset="50, or a third of last_prune_round if that is less",
    )
    last_prune_round: Rounds | None = setting(
        None,
        "Last round of training that may revise masks.",
        unit="round",
        unset="the last but one",
    )
    times: Literal["equal", "modeled"] = setting(
        "equal",
        "What time a live weight adds to a round: the same each, or that of its multiply-adds and "
        "of its traffic.",
    )
    seconds_per_multiply_add: NonNegative = setting(
        2e-9, "Time of a multiply-add, forward and backward, with modeled times.", unit="seconds"
    )
    seconds_per_bit: Positive = setting(
        8.7e-8, "Time of a bit of traffic, with modeled times.", unit="seconds"
    )
    constant_seconds: NonNegative | None = setting(
        None,
        "Time of a round that does not depend on the masks; a weight takes 1 with equal times.",
        unit="seconds",
        unset="that of all prunable weights together",
    )
    accumulate: Literal["round", "since_last"] = setting(
        "round",
        "Which gradients are squared: the mean of the revision round, or that of each round since "
        "the last revision, added up at the client.",
    )
    regrown: Literal["zero", "stale"] = setting(
        "zero", "What a weight that comes back starts from: zero, or the value that it left with."
    )

    @pydantic.model_validator(mode="after")
    def _check_sparsity(self):
        if self.sparsity is None and (self.start_from == "random" or self.initial_sparsity):
            what = "start_from 'random'" if self.start_from == "random" else "initial_sparsity"
            raise ValueError(f"sparsity must be given with {what}, got none.")
        stays = "further_pruning false" if not self.further_pruning else "drop_fraction 0"
        is_revised = self.further_pruning and self.drop_fraction > 0.0
        if self.start_from == "dense" and self.sparsity and not is_revised:
            raise ValueError(
                f"sparsity must not be given with start_from 'dense' and {stays}, with which no "
                f"weight is ever dropped, got {self.sparsity}."
            )
        return self


def build(settings: PruneFL, task: Task) -> Algorithm:
    """Choose a first model, and train under masks that follow gains and times.

    Raises:
      ValueError: there is no such client, no revision would take place, or the multiply-adds that
        times shall follow cannot be counted.
    """
    before: tuple[Stage, ...] = ()
    if settings.start_from == "client":
        before = (_alone(settings, task),)
    elif settings.start_from == "random":
        fixed = _fixed_masks.FixedMaskSettings(sparsity=settings.sparsity or 0.0, allocation="erk")
        before = (_fixed_masks.draw(fixed, task),)
    return in_order(_train(settings, task), before, sparsity=settings.sparsity or 0.0)


def _train(settings: PruneFL, task: Task) -> Algorithm:
    is_never_pruned = settings.start_from == "dense" and settings.drop_fraction == 0.0
    if is_never_pruned or not settings.further_pruning:
        plain = training(task.protocol, client=task.local_client())
        return plain._replace(has_fixed_masks=True, notes=_notes(settings, task, ()))
    num_rounds = task.protocol.num_rounds
    period, until = _due_rounds.resolve(
        settings.prune_every,
        settings.last_prune_round,
        usual_last=num_rounds - 1,
        num_rounds=num_rounds,
        usual_period=50,
    )
    is_due = drop_and_grow.every(period=period, until=until)
    sums_up = settings.accumulate == "since_last"
    client = task.local_client(report_grads=(lambda index: index < until) if sums_up else is_due)
    algorithm = training(
        task.protocol,
        client=squared_gradients.squared_gradients(
            client,
            prunable=masks_lib.is_kernel,
            names=FIELDS,
            since_last=is_due if sums_up else None,
        ),
        pruner=pruners.when(is_due, _pruner(settings, task, _share(settings))),
        fields={
            cost_benefit.GAINS: FieldSpec(travels=masks_lib.is_kernel, to_pruner=True),
            cost_benefit.OTHER_GAINS: FieldSpec(to_pruner=True),
        },
        masking=Masking(server_is_dense=settings.regrown == "stale"),
    )
    formulas = {
        "prunefl": formula(storage_models.prunefl_published),
        "prunefl_corrected": formula(storage_models.prunefl_corrected),
    }
    revised = range(period - 1, until, period)
    return algorithm._replace(published=formulas, notes=_notes(settings, task, revised))


def _notes(settings: PruneFL, task: Task, revised: Sequence[int]) -> tuple[str, ...]:
    """Say if the revisions, in rounds of these indices, are too few to be sure of the sparsity."""
    last, num_rounds = settings.sparsity or 0.0, task.protocol.num_rounds
    first = last if settings.initial_sparsity is None else settings.initial_sparsity
    live = 1.0 - last if settings.start_from == "random" else 1.0  # at most so many
    if settings.start_from == "client":
        share = settings.drop_fraction or USUAL_SHARE
        live = max(1.0 - first, (1.0 - share) ** _settling.most_revisions(_plan(settings)))
    for index in revised:
        bound = first + (last - first) * index / num_rounds
        live = max(1.0 - bound, live * (1.0 - float(_share(settings)(jnp.float32(index)))))
    if last - (1.0 - live) <= _gradual.NOTED:
        return ()
    how = "more rounds or a smaller method.prune_every bring"
    if not revised:
        how = "more method.initial_passes or a smaller method.initial_prune_every bring"
    return (
        f"method.sparsity is {last}, but the masks may stop at {1.0 - live:.3g}, as a revision "
        f"drops at most a share of the live weights: {how} it closer.",
    )


def _share(settings: PruneFL) -> Schedule:
    """Let the share of candidates halve every so many rounds."""
    return lambda index: settings.drop_fraction * 0.5 ** (index / settings.halve_every)


def _pruner(settings: PruneFL, task: Task, share: Schedule | float):
    """Revise masks by gains and times."""
    times = _times(settings, task)
    leaves = facts_lib.leaves_by_path(task.facts)
    sizes = facts_lib.sizes(task.facts, masks_lib.is_kernel)
    constant = settings.constant_seconds
    if constant is None:
        constant = sum(times(path, leaves[path]) * size for path, size in sizes.items())
    return cost_benefit.cost_benefit(
        share, times=times, constant=constant, sparsity=_bound(settings, task)
    )


def _bound(settings: PruneFL, task: Task) -> Schedule | None:
    last, first = settings.sparsity, settings.initial_sparsity
    if last is None:
        return None
    if first is None:
        return schedules.constant(last)
    return schedules.linear(
        initial_sparsity=first,
        final_sparsity=last,
        begin_round=0,
        end_round=task.protocol.num_rounds,
    )


def _times(settings: PruneFL, task: Task) -> cost_benefit.TimeFn:
    """Say what time a live weight of a leaf adds to a round."""
    if settings.times == "equal":
        return lambda path, leaf: 1.0
    two_examples = task.facts.inputs
    counts: dict[str, float] = {}
    for layer in flops.of_model(task.model, None, two_examples):
        for path in {path for paths in layer.weights for path in paths}:
            counts[path] = counts.get(path, 0.0) + layer.dense.forward / 2
    num_examples = task.examples_per_round or task.largest_client * task.num_epochs

    def seconds(path, leaf):
        per_weight = num_examples * counts.get(path, 0.0) / leaf.size
        computing = per_weight * settings.seconds_per_multiply_add
        return computing + BITS * settings.seconds_per_bit

    return seconds


def _alone(settings: PruneFL, task: Task) -> Stage:
    """Let one client prune alone, with the same rule."""
    if settings.client_id >= task.num_clients:
        raise ValueError(
            f"method.client_id must be less than data.num_clients ({task.num_clients}), got "
            f"{settings.client_id}."
        )
    share = settings.drop_fraction or USUAL_SHARE  # with none it would never prune
    pruner = pruners.exempt(_pruner(settings, task, share), masks_lib.is_kernel)
    shapes = jax.eval_shape(task.model.predict, *task.facts[:3])
    num_classes = max(2, shapes.shape[-1]) if hasattr(shapes, "shape") else 2
    plan = _plan(settings)._replace(accuracy=1.5 / num_classes)

    def revise(masks, state, squares):
        gains = squared_gradients.split(squares, masks_lib.is_kernel)
        inputs = PrunerInputs(
            params=state.params,
            grads=None,
            round=jnp.int32(0),
            statistics=dict(zip(FIELDS, gains, strict=True)),
        )
        return pruner.update(jax.random.key(0), masks, (), inputs)[0]

    return _settling.prune_alone(task, plan, revise)


def _plan(settings: PruneFL) -> _settling.Plan:
    """Plan what the client does alone, whatever its accuracy."""
    return _settling.Plan(
        client_id=settings.client_id,
        num_examples=settings.initial_examples,
        num_passes=settings.initial_passes,
        prune_every=settings.initial_prune_every,
        accuracy=0.0,
    )


def formula(charge: storage_models.StorageFn) -> FormulaFn:
    """Make a charge of sparse models, and of what `charge` adds to them where squares go up."""

    def beyond(kept, shapes):
        return charge(kept, shapes) - 2 * storage_models.fedrts_f4(kept, shapes)

    def charged(metrics, state):
        stored = ledger.charge_storage(metrics, state, storage_models.fedrts_f4)
        field = metrics.sent.up.get("reply", {}).get(cost_benefit.GAINS)
        if field is None or not np.any(field.clients):
            return stored
        added = ledger.charge_storage(metrics, state, beyond).uplink
        return PublishedBits(uplink=stored.uplink + added, downlink=stored.downlink)

    return charged


METHOD = Method(
    build=build,
    settings=PruneFL,
    paper=Paper(
        "Jiang et al.",
        2022,
        "Model Pruning Enables Efficient Federated Learning on Edge Devices",
        arxiv="1909.12326",
        code="https://github.com/jiangyuang/PruneFL",
    ),
    variants={
        "initial_only": {"further_pruning": False},
        "random_start": {"start_from": "random", "sparsity": 0.8},
    },
    law_settings={
        "initial_passes": 8,
        "initial_prune_every": 2,
        "prune_every": 2,
        "drop_fraction": 0.5,
    },
    nothing_pruned={"start_from": "dense", "drop_fraction": 0.0, "sparsity": None},
)
