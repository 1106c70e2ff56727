"""What methods share whose clients revise masks of their own, of which the server makes one.

A readjusting round: a client trains some epochs, drops its smallest weights and grows as many of
the pruned ones by gradient, and trains on; it sends its live weights and its masks. The server
averages each weight over the clients that hold it, and prunes what any of them holds.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from fedjaxprune import masks as masks_lib
from fedjaxprune.federated import aggregators, mask_revision
from fedjaxprune.methods import _due_rounds, _fixed_masks
from fedjaxprune.pruning import drop_and_grow, pruners, schedules, scores
from fedjaxprune.rounds.protocol import FieldSpec, Hooks, Masking
from fedjaxprune.rounds.stages import in_order
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import Fraction, Rounds, Sparsity, setting
from fedjaxprune.types import (
    Aggregator,
    Algorithm,
    Broadcast,
    Masks,
    Params,
    PrunerInputs,
    RoundState,
)

# (masks, local parameters, gradient of all weights, broadcast) -> trees by name
EvidenceFn = Callable[[Masks, Params, Params, Broadcast], Mapping[str, Any]]


class OwnMaskSettings(_fixed_masks.FixedMaskSettings):
    """Settings of methods whose clients revise masks of their own."""

    sparsity: Sparsity = setting(
        0.8, "Pruned fraction of the prunable weights, the same in all rounds.", unit="fraction"
    )
    allocation: _fixed_masks.Allocation = _fixed_masks.allocation_setting("erk")
    first_mask: Literal["random", "magnitude"] = setting(
        "random", "First mask: drawn at random, or the largest initial weights of each layer."
    )
    drop_fraction: Fraction = setting(
        0.5,
        "Share of a layer's live weights that a client exchanges, at the start of its decay along "
        "a cosine; 0 keeps the masks.",
        unit="fraction",
    )
    prune_every: Rounds | None = setting(
        None,
        "Rounds from one readjustment to the next; the first is in the second round of training.",
        unit="rounds",
        unset="10, or a third of last_prune_round if that is less",
    )
    last_prune_round: Rounds | None = setting(
        None,
        "Last round of training that may readjust; the share decays to 0 after it.",
        unit="round",
        unset="half of the run",
    )
    epochs_before: int | None = setting(
        None,
        "Local epochs of a client before it revises its masks.",
        unit="epochs",
        unset="all but the last",
        ge=0,
        le=10_000,
    )


class Guidance(NamedTuple):
    """What decides on a client's exchange beside magnitudes and gradients.

    Attributes:
      evidence: ``(masks, params, grads, broadcast) -> trees by name``, the statistics that `guide`
        finds in its inputs.
      guide: as `drop_and_grow.drop_and_grow` takes it.
      share: of an exchange, that it decides.
    """

    evidence: EvidenceFn
    guide: Callable[[Masks, PrunerInputs], drop_and_grow.Guide]
    share: float


def readjusting_rounds(settings: OwnMaskSettings, num_rounds: int) -> tuple[int, int]:
    """Resolve the rounds from one readjustment to the next, and the last that may have one.

    Raises:
      ValueError: the last is before the first, which is the second round.
    """
    until = min(settings.last_prune_round or max(2, num_rounds // 2), num_rounds)
    if settings.last_prune_round == 1:
        raise ValueError(
            "method.last_prune_round must be at least 2, as the first readjustment is in the "
            "second round, got 1 (method.drop_fraction 0 keeps the masks)."
        )
    return settings.prune_every or min(10, max(1, until // 3)), until


def is_due(settings: OwnMaskSettings, num_rounds: int) -> schedules.Predicate:
    """Select the readjusting rounds, by index from 0: 1, 1 + prune_every, ..."""
    period, until = readjusting_rounds(settings, num_rounds)
    return schedules.every(period, start=1, until=max(until, 2))


def keeps_masks(settings: OwnMaskSettings) -> bool:
    """Tell whether the first mask stays, as nothing is exchanged or nothing is pruned."""
    return settings.drop_fraction == 0.0 or settings.sparsity == 0.0


def build(
    settings: OwnMaskSettings,
    task: Task,
    *,
    guidance: Guidance | None = None,
    hooks: Hooks | None = None,
    votes: Aggregator | None = None,
    init: Callable[[RoundState], RoundState] | None = None,
) -> Algorithm:
    """Draw one mask, and train under masks that clients revise.

    Args:
      settings: of the method.
      task: what it is built for.
      guidance: of the clients' exchange.
      hooks: what happens before and after each round, also where masks are kept.
      votes: combines the clients' masks, positive where some client holds a weight; None counts the
        clients.
      init: ``state -> state``, what the rounds find.

    Raises:
      ValueError: nothing would be left of a layer, or the rounds or epochs do not fit the run.
    """
    score = scores.random if settings.first_mask == "random" else scores.magnitude
    draw = _fixed_masks.draw(settings, task, score=score)
    if keeps_masks(settings):
        return _fixed_masks.train_under(task, settings.sparsity, draw, hooks=hooks)
    due = is_due(settings, task.protocol.num_rounds)
    rule = task.protocol.aggregator  # a robust one judges whole messages
    by_holders = aggregators.holder_mean() if isinstance(rule, Aggregator | None) else None
    train = training(
        task.protocol,
        client=task.mask_revising_client(
            mask_revision.MaskRevision(
                masks=_exchange(settings, task, guidance),
                is_due=due,
                num_steps_before=_before(settings, task),
            )
        ),
        pruner=pruners.when(
            due,
            pruners.prune_union_to(
                settings.sparsity, allocation=_fixed_masks.share_out(settings, task)
            ),
        ),
        fields={
            "delta": FieldSpec(aggregate=by_holders),
            "masks": FieldSpec(aggregate=votes or aggregators.vote_counts(), to_pruner=True),
        },
        masking=Masking(upload=lambda state: masks_lib.full(state.params)),
        hooks=hooks,
    )
    algorithm = in_order(train, (draw,), init=init, sparsity=settings.sparsity)
    is_short = task.protocol.num_rounds == 1
    return algorithm._replace(notes=(_due_rounds.ONE_ROUND,) if is_short else ())


def _before(settings: OwnMaskSettings, task: Task) -> Any:
    """Count the local steps before the revision."""
    epochs = settings.epochs_before
    if epochs is not None and epochs > task.num_epochs:
        raise ValueError(
            f"method.epochs_before must be at most the local epochs ({task.num_epochs}; 1 where "
            f"the protocol counts steps), got {epochs}."
        )
    epochs = task.num_epochs - 1 if epochs is None else epochs
    return mask_revision.after_epochs(epochs, num_epochs=task.num_epochs)


def _exchange(
    settings: OwnMaskSettings, task: Task, guidance: Guidance | None
) -> mask_revision.RevisionFn:
    """Make a client's exchange of weights: a share of those of each layer, which decays."""
    _, until = readjusting_rounds(settings, task.protocol.num_rounds)
    decay = drop_and_grow.cosine_decay(initial=settings.drop_fraction, until=until)
    pruner = drop_and_grow.drop_and_grow(
        drop_and_grow.share_counts(fraction=lambda index: decay(index - 1)),  # from 0 here
        guide=None if guidance is None else guidance.guide,
        guided_share=0.0 if guidance is None else guidance.share,
    )
    pruner = pruners.exempt(pruner, masks_lib.is_kernel)

    def revise(key, masks, params, grads, broadcast):
        seen = {} if guidance is None else guidance.evidence(masks, params, grads, broadcast)
        inputs = PrunerInputs(params=params, grads=grads, round=broadcast.round, statistics=seen)
        return pruner.update(key, masks, (), inputs)[0]

    return revise
