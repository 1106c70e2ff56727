"""From votes to one mask: rules by which many masks of a layer's filters become one.

A filter's score is the share of the votes that keep it, one of ``1/N, 2/N, ..., 1`` for `N` equal
voters. Most rules keep what scores at least a threshold, and differ in where they put it. All
arithmetic is exact: shares are never divided out.

References:
  Gez and Cohen, `MPFL <https://arxiv.org/abs/2312.03889>`_, 2023; the rules of its public code are
  `code_dynamic` and, but for what it takes the percentile of, `histogram`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune.pruning.structured import filters
from fedjaxprune.pruning.structured.filters import Quota
from fedjaxprune.registry import Part


class Ballot(NamedTuple):
    """The votes on one layer of ``F`` filters.

    Attributes:
      votes: ``[F]`` int32 or float32, the weight of those who keep each filter.
      weight: ``[]``, the weight of all who voted; their number where votes are equal.
      num_voters: ``[]`` int32.
      live: ``[F]`` bool, what was kept before; nothing else can be kept.
      worth: ``[F]`` float32, what filters of equal votes are compared by.
    """

    votes: jax.Array
    weight: jax.Array
    num_voters: jax.Array
    live: jax.Array
    worth: jax.Array


ConsensusFn = Callable[[Ballot, Quota], jax.Array]  # -> [F] bool


def decide(rule: ConsensusFn, ballot: Ballot, quota: Quota) -> jax.Array:
    """Apply a rule: ``[F]`` bool, never more than before, and at least one filter.

    Where a rule would leave none, the live filter with most votes stays, of several the one worth
    most. (The public code has no such guard.)
    """
    kept = rule(ballot, quota) & ballot.live
    return jnp.where(jnp.any(kept), kept, _best(ballot, jnp.int32(1)))


def ascending(ballot: Ballot, quota: Quota) -> jax.Array:
    """Take the smallest of the thresholds ``1/N, ..., 1`` that prunes enough; 1 if none does.

    So the mask overshoots the wanted fraction as little as the votes allow.
    """
    ordered = jnp.sort(ballot.votes)
    below = ordered[jnp.maximum(quota.least - 1, 0)]  # the filter that has to go beside all lower
    with jax.enable_x64(True):
        share = _wide(below) * _wide(ballot.num_voters) / _wide(ballot.weight)
        step = jnp.where(quota.least > 0, jnp.floor(share) + 1.0, 1.0)
        return _at_least(ballot, jnp.clip(step, 1.0, _wide(ballot.num_voters)))


def code_dynamic(ballot: Ballot, quota: Quota) -> jax.Array:
    """Go down from 1 until enough is pruned, as the public code does.

    Lower thresholds prune less, so there are two outcomes: any voter's veto prunes (threshold 1) if
    that is enough, else only what all voters prune goes (threshold ``1/N``).
    """
    vetoed = unanimous(ballot, quota)
    enough = jnp.sum(~vetoed, dtype=jnp.int32) >= quota.least
    with jax.enable_x64(True):
        return jnp.where(enough, vetoed, _at_least(ballot, jnp.float64(1.0)))


def top_k(ballot: Ballot, quota: Quota) -> jax.Array:
    """Keep the filters with most votes, exactly as many as wanted.

    Of equal votes the filter worth most stays, then the one of lowest index.
    """
    return _best(ballot, jnp.int32(ballot.votes.shape[0]) - quota.nearest)


def majority(ballot: Ballot, quota: Quota) -> jax.Array:
    """Keep what more than half of the votes keep, whatever fraction is wanted."""
    del quota  # the votes decide how many
    with jax.enable_x64(True):
        return 2.0 * _wide(ballot.votes) > _wide(ballot.weight)


def unanimous(ballot: Ballot, quota: Quota) -> jax.Array:
    """Keep what everybody keeps: any veto prunes."""
    del quota  # the votes decide how many
    with jax.enable_x64(True):
        return _wide(ballot.votes) >= _wide(ballot.weight)


def anybody(ballot: Ballot, quota: Quota) -> jax.Array:
    """Keep what anybody keeps: only what all prune goes."""
    del quota  # the votes decide how many
    return ballot.votes > 0


def histogram(ballot: Ballot, quota: Quota) -> jax.Array:
    """Take the percentile of the layer's scores at the wanted fraction as threshold.

    Where many filters tie at the percentile, all of them stay. The public code takes the percentile
    of single votes instead, which are 0 or 1: there everything is kept, or only the unanimous.
    """
    return ballot.votes >= jnp.sort(ballot.votes)[quota.rank]


def _at_least(ballot: Ballot, step: jax.Array) -> jax.Array:
    """Keep what scores ``step / N`` or more; within `enable_x64`."""
    return _wide(ballot.votes) * _wide(ballot.num_voters) >= step * _wide(ballot.weight)


def _wide(number: jax.Array) -> jax.Array:
    """Hold whole numbers exactly; within `enable_x64`."""
    return jax.lax.convert_element_type(number, jnp.float64)


def _best(ballot: Ballot, count: jax.Array) -> jax.Array:
    """Keep the `count` best live filters, by votes, then worth, then index."""
    return filters.largest((ballot.votes, ballot.worth), ballot.live, count)


def _rule(function: ConsensusFn) -> Callable[..., ConsensusFn]:
    return lambda settings: function


PARTS = {
    "ascending": Part(build=_rule(ascending), summary="lowest threshold that prunes enough"),
    "top_k": Part(build=_rule(top_k), summary="filters with most votes, as many as wanted"),
    "majority": Part(build=_rule(majority), summary="filters that more than half would keep"),
    "unanimous": Part(build=_rule(unanimous), summary="filters that everybody would keep"),
    "anybody": Part(build=_rule(anybody), summary="filters that anybody would keep"),
    "histogram": Part(build=_rule(histogram), summary="filters from a percentile of the scores up"),
    "code_dynamic": Part(
        build=_rule(code_dynamic), summary="threshold from 1 down, as MPFL's public code has it"
    ),
}
