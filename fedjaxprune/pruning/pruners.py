"""Masks to masks: pairs (init, update) through which the masks flow.

A pruner ranks with a score, learns from a schedule and an allocation how many, and lets a selection
name them. Live weights are those whose mask is True, dead ones the others. No parameter is touched.
"""

import operator

import jax
import jax.numpy as jnp

from fedjaxprune import masks as mask_trees
from fedjaxprune.pruning import allocation as allocations
from fedjaxprune.pruning import schedules, scores
from fedjaxprune.pruning import selection as selections
from fedjaxprune.types import Params, PrunableFn, Pruner, PrunerInputs, Schedule


def keep() -> Pruner:
    """Change nothing."""

    def update_fn(key, masks, state, inputs):
        del key, inputs
        return masks, state

    return Pruner(init=lambda params: (), update=update_fn)


def prune_to(
    sparsity: Schedule | float,
    *,
    score: scores.ScoreFn = scores.magnitude,
    allocation: allocations.AllocationFn = allocations.global_pool(),  # noqa: B008
    selection: selections.SelectionFn = selections.top_k,
) -> Pruner:
    """Switch off the lowest-scoring live weights until `sparsity` is reached.

    Dead weights stay dead: they are not ranked, and a model that is sparser already is left alone.
    To choose anew among all weights write ``chain(grow_to(0.0, score=...), prune_to(sparsity))``.

    Args:
      sparsity: pruned fraction in [0, 1), or a schedule of it.
      score: what a weight is worth.
      allocation: how many each leaf keeps; sees dead weights at -inf.
      selection: which those are.

    Raises:
      ValueError: if `sparsity` is a number outside [0, 1).
    """
    schedule = _schedule("sparsity", sparsity)
    return _towards(schedule, score, allocation, selection, rank=_dead_last, join=operator.and_)


def prune_union_to(
    sparsity: Schedule | float,
    *,
    held: str = "masks",
    score: scores.ScoreFn = scores.magnitude,
    allocation: allocations.AllocationFn = allocations.global_pool(),  # noqa: B008
) -> Pruner:
    """Make every weight live that some client holds, and prune these until `sparsity` is reached.

    The masks in force count for nothing: what no client holds is pruned. A leaf of which clients
    hold fewer weights than are allocated to it keeps all of these.

    Args:
      sparsity: as in `prune_to`.
      held: name in ``inputs.statistics`` of the clients' votes, positive where some client holds a
        weight: a field joined by `aggregators.vote_counts`, say, with ``to_pruner=True``.
      score: as in `prune_to`.
      allocation: as in `prune_to`.

    Raises:
      ValueError: if `sparsity` is a number outside [0, 1); while tracing, if there are no votes.

    References:
      Bibikar et al., `Federated Dynamic Sparse Training <https://arxiv.org/abs/2112.09824>`_, 2022.
    """
    prune = prune_to(sparsity, score=score, allocation=allocation)

    def update_fn(key, masks, state, inputs):
        del masks  # clients revised them
        union = _held_by_any("prune_union_to", held, inputs)
        return prune.update(key, union, state, inputs)

    return Pruner(init=prune.init, update=update_fn)


def prune_union(*, held: str = "masks", score: scores.ScoreFn = scores.magnitude) -> Pruner:
    """Make of the weights that some client holds the best ones live, of each leaf as many as were.

    Args:
      held: as in `prune_union_to`.
      score: as in `prune_to`. Of equal weights the lower index stays.

    Raises:
      ValueError: while tracing, if there are no votes.
    """

    def update_fn(key, masks, state, inputs):
        union = _held_by_any("prune_union", held, inputs)

        def leaf(mask, offered, values):
            num_live = jnp.sum(mask, dtype=jnp.int32)
            return offered & selections.top_k(_dead_last(offered, values), num_live)

        return jax.tree.map(leaf, masks, union, score(key, inputs)), state

    return Pruner(init=lambda params: (), update=update_fn)


def _held_by_any(name, held, inputs):
    """Read off the clients' votes which weights any of them holds."""
    votes = dict(inputs.statistics).get(held)
    if votes is None:
        raise ValueError(
            f"pruners.{name} needs the clients' votes {held!r}, but the pruner sees none: give the "
            "field an aggregate and to_pruner=True."
        )
    return jax.tree.map(lambda vote: vote > 0, votes)


def drop(
    fraction: Schedule | float,
    *,
    score: scores.ScoreFn = scores.magnitude,
    selection: selections.SelectionFn = selections.top_k,
) -> Pruner:
    """Switch off the lowest-scoring `fraction` of the live weights of every leaf.

    Of `n` live weights ``floor(fraction * n)`` go (in float64), so no leaf loses all it has.

    Args:
      fraction: in [0, 1), or a schedule of it.
      score: what a weight is worth.
      selection: which weights stay, given their number.

    Raises:
      ValueError: if `fraction` is a number outside [0, 1).
    """
    schedule = _schedule("fraction", fraction)

    def update_fn(key, masks, state, inputs):
        part = schedules.evaluate(schedule, inputs.round)

        def leaf(mask, values):
            num_live = jnp.sum(mask, dtype=jnp.int32)
            with jax.enable_x64(True):
                num_dropped = jnp.floor(part * num_live.astype(jnp.float64)).astype(jnp.int32)
            return mask & selection(_dead_last(mask, values), num_live - num_dropped)

        return jax.tree.map(leaf, masks, score(key, inputs)), state

    return Pruner(init=lambda params: (), update=update_fn)


