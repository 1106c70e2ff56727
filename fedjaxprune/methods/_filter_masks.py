"""Filters chosen before training, step by step, by norms and with rewinding: MPFL and its controls.

What is in force is one bit a filter, and all weights stay as they were at the start, but for those
that are pruned. The stages are in `filter_stages`.
"""

import fractions
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.federated import server_optimizers
from fedjaxprune.pruning.structured import filters
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.structure.channels import groups
from fedjaxprune.types import Model, Params, PrunableFn, RoundState

STOP = 0.9  # of MPFL's code: no further exchange once more than this is pruned

TargetFn = Callable[[jax.Array, filters.Keep], Sequence[jax.Array]]  # (step [], keep) -> [] each


class FilterState(NamedTuple):
    """What the stages hand on beside weights and masks.

    Attributes:
      keep: one ``[F]`` bool a layer, the filters in force.
      agreement: ``[iterations + 1, layers]`` float32, of each exchange the share of a layer's
        filters on which two voters agree, in the mean over all pairs; 0 where nobody voted.
      removed_kept: ``[L]`` int32, entries that are left of each leaf if what reads a pruned channel
        is removed with it.
    """

    keep: filters.Keep
    agreement: jax.Array
    removed_kept: jax.Array


class Plan(NamedTuple):
    """What is pruned, and how far, in Python values.

    Attributes:
      channels: of the network.
      layers: the filters, layer by layer.
      paths: of the leaves that make them.
      filter_sizes: weights of one filter of each layer.
      drops: what training leaves out (`filters.to_masks`).
      iterations: exchanges that prune; one that does not comes before them.
      stop: share of the layers' weights; no exchange follows once more is pruned.
    """

    channels: groups.Analysis
    layers: tuple[groups.Group, ...]
    paths: tuple[str, ...]
    filter_sizes: tuple[int, ...]
    drops: filters.Drops
    iterations: int
    stop: fractions.Fraction


def plan(
    model: Model,
    *,
    channels: groups.Analysis,
    sparsity: float,
    iterations: int,
    stop: float | None,
    drops: filters.Drops,
    prunable: PrunableFn,
) -> Plan:
    """Check what a method by filter is asked for, and find the filters.

    Raises:
      ValueError: if an option is out of range, or the network has no filters.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}.")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}.")
    if drops not in ("filters", "channels"):
        raise ValueError(f"drops must be 'filters' or 'channels', got {drops!r}.")
    if stop is not None and not 0.0 <= stop <= 1.0:
        raise ValueError(f"stop must lie in [0, 1], got {stop}.")
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    layers = filters.layers(channels, params, prunable=prunable)
    sizes = dict(zip(trees.paths(params), trees.sizes(params), strict=True))
    paths = tuple(
        next(member.path for member in group.members if member.role == "filter") for group in layers
    )
    return Plan(
        channels=channels,
        layers=layers,
        paths=paths,
        filter_sizes=tuple(
            sizes[path] // group.size for path, group in zip(paths, layers, strict=True)
        ),
        drops=drops,
        iterations=iterations,
        stop=_exact(max(STOP, sparsity) if stop is None else stop),
    )


def steps(sparsity: float, iterations: int) -> list[fractions.Fraction]:
    """List the pruned fraction that is wanted after each exchange: ``j / iterations`` of it."""
    return [_exact(sparsity) * j / iterations for j in range(iterations + 1)]


def targets(the: Plan, sparsity: float, factor: float | None) -> TargetFn:
    """Say how many filters a ranking keeps.

    Args:
      the: what is pruned.
      sparsity: fraction of each layer's filters that the last exchange is to reach; the others lie
        evenly between.
      factor: if given, each exchange but the first takes this fraction of the filters that are
        left instead.

    Raises:
      ValueError: if `factor` is out of range.
    """
    if factor is None:
        wanted = [
            filters.quotas(steps(sparsity, the.iterations), group.size) for group in the.layers
        ]
        return lambda step, keep: [
            jnp.minimum(bits.shape[0] - quota.nearest[step], jnp.sum(bits, dtype=jnp.int32))
            for bits, quota in zip(keep, wanted, strict=True)
        ]
    if not 0.0 < factor < 1.0:
        raise ValueError(f"factor must lie in (0, 1), got {factor}.")
    tables = [filters.remaining(_exact(factor), group.size) for group in the.layers]

    def relative(step, keep):
        counts = [jnp.sum(bits, dtype=jnp.int32) for bits in keep]
        return [
            jnp.where(step > 0, table[count], count)
            for table, count in zip(tables, counts, strict=True)
        ]

    return relative


def ranked(
    the: Plan, params: Params, keep: filters.Keep, counts: Sequence[jax.Array]
) -> filters.Keep:
    """Keep, of every layer, so many of the live filters of largest norm."""
    norms = filters.norms(params, the.layers)
    return tuple(
        filters.largest((norm,), bits, count)
        for norm, bits, count in zip(norms, keep, counts, strict=True)
    )


def is_over(the: Plan, keep: filters.Keep) -> jax.Array:
    """Tell whether more is pruned than the share after which exchanges stop: ``[]`` bool."""
    total = sum(g.size * size for g, size in zip(the.layers, the.filter_sizes, strict=True))
    pruned = [
        (group.size - jnp.sum(bits, dtype=jnp.int32)) * size
        for group, bits, size in zip(the.layers, keep, the.filter_sizes, strict=True)
    ]
    return trees.tree_sum(pruned, dtype=jnp.int32) > int(the.stop * total)


def settle(
    the: Plan, setup: Protocol, state: RoundState, keep: filters.Keep, *, step: jax.Array
) -> RoundState:
    """Put new filters in force: masks, exact zeros in the weights, and a server without memory.

    Weights that stay are those of the start, since no stage before training moves them; so what
    comes next is rewound, and the server forgets the momentum that led to the start. What reads
    removed channels is cleared at the last exchange only, since it counts in the norms that filters
    are ranked by.
    """
    server = server_optimizers.fedavg() if setup.server is None else setup.server
    masks, removed = (
        filters.to_masks(the.channels, the.layers, keep, state.params, drops=drops)
        for drops in ("filters", "channels")
    )
    counts = masks_lib.num_kept(removed)
    if the.drops == "channels":
        masks = trees.tree_where((step == the.iterations) | is_over(the, keep), removed, masks)
    return state._replace(
        params=masks_lib.apply(masks, state.params),
        masks=masks,
        server=server_optimizers.init(server, state.params),
        method=state.method._replace(keep=keep, removed_kept=counts),
    )


def _exact(number: float) -> fractions.Fraction:
    """Take a number for the decimals that it is written with."""
    return fractions.Fraction(repr(float(number)))
