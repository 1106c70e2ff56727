"""Masks drawn from posteriors: how often was each weight found among the good ones?

Every prunable weight is an arm of a bandit with a Beta posterior. Rounds bring outcomes in [0, 1];
now and then the masks are chosen anew by a draw from the posteriors (combinatorial Thompson
sampling), so that history counts and the choice is as random as little is known.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import topk
from fedjaxprune.pruning import schedules
from fedjaxprune.types import Key, Masks, Params, Pruner, Schedule

# (masks, round []) -> the tree with a number of weights, [] int32, per leaf
CountFn = Callable[[Masks, jax.Array], Any]
Decision = Literal["sample", "mean"]
VOTES, PLACES = "votes", "places"  # in the statistics that the pruner sees


class Posterior(NamedTuple):
    """A Beta distribution for each weight: how likely does it belong to the good ones?

    Attributes:
      alpha: tree of ``[...]`` float32, 1 plus the weighted outcomes so far.
      beta: tree of ``[...]`` float32, 1 plus what these outcomes lack of the most possible.
    """

    alpha: Any
    beta: Any


def prior(params: Params) -> Posterior:
    """Know nothing: Beta(1, 1), which is uniform, for every weight."""
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.float32), params)
    return Posterior(alpha=ones, beta=ones)


def reconsidered(fraction: Schedule) -> CountFn:
    """Count the weights that may change places: ``floor(fraction * live)`` of each leaf.

    They are at most the pruned weights of the leaf, so that there are none where all are live. The
    product is computed in float64; one within a part in 10¹² below an integer counts as it.

    Args:
      fraction: of a leaf's live weights, by round.
    """

    def counts(masks, round_index):
        share = schedules.evaluate(fraction, round_index)

        def count(mask):
            num_live = jnp.sum(mask, dtype=jnp.int32)
            with jax.enable_x64(True):
                number = jnp.floor(share * num_live.astype(jnp.float64) * (1.0 + 1e-12))
                number = number.astype(jnp.int32)
            return jnp.minimum(number, mask.size - num_live)

        return jax.tree.map(count, masks)

    return counts


def core(params: Params, masks: Masks, num_reconsidered: Any) -> Params:
    """Mark the core of each leaf: its live weights but for the smallest `num_reconsidered`.

    Args:
      params: whose magnitudes are compared, tree of ``[...]``.
      masks: of the live weights.
      num_reconsidered: tree of ``[]`` int32.

    Returns:
      A tree of ``[...]`` float32, 1 in the core and 0 elsewhere. Of equal magnitudes the lower
      index comes first.
    """

    def leaf(value, mask, number):
        sizes = jnp.where(mask, jnp.abs(value.astype(jnp.float32)), -jnp.inf)
        num_core = jnp.sum(mask, dtype=jnp.int32) - number
        return (mask & topk.top_k(sizes, num_core)).astype(jnp.float32)

    return jax.tree.map(leaf, params, masks, num_reconsidered)


def outcome(
    mask: jax.Array, mean_core: jax.Array, votes: jax.Array, places: jax.Array, *, share: float
) -> jax.Array:
    """Mix what the averaged model and the clients say of the weights of a leaf.

    Of pruned weights the averaged model says 1/2.

    Args:
      mask: ``[...]`` bool.
      mean_core: ``[...]`` float32, whether a live weight is in the core of the averaged model.
      votes: ``[...]`` float32, share of the clients in whose core a live weight is.
      places: ``[...]`` float32, share of the clients that name a pruned weight.
      share: of the averaged model in the outcome.

    Returns:
      ``[...]`` float32 in [0, 1].
    """
    of_live = share * mean_core + (1.0 - share) * votes
    of_pruned = 0.5 * share + (1.0 - share) * places
    return jnp.clip(jnp.where(mask, of_live, of_pruned), 0.0, 1.0)


def observe(posterior: Posterior, outcomes: Any, seen: Masks, *, weight: float) -> Posterior:
    """Add outcomes, each `weight` times, where they were `seen`; other weights keep theirs."""

    def add(sums, values):
        return jax.tree.map(
            lambda total, value, mark: total + jnp.where(mark, weight * value, 0.0),
            sums,
            values,
            seen,
        )

    lacking = jax.tree.map(lambda value: 1.0 - value, outcomes)
    return Posterior(add(posterior.alpha, outcomes), add(posterior.beta, lacking))


def draw(key: Key, posterior: Posterior) -> Params:
    """Draw a score of each weight from its posterior, in log odds: ``[...]`` float32.

    ``G / (G + H)`` of two independent Gamma variates has the Beta distribution, and ``log G - log
    H`` ranks alike. It does not round to a tie where the probability is close to 0 or 1.
    """
    alphas, structure = jax.tree.flatten(posterior.alpha)
    betas, keys = jax.tree.leaves(posterior.beta), jax.random.split(key, max(len(alphas), 1))

    def log_odds(leaf_key, alpha, beta):
        first, second = jax.random.split(leaf_key)
        return log_gamma(first, alpha) - log_gamma(second, beta)

    return jax.tree.unflatten(structure, list(map(log_odds, keys, alphas, betas)))


class _Draws(NamedTuple):
    """Gamma variates in the making."""

    attempt: jax.Array  # [] int32
    values: jax.Array  # [...] float32, logarithms
    missing: jax.Array  # [...] bool, entries that have been rejected so far


def log_gamma(key: Key, shape: jax.Array) -> jax.Array:
    """Draw logarithms of Gamma variates of many shapes at once.

    All entries are drawn again until none is rejected, half a dozen times for millions of them;
    each keeps its first value that is not. `jax.random.loggamma` draws one entry after the other
    on a CPU.

    Args:
      key: of the draws.
      shape: ``[...]`` float32, shape parameters of at least 1.

    References:
      Marsaglia and Tsang, `A simple method for generating gamma variables
      <https://doi.org/10.1145/358407.358414>`_, 2000.
    """
    middle = shape - 1.0 / 3.0
    scale = 1.0 / jnp.sqrt(9.0 * middle)

    def attempt(draws):
        normal_key, uniform_key = jax.random.split(jax.random.fold_in(key, draws.attempt))
        normal = jax.random.normal(normal_key, shape.shape, jnp.float32)
        exponential = jax.random.exponential(uniform_key, shape.shape, jnp.float32)
        root = 1.0 + scale * normal
        log_cube = 3.0 * jnp.log(jnp.where(root > 0.0, root, 1.0))
        bound = 0.5 * normal * normal + middle * (1.0 - root * root * root + log_cube)
        is_good = (root > 0.0) & (-exponential < bound)
        return _Draws(
            attempt=draws.attempt + 1,
            values=jnp.where(draws.missing & is_good, jnp.log(middle) + log_cube, draws.values),
            missing=draws.missing & ~is_good,
        )

    start = _Draws(jnp.int32(0), jnp.zeros_like(shape), jnp.ones(shape.shape, jnp.bool_))
    return jax.lax.while_loop(lambda draws: jnp.any(draws.missing), attempt, start).values


def mean(key: Key, posterior: Posterior) -> Params:
    """Score each weight by the mean of its posterior: ``[...]`` float32."""
    del key  # deterministic
    return jax.tree.map(lambda alpha, beta: alpha / (alpha + beta), *posterior)


def thompson_sampling(
    num_reconsidered: CountFn,
    *,
    is_due: schedules.Predicate,
    until: int,
    weight: float,
    share: float,
    decision: Decision = "sample",
) -> Pruner:
    """Keep of every leaf the weights whose draws from their posteriors are largest.

    Each round brings outcomes of live weights: are they in the core of the averaged model, and of
    how many clients' models? The rounds that are due bring outcomes of pruned weights too: how many
    clients name them? Then the masks are chosen anew among all weights of a leaf, as many as are
    live. Nothing is forgotten when a weight is pruned or comes back.

    Args:
      num_reconsidered: ``(masks, round) -> counts``, live weights outside the core.
      is_due: in which rounds the masks are chosen anew.
      until: first round, counted from 0, whose outcomes are not looked at any more.
      weight: of one outcome, against the 1 + 1 of the prior.
      share: of the averaged model in an outcome; the rest is the clients'.
      decision: whether draws decide, or the posteriors' means.

    Returns:
      A `Pruner` with a `Posterior` as its state. It reads ``inputs.statistics["votes"]`` and
      ``["places"]``, weighted means over the clients.

    References:
      Huang et al., `FedRTS <https://arxiv.org/abs/2501.19122>`_, 2025.
    """
    score = {"sample": draw, "mean": mean}[decision]

    def update_fn(key, masks, state, inputs):
        due = is_due(inputs.round)

        def learn():
            mean_core = core(inputs.params, masks, num_reconsidered(masks, inputs.round))
            reports = inputs.statistics[VOTES], inputs.statistics[PLACES]
            outcomes = jax.tree.map(
                lambda *leaves: outcome(*leaves, share=share), masks, mean_core, *reports
            )
            seen = jax.tree.map(lambda mask: mask | due, masks)
            return observe(state, outcomes, seen, weight=weight)

        def choose(posterior):
            return jax.tree.map(
                lambda values, mask: topk.top_k(values, jnp.sum(mask, dtype=jnp.int32)),
                score(key, posterior),
                masks,
            )

        posterior = jax.lax.cond(inputs.round < until, learn, lambda: state)
        return jax.lax.cond(due, choose, lambda _: masks, posterior), posterior

    return Pruner(init=prior, update=update_fn)
