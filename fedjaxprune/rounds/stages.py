"""Stages in a row: training behind the stages that decide what it starts from."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fedjaxprune import live_weights, trees
from fedjaxprune import masks as masks_lib
from fedjaxprune.rounds.protocol import Hooks
from fedjaxprune.types import (
    Algorithm,
    ClientState,
    Cohort,
    Params,
    PrunableFn,
    RoundFn,
    RoundMetrics,
    RoundState,
    Stage,
    State,
)

# (key, state, cohort, population) -> (state, rows, metrics, whether the round counts)
_CountedRoundFn = Callable[..., tuple[RoundState, ClientState, RoundMetrics, jax.Array]]


def in_order(
    training: Algorithm,
    before: Sequence[Stage],
    *,
    init: Callable[[RoundState], RoundState] | None = None,
    sparsity: float = 0.0,
) -> Algorithm:
    """Put stages before training; what is deployed is under the masks in force.

    Args:
      training: an algorithm, usually of one stage; every stage counts its rounds from 0.
      before: what comes first, in order.
      init: ``state -> state``, what the stages find; raises where the network does not fit.
      sparsity: that the stages lead to; above 0 a network without prunable leaves is refused.
    """

    def init_fn(params, model_state):
        if sparsity > 0.0:
            check_prunable(params, training.prunable)
        state = training.init(params, model_state)
        return state if init is None else init(state)

    stages: list[Stage] = []
    for stage in (*before, *training.stages):
        stages.append(shift_rounds(stage, sum(each.num_rounds for each in stages)))
    return training._replace(
        init=init_fn,
        stages=tuple(stages),
        deployed_params=lambda state: masks_lib.apply(state.masks, training.deployed_params(state)),
    )


def telling_masks(algorithm: Algorithm) -> Algorithm:
    """Let the network of a method know the masks in force, before and after each round.

    It is for networks that normalize their live weights (`live_weights`); with others, nothing
    changes. In local training clients tell it the masks that they train under.
    """

    def told(state: RoundState) -> RoundState:
        masked = live_weights.with_masks(state.model_state, state.masks)
        return state._replace(model_state=masked)

    def follow(stage: Stage) -> Stage:
        inner = guarded(stage.round)

        def round_fn(key, state, cohort, population):
            state, rows, metrics = inner(key, told(state), cohort, population)
            return told(state), rows, metrics

        return stage._replace(round=mark_guarded(round_fn))

    return algorithm._replace(stages=tuple(map(follow, algorithm.stages)))


def check_prunable(params: Params, prunable: PrunableFn) -> None:
    """See that a network has something to prune.

    Raises:
      ValueError: if none of the leaves is prunable.
    """
    if not any(masks_lib.prunable_leaves(params, prunable)):
        raise ValueError(
            "there is nothing to prune: none of the leaves "
            f"{', '.join(trees.paths(params))} is prunable; say which are by `prunable=`."
        )


def shift_rounds(stage: Stage, num_before: int) -> Stage:
    """Let a stage count its rounds from 0, though `num_before` rounds of others came before it.

    Schedules of learning rates, sparsities and exchanges of weights are the stage's own.
    """
    if num_before == 0:
        return stage
    inner = guarded(stage.round)

    def round_fn(key, state, cohort, population):
        shifted = state._replace(round=state.round - num_before)
        result, rows, metrics = inner(key, shifted, cohort, population)
        return result._replace(round=result.round + num_before), rows, metrics

    return stage._replace(round=mark_guarded(round_fn))


def close(
    before: RoundState,
    after: RoundState,
    *,
    known_to: Literal["holders", "everybody", "nobody"] = "holders",
) -> RoundState:
    """Count a round that does not train, and say who holds the masks that it leaves.

    Args:
      before: the state that came in.
      after: what the round made of it.
      known_to: ``"holders"``: who held the masks, if they did not change; ``"everybody"`` who did,
        though they changed; ``"nobody"``, though they did not.
    """
    has_changed = masks_lib.num_changed(before.masks, after.masks) > 0
    step = {"holders": has_changed, "everybody": jnp.bool_(False), "nobody": jnp.bool_(True)}
    return after._replace(
        round=before.round + 1, masks_id=before.masks_id + step[known_to].astype(jnp.int32)
    )


def is_sound(before: RoundState, after: RoundState) -> jax.Array:
    """Tell whether what a round wrote may be kept: it brings no NaN and no infinity in."""
    rest = [state._replace(params=(), model_state=(), pruner=()) for state in (before, after)]
    is_finite = trees.all_finite((after.params, after.model_state)) & trees.stays_finite(*rest)
    return is_finite & is_sound_pruner(before.pruner, after.pruner)


def is_sound_pruner(before: State, after: State) -> jax.Array:
    """Tell whether a pruner's state brings no NaN in, and no infinity but the -inf of scores."""
    return trees.stays_finite(*jax.tree.map(_without_negative_infinity, (before, after)))


