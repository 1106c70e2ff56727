"""Who trained what: how many clients each weight had, how steady masks are, and how alike.

Counts are exact integers ``[...]`` of the parameters' shapes; one addition per weight and round.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.types import Masks, Params, PrunableFn


class Coverage(NamedTuple):
    """How often each weight was trained.

    Attributes:
      counts: tree of ``[...]`` int32, clients that trained the weight, added up over rounds.
      num_clients: ``[]`` int32, clients that trained at all, added up over rounds.
    """

    counts: Any
    num_clients: jax.Array


class Report(NamedTuple):
    """A coverage in three numbers, over the prunable weights.

    Attributes:
      mean: ``[]`` float32, mean share of the clients (and rounds) that trained a weight.
      least: ``[]`` int32, of the weight that was trained least.
      never: ``[]`` float32, share of the weights that nobody trained.
    """

    mean: jax.Array
    least: jax.Array
    never: jax.Array


def zero(params: Params) -> Coverage:
    """Make the coverage of a run that has not begun."""
    return Coverage(
        counts=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.int32), params),
        num_clients=jnp.int32(0),
    )


def add(coverage: Coverage, masks: Masks, num_clients: jax.Array) -> Coverage:
    """Count a round in which `num_clients` ``[]`` int32 clients trained under the same masks."""
    counts = jax.tree.map(
        lambda count, mask: count + jnp.where(mask, num_clients, jnp.zeros_like(num_clients)),
        coverage.counts,
        masks,
    )
    return Coverage(counts=counts, num_clients=coverage.num_clients + num_clients)


def add_votes(coverage: Coverage, votes: Any, num_clients: jax.Array) -> Coverage:
    """Count a round under personal masks, from their votes ``[...]`` (``aggregators.votes``)."""
    return Coverage(
        counts=jax.tree.map(jnp.add, coverage.counts, votes),
        num_clients=coverage.num_clients + num_clients,
    )


def merge(first: Coverage, second: Coverage) -> Coverage:
    """Add two coverages; associative, commutative, with `zero` as its zero."""
    return jax.tree.map(jnp.add, first, second)


def report(coverage: Coverage, prunable: PrunableFn) -> Report:
    """Sum up the coverage of the prunable weights; of none it is a mean of 1 and nobody never."""
    leaves = _prunable(coverage.counts, prunable)
    size = sum(leaf.size for leaf in leaves)
    if size == 0:
        return Report(jnp.float32(1.0), coverage.num_clients, jnp.float32(0.0))
    rounds = jnp.maximum(coverage.num_clients, 1).astype(jnp.float32)
    shares = [jnp.sum(leaf.astype(jnp.float32) / rounds) for leaf in leaves]
    never = [jnp.sum(leaf == 0, dtype=jnp.int32) for leaf in leaves]
    return Report(
        mean=trees.tree_sum(shares, dtype=jnp.float32) / size,
        least=jnp.min(jnp.stack([jnp.min(leaf) for leaf in leaves])),
        never=trees.tree_sum(never, dtype=jnp.int32).astype(jnp.float32) / size,
    )


def tracked(advance: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Wrap a round so that it counts who trains what under the masks in force.

    Args:
      advance: ``(key, simulation, population) -> (simulation, metrics)``, as
        ``simulation.advance`` makes it.

    Returns:
      ``(key, (simulation, coverage), population) -> ((simulation, coverage), metrics)``; clients
      whose message was left out do not count.
    """

    def advance_fn(key, carried, population):
        simulation, coverage = carried
        masks = simulation.state.masks
        simulation, metrics = advance(key, simulation, population)
        coverage = add(coverage, masks, metrics.num_participating - metrics.num_rejected)
        return (simulation, coverage), metrics

    return advance_fn


def stability(before: Masks, after: Masks, prunable: PrunableFn) -> jax.Array:
    """Measure the share of the prunable weights whose bit stayed: ``[]`` float32."""
    same = jax.tree.map(lambda a, b: a == b, before, after)
    return jnp.float32(1.0) - masks_lib.sparsity(same, prunable)


def agreement(votes: Any, num_clients: jax.Array, prunable: PrunableFn) -> jax.Array:
    """Measure how often two clients agree on a weight: ``[]`` float32, 1 for a single client.

    The mean over all pairs of clients and all prunable weights of "both keep it or neither does",
    exactly, from the votes alone: no pair of masks is compared.

    Args:
      votes: tree of ``[...]`` int32, clients that keep each weight (``aggregators.votes``).
      num_clients: ``[]`` int32, clients that voted.
      prunable: which leaves count.
    """
    n = num_clients.astype(jnp.float32)
    pairs = jnp.maximum(n * (n - 1), jnp.float32(1.0))

    def agreeing(votes):
        kept = votes.astype(jnp.float32)
        left = n - kept
        return jnp.sum((kept * (kept - 1) + left * (left - 1)) / pairs)

    leaves = _prunable(votes, prunable)
    size = max(1, sum(leaf.size for leaf in leaves))
    mean = trees.tree_sum([agreeing(leaf) for leaf in leaves], dtype=jnp.float32) / size
    return jnp.where((num_clients > 1) & (len(leaves) > 0), mean, jnp.float32(1.0))


def shared(votes: Any, num_clients: jax.Array, prunable: PrunableFn) -> jax.Array:
    """Measure what share of a client's kept weights another one keeps too: ``[]`` float32.

    The mean over pairs of clients of what both keep, over the mean of what one keeps; at random it
    comes to the density, and `agreement` does not fall to zero. 1 for a single client.

    Args:
      votes: tree of ``[...]`` int32, clients that keep each weight.
      num_clients: ``[]`` int32, clients that voted.
      prunable: which leaves count.
    """
    others = jnp.maximum(num_clients - 1, 1).astype(jnp.float32)
    leaves = [leaf.astype(jnp.float32) for leaf in _prunable(votes, prunable)]
    both = trees.tree_sum([jnp.sum(v * (v - 1) / others) for v in leaves], dtype=jnp.float32)
    kept = trees.tree_sum([jnp.sum(v) for v in leaves], dtype=jnp.float32)
    share = both / jnp.where(kept > 0, kept, jnp.float32(1.0))
    return jnp.where((num_clients > 1) & (kept > 0), share, jnp.float32(1.0))


def _prunable(tree: Any, prunable: PrunableFn) -> list[jax.Array]:
    flags = masks_lib.prunable_leaves(tree, prunable)
    return [leaf for leaf, flag in zip(jax.tree.leaves(tree), flags, strict=True) if flag]
