"""From single weights to whole channels: what has lost most of its inputs goes altogether."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune.pruning import pruners
from fedjaxprune.pruning.structured import filters
from fedjaxprune.structure.channels import groups as groups_lib
from fedjaxprune.topk import top_k
from fedjaxprune.types import Masks, PrunableFn, Pruner


def prune_channels(
    pruner: Pruner,
    groups: Sequence[groups_lib.Group],
    *,
    threshold: float,
    prunable: PrunableFn,
    most: float = 0.5,
) -> Pruner:
    """Prune the channels of which `pruner` leaves fewer than `threshold` of the incoming weights.

    With a channel go its filters, bias and normalization, and the weights that read it.

    Args:
      pruner: of single weights; sees the `prunable` leaves alone.
      groups: the channels that may go (`channels.groups.analyze`; the network's outputs are in none
        of them).
      threshold: kept share of the weights that enter a channel, in [0, 1].
      prunable: which leaves `pruner` may prune.
      most: share of a group's channels that may go, rounded down; if more are below the threshold,
        the emptiest go, of equals the later ones.

    Returns:
      A `Pruner` for masks of all leaves that are prunable or stand in the groups (see `reaches`).

    Raises:
      ValueError: if a number is out of range.
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}.")
    if not 0.0 <= most < 1.0:
        raise ValueError(f"most must lie in [0, 1), got {most}.")
    inner = pruners.exempt(pruner, prunable)

    def update_fn(key, masks, state, inputs):
        # Biases and normalization follow their channel, which may return.
        masks, state = inner.update(key, masks_lib.restrict(masks, prunable), state, inputs)
        return thinned(masks, groups, threshold=threshold, most=most), state

    return Pruner(init=inner.init, update=update_fn)


def prune_small(
    layers: Sequence[groups_lib.Group], channels: groups_lib.Analysis, *, threshold: float
) -> Pruner:
    """Prune the filters whose weights have all come to `threshold` or less in magnitude, for good.

    With a filter go its bias and normalization, and what reads a channel all of whose filters are
    gone. Of a layer that would lose all of its filters, the one of largest magnitude stays.

    Args:
      layers: the filters that may go, layer by layer (`filters.layers`).
      channels: of the network.
      threshold: 0 prunes filters of exact zeros alone.

    Returns:
      A `Pruner` for masks of all leaves that are prunable or stand in the channels (`reaches`).

    Raises:
      ValueError: if the threshold is negative.
    """
    if not threshold >= 0.0:
        raise ValueError(f"threshold must be at least 0, got {threshold}.")

    def update_fn(key, masks, state, inputs):
        del key  # deterministic

        def layer(bits, peak):
            stays = bits & (peak > threshold)
            best = filters.largest((peak,), bits, jnp.int32(1))
            return jnp.where(jnp.any(stays), stays, best)

        live = filters.of_masks(layers, masks)
        keep = tuple(map(layer, live, filters.peaks(inputs.params, layers)))
        cleared = filters.to_masks(channels, layers, keep, masks, drops="channels")
        return jax.tree.map(jnp.logical_and, masks, cleared), state

    return Pruner(init=lambda params: (), update=update_fn)


def thinned(
    masks: Masks, groups: Sequence[groups_lib.Group], *, threshold: float, most: float
) -> Masks:
    """Prune channels whose filters keep less than `threshold`; arguments as in `prune_channels`.

    Weights are compared as whole numbers: a channel that keeps just its share stays, which a
    quotient rounded by the compiler would not say. A product within a part in 10¹² above an integer
    counts as it.
    """
    counts = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), masks)
    ones = jax.tree.map(jnp.ones_like, counts)
    keep = []
    for group in groups:
        num_live = groups_lib.norms(counts, group, order=1).astype(jnp.int32)
        num_all = groups_lib.norms(ones, group, order=1)  # alike for all channels of a group
        with jax.enable_x64(True):
            least = jnp.ceil(threshold * num_all.astype(jnp.float64) * (1.0 - 1e-12))
            is_thin = num_live < least.astype(jnp.int32)
        num_thin = jnp.sum(is_thin, dtype=jnp.int32)
        num_gone = jnp.minimum(num_thin, jnp.int32(int(most * group.size)))
        keep.append(top_k(num_live, group.size - num_gone))
    whole = groups_lib.to_masks(groups, keep, masks, drop_inputs=True)
    return jax.tree.map(jnp.logical_and, masks, whole)


def reaches(groups: Sequence[groups_lib.Group], prunable: PrunableFn) -> PrunableFn:
    """Call prunable what is so already, and all leaves in which a channel of `groups` stands."""
    paths = {member.path for group in groups for member in group.members}
    return lambda path, leaf: path in paths or prunable(path, leaf)