def _without_negative_infinity(leaf: jax.Array) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return jnp.where(jnp.isneginf(leaf), jnp.zeros_like(leaf), leaf)


def keep_if(
    counts: jax.Array, state: RoundState, cohort: Cohort, after: RoundState, rows: ClientState
) -> tuple[RoundState, ClientState]:
    """Drop a round that does not count: only its number and what masks are held remain of it."""
    after = trees.tree_where(counts, after, state._replace(round=after.round))
    kept = trees.tree_where(counts, rows, cohort.states)
    return after, kept._replace(masks_held=rows.masks_held)


def mark_guarded(round_fn: RoundFn) -> RoundFn:
    """Say of a round that it keeps nothing that is not sound, so that `guarded` adds nothing."""
    round_fn.is_guarded = True  # pyright: ignore[reportFunctionMemberAccess]
    return round_fn


def guarded(round_fn: RoundFn) -> RoundFn:
    """Drop a round of one's own that brings a NaN or an infinity into state, rows or metrics.

    All of its clients are counted as rejected. Rounds are counted here, whatever it does. Rounds of
    this package, which guard themselves, are given back as they are.

    Raises:
      ValueError: while tracing, if the state or the rows do not keep their shapes and types.
    """
    if getattr(round_fn, "is_guarded", False):
        return round_fn

    def guarded_fn(key, state, cohort, population):
        after, rows, metrics = round_fn(key, state, cohort, population)
        _check_kept("state", state, after)
        _check_kept("clients' rows", cohort.states, rows)
        after = after._replace(round=state.round + 1)
        sound = is_sound(state, after) & trees.stays_finite(cohort.states, rows)
        sound = sound & trees.all_finite(metrics.train)
        kept, rows = keep_if(sound, state, cohort, after, rows)
        kept = kept._replace(masks_id=after.masks_id)  # counts by who was sent masks
        rejected = jnp.where(sound, metrics.num_rejected, metrics.num_participating)
        return kept, rows, metrics._replace(num_rejected=rejected)

    return mark_guarded(guarded_fn)


def _check_kept(what: str, before: Any, after: Any) -> None:
    """Refuse what a round makes of a tree if it is not of the same structure, shapes and types."""
    trees.check_shapes(after, before, what=f"the {what} after a round")
    for path, old, new in zip(
        trees.paths(before), jax.tree.leaves(before), jax.tree.leaves(after), strict=True
    ):
        if jnp.result_type(new) != jnp.result_type(old):
            raise ValueError(
                f"the {what} after a round must keep its types, but {path!r} is "
                f"{jnp.result_type(new)} and was {jnp.result_type(old)}."
            )


def with_hooks(round_fn: _CountedRoundFn, hooks: Hooks | None) -> RoundFn:
    """Add a method's hooks to a round, which also tells whether it counts: ``[]`` bool.

    Of a round that does not count, or in which a hook brings in a NaN or an infinity, nothing but
    its number remains.
    """

    def hooked_fn(key, state, cohort, population):
        if hooks is None:
            return round_fn(key, state, cohort, population)[:3]
        start = state if hooks.before_round is None else hooks.before_round(state)
        after, rows, metrics, counts = round_fn(key, start, cohort, population)
        if hooks.after_round is not None:
            after, metrics = hooks.after_round(state, after, metrics)
        sound = is_sound(state, after)
        rejected = jnp.where(counts & ~sound, metrics.num_participating, metrics.num_rejected)
        kept, rows = keep_if(counts & sound, state, cohort, after, rows)
        after = kept._replace(masks_id=after.masks_id)  # counts by who was sent masks
        return after, rows, metrics._replace(num_rejected=rejected)

    return mark_guarded(hooked_fn)
