"""What FedTiny's selection sends and computes, and the formula that its authors charge by."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.costs import ledger, storage_models
from fedjaxprune.rounds import reporting
from fedjaxprune.traffic import EVALUATED, FieldLength, PublishedBits
from fedjaxprune.types import PrunableFn, RoundMetrics, RoundState


def download(
    state: RoundState, masks_held: jax.Array, statistics: list[Any], *, prunable: PrunableFn
) -> reporting.Download:
    """Say what a client receives: statistics, and the candidates if it does not hold them.

    Each candidate is sent as values and masks of its own; leaves that are never pruned are the same
    in all candidates and are sent once. Statistics are leaves ``[0, ...]``; [] for none.
    """
    stale = masks_held != state.masks_id
    counts = state.method.counts
    num_candidates = counts.shape[0]
    flags = masks_lib.prunable_leaves(state.params, prunable)
    leaves = list(zip(jax.tree.leaves(state.params), flags, strict=True))
    values = trees.shape_only([[leaf for leaf, flag in leaves if flag]] * num_candidates)
    rest = trees.shape_only([leaf for leaf, flag in leaves if not flag])
    masks = jax.tree.map(lambda leaf: leaf.astype(jnp.bool_), values)
    kept = _by_leaf(state, prunable, lambda size: jnp.zeros_like(counts[:, 0]).at[0].set(size))
    messages = {
        "candidates": {
            "params": FieldLength(template=values, clients=stale, live_counts=counts.reshape(-1)),
            "masks": FieldLength(template=masks, clients=stale, sent_counts=counts.reshape(-1)),
            "unpruned": FieldLength(template=rest, clients=stale),
        }
    }
    if statistics:
        messages["broadcast"] = {"statistics": FieldLength(template=statistics)}
    return reporting.Download(
        messages=messages,
        num_downloaded=jnp.where(stale[:, None, None], kept[None], 0),
        num_masks=jnp.where(stale, num_candidates, 0),
    )


def choose(state: RoundState, masks_held: jax.Array) -> FieldLength:
    """Tell clients that hold all candidates which one was chosen, by its index.

    It is as wide as the number of candidates asks for. Once an exchange has changed the masks, they
    need these, like all others.
    """
    pool = state.method
    num_candidates = pool.counts.shape[0]
    dtype = np.min_scalar_type(num_candidates - 1)
    holds_all = (masks_held == pool.held_id) & (state.masks_id == pool.chosen_id)
    return FieldLength(template=trees.shape_only(jnp.zeros([], dtype)), clients=holds_all)


def evaluated(state: RoundState, *, prunable: PrunableFn) -> dict[str, jax.Array]:
    """Say which models a client evaluates: all candidates, by forward passes only."""
    like = state.method.counts[:, 0]
    return {EVALUATED: _by_leaf(state, prunable, lambda size: jnp.full_like(like, size))}


def _by_leaf(
    state: RoundState, prunable: PrunableFn, of_others: Callable[[int], jax.Array]
) -> jax.Array:
    """Count the candidates' live entries by leaf, `of_others` those of leaves never pruned."""
    layers = itertools.count()
    flags = masks_lib.prunable_leaves(state.params, prunable)
    kept = [
        state.method.counts[:, next(layers)] if flag else of_others(size)
        for size, flag in zip(trees.sizes(state.params), flags, strict=True)
    ]
    return jnp.stack(kept, axis=1)


def formula(metrics: RoundMetrics, state: RoundState) -> PublishedBits:
    """Charge what the authors' group charges for FedTiny: sparse models, and pairs going up.

    Models are stored by `storage_models.fedrts_f4`, each candidate of the selection too. A pair
    takes 32 bits for its value and ``ceil(log2 n)`` for its index in a leaf of `n` entries. The
    encoding contains the mask. Statistics and losses are not charged.

    References:
      Huang et al., `FedRTS <https://arxiv.org/abs/2501.19122>`_, 2025, appendix F.4.
    """
    stored = ledger.charge_storage(metrics, state, storage_models.fedrts_f4)
    counts, sizes = ledger.num_sent(metrics, "grads"), trees.sizes(state.params)
    pair_bits = sum(map(storage_models.pairs, counts, sizes))
    return stored._replace(uplink=stored.uplink + pair_bits)
