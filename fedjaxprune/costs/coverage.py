"""How far clients' masks agree, from their votes alone."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.types import PrunableFn


def agreement(votes: Any, num_clients: jax.Array, prunable: PrunableFn) -> jax.Array:
    """Measure how often two clients agree on a weight: ``[]`` float32, 1 for a single client.

    The mean over all pairs of clients and all prunable weights of "both keep it or neither does",
    exactly, from the votes alone: no pair of masks is compared.

    Args:
      votes: tree of ``[...]`` int32, clients that keep each weight (``aggregators.vote_counts``).
      num_clients: ``[]`` int32, clients that voted.
      prunable: which leaves count.
    """
    n = num_clients.astype(jnp.float32)
    pairs = jnp.maximum(n * (n - 1), jnp.float32(1.0))

    def agreeing(votes):
        kept = votes.astype(jnp.float32)
        left = n - kept
        return jnp.sum((kept * (kept - 1) + left * (left - 1)) / pairs)

    flags = masks_lib.prunable_leaves(votes, prunable)
    leaves = [x for x, flag in zip(jax.tree.leaves(votes), flags, strict=True) if flag]
    size = max(1, sum(leaf.size for leaf in leaves))
    mean = trees.tree_sum([agreeing(leaf) for leaf in leaves], dtype=jnp.float32) / size
    return jnp.where((num_clients > 1) & (len(leaves) > 0), mean, jnp.float32(1.0))
