"""What methods share whose sparsity climbs along a cubic curve while the model is trained."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pydantic

from fedjaxprune.methods import _fixed_masks
from fedjaxprune.pruning import pruners, schedules, scores
from fedjaxprune.rounds.protocol import Masking
from fedjaxprune.rounds.task import Task
from fedjaxprune.settings import Rounds, Settings, Sparsity, setting
from fedjaxprune.types import PrunableFn, Pruner, Schedule

NOTED = 0.01  # a sparsity that is missed by more is said


def sparsity_setting(default: float) -> Any:
    """Declare the sparsity at the end, with the method's own default."""
    return setting(
        default,
        "Pruned fraction of the prunable weights that the cubic curve leads to at the end of the "
        "run. The masks follow the curve every prune_every rounds, so the last revision is a "
        "little short of it.",
        unit="fraction",
    )


class GradualSettings(Settings):
    """Settings of a sparsity that climbs."""

    sparsity: Sparsity = sparsity_setting(0.92)
    initial_sparsity: Sparsity | None = setting(
        None,
        "Sparsity after the first revision; at most the sparsity.",
        unit="fraction",
        unset="0.5, or the sparsity if that is less",
    )
    prune_every: Rounds | None = setting(
        None,
        "Rounds from one revision of the masks to the next; the first is at the end of the first "
        "round.",
        unit="rounds",
        unset="5, or less in a run of five rounds or fewer",
    )

    @pydantic.model_validator(mode="after")
    def _check_curve(self):
        if self.initial_sparsity is not None and self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"initial_sparsity must be at most sparsity ({self.sparsity}), as the sparsity "
                f"only climbs, got {self.initial_sparsity}."
            )
        return self


class Curve(NamedTuple):
    """A curve of the sparsity, and the rounds at whose end masks follow it: `due`, by `period`.

    There are `notes` if the last revision is well short of the sparsity that was asked for.
    """

    sparsity: Schedule
    initial_sparsity: float
    due: schedules.Predicate
    period: int
    notes: tuple[str, ...]


def plan(settings: GradualSettings, task: Task, *, end_round: int, prunable: PrunableFn) -> Curve:
    """Lay the curve through the rounds of a run, so that it arrives in round `end_round`."""
    num_rounds = task.protocol.num_rounds
    _fixed_masks.check_something_left(task, prunable, settings.sparsity)
    start = settings.initial_sparsity
    start = min(0.5, settings.sparsity) if start is None else start
    period = settings.prune_every or max(1, min(5, num_rounds - 1))
    if start < settings.sparsity and period >= num_rounds > 1:
        raise ValueError(
            f"method.prune_every must be less than federation.num_rounds ({num_rounds}), as the "
            f"sparsity would never leave method.initial_sparsity ({start}), got {period}."
        )
    last = (num_rounds - 1) // period * period
    left = 1.0 - min(1.0, last / end_round)
    reached = settings.sparsity + (start - settings.sparsity) * left**3
    note = (
        f"method.sparsity is {settings.sparsity}, but the last revision of the masks, after round "
        f"{last + 1} of {num_rounds}, reaches {reached:.3g}: more rounds or a smaller "
        "method.prune_every bring it closer."
    )
    curve = schedules.cubic(
        initial_sparsity=start,
        final_sparsity=settings.sparsity,
        begin_round=0,
        end_round=end_round,
    )
    return Curve(
        sparsity=curve,
        initial_sparsity=start,
        due=schedules.every(period),
        period=period,
        notes=(note,) if settings.sparsity - reached > NOTED else (),
    )


def feedback(curve: Curve, mode: str) -> tuple[Pruner, Masking]:
    """Make what revises the masks, and which masks rule where, if clients train dense weights.

    Args:
      curve: what the revisions follow.
      mode: ``"masked"`` ranks the masked aggregate, so that nothing returns, and clients send live
        entries alone; ``"regrow"`` ranks the aggregate before it is masked, and clients send dense
        deltas in the rounds of a revision; ``"dense"`` keeps a dense model at the server, and
        clients always send dense deltas.
    """
    tighten = pruners.prune_to(curve.sparsity)
    if mode != "masked":  # forget the old masks first, so that all weights compete
        tighten = pruners.chain(pruners.grow_to(0.0, score=scores.magnitude), tighten)

    def sent_masks(state):
        if mode == "masked":
            return state.masks
        dense = jnp.bool_(True) if mode == "dense" else curve.due(state.round)
        return jax.tree.map(lambda mask: mask | dense, state.masks)

    masking = Masking(upload=sent_masks, server_is_dense=mode == "dense")
    return pruners.when(curve.due, tighten), masking