def grow_to(
    sparsity: Schedule | float,
    *,
    score: scores.ScoreFn,
    allocation: allocations.AllocationFn = allocations.global_pool(),  # noqa: B008
    selection: selections.SelectionFn = selections.top_k,
) -> Pruner:
    """Switch on the best-scoring dead weights until no more than `sparsity` is pruned.

    Live weights stay live: a leaf that holds more than its share already is left alone, so after
    `prune_to` take the allocation that it had, else the total comes out denser than asked.

    Args:
      sparsity: pruned fraction in [0, 1), or a schedule of it.
      score: what a dead weight is worth.
      allocation: how many each leaf holds afterwards; sees live weights at +inf.
      selection: which those are.

    Raises:
      ValueError: if `sparsity` is a number outside [0, 1).
    """
    schedule = _schedule("sparsity", sparsity)
    return _towards(schedule, score, allocation, selection, rank=_live_first, join=operator.or_)


def chain(*pruners: Pruner) -> Pruner:
    """Run pruners one after another, each on the masks of the one before."""

    def init_fn(params):
        return tuple(pruner.init(params) for pruner in pruners)

    def update_fn(key, masks, state, inputs):
        after = []
        keys = jax.random.split(key, len(pruners))
        for pruner_key, pruner, before in zip(keys, pruners, state, strict=True):
            masks, new = pruner.update(pruner_key, masks, before, inputs)
            after.append(new)
        return masks, tuple(after)

    return Pruner(init=init_fn, update=update_fn)


def when(predicate: schedules.Predicate, pruner: Pruner) -> Pruner:
    """Run a pruner in the rounds that are due; in others masks and state pass unchanged.

    Only the branch that is taken is computed, so do not map this over clients.
    """

    def update_fn(key, masks, state, inputs):
        return jax.lax.cond(
            predicate(inputs.round), pruner.update, keep().update, key, masks, state, inputs
        )

    return Pruner(init=pruner.init, update=update_fn)


def exempt(pruner: Pruner, prunable: PrunableFn) -> Pruner:
    """Keep a pruner off the leaves that are not `prunable`: it sees None in their place.

    So they count in no pool and no sparsity, and their masks come back as they went in. Statistics
    that are no trees of the parameters, such as a sum over leaves, pass as they are.
    """

    def init_fn(params):
        return pruner.init(_hide(params, mask_trees.prunable_leaves(params, prunable)))

    def update_fn(key, masks, state, inputs):
        flags = mask_trees.prunable_leaves(inputs.params, prunable)
        structure = jax.tree.structure(inputs.params)
        seen = PrunerInputs(
            params=_hide(inputs.params, flags),
            grads=None if inputs.grads is None else _hide(inputs.grads, flags),
            round=inputs.round,
            statistics={
                name: _hide(tree, flags) if jax.tree.structure(tree) == structure else tree
                for name, tree in dict(inputs.statistics).items()
            },
        )
        changed, state = pruner.update(key, _hide(masks, flags), state, seen)
        changed_leaves = iter(jax.tree.leaves(changed))
        leaves, structure = jax.tree.flatten(masks)
        merged = [
            next(changed_leaves) if flag else leaf for flag, leaf in zip(flags, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, merged), state

    return Pruner(init=init_fn, update=update_fn)


def _towards(schedule, score, allocation, selection, *, rank, join) -> Pruner:
    """Join to the masks what a selection keeps of ranked scores, as many as are allocated."""

    def update_fn(key, masks, state, inputs):
        ranked = jax.tree.map(rank, masks, score(key, inputs))
        counts = allocation(ranked, schedules.evaluate(schedule, inputs.round))
        kept = jax.tree.map(
            lambda mask, values, count: join(mask, selection(values, count)), masks, ranked, counts
        )
        return kept, state

    return Pruner(init=lambda params: (), update=update_fn)


def _schedule(name: str, value: Schedule | float) -> Schedule:
    if callable(value):
        return value
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1) or be a schedule, got {value}.")
    return schedules.constant(value)


def _dead_last(mask: jax.Array, values: jax.Array) -> jax.Array:
    """Rank dead weights below live ones, those of score -inf or NaN included."""
    lowest = jnp.finfo(values.dtype).min
    values = jnp.where(jnp.isnan(values), lowest, jnp.maximum(values, lowest))
    return jnp.where(mask, values, -jnp.inf)


def _live_first(mask: jax.Array, values: jax.Array) -> jax.Array:
    """Rank live weights above dead ones, those of score +inf included."""
    return jnp.where(mask, jnp.inf, jnp.minimum(values, jnp.finfo(values.dtype).max))


def _hide(tree: Params, flags: list[bool]) -> Params:
    leaves, structure = jax.tree.flatten(tree)
    seen = [leaf if flag else None for leaf, flag in zip(leaves, flags, strict=True)]
    return jax.tree.unflatten(structure, seen)
