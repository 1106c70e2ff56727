"""Whole filters as what is pruned: one bit each, and the masks that follow from the bits.

A filter goes with its bias and normalization, so that it says exactly zero and can be removed. The
bits are what methods vote on and what travels; masks are made of them when they are needed.
"""

import fractions
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.structure.channels import groups
from fedjaxprune.types import Masks, Params, PrunableFn

Keep = tuple[jax.Array, ...]  # one [F] bool a layer, True means kept
Drops = Literal["filters", "channels"]
TargetFn = Callable[[jax.Array, Keep], Sequence[jax.Array]]  # (step [], keep) -> [] each


class Quota(NamedTuple):
    """How many of a layer's ``F`` filters a fraction comes to.

    Attributes:
      nearest: ``[]`` int32, filters to prune: the product rounded, half to even; at most ``F - 1``.
      least: ``[]`` int32, the product rounded up: the fewest that reach the fraction.
      rank: ``[]`` int32, ``ceil(fraction * (F - 1))``: the place of the fraction's percentile
        among the layer's scores in ascending order.
    """

    nearest: jax.Array
    least: jax.Array
    rank: jax.Array


def convolutions(path: str, leaf: jax.Array) -> bool:
    """Call prunable the kernels of convolutions: `masks.kernels` of three and more axes."""
    return masks_lib.is_kernel(path, leaf) and len(leaf.shape) > 2


def layers(
    channels: groups.Analysis, params: Params, *, prunable: PrunableFn = convolutions
) -> tuple[groups.Group, ...]:
    """List the filters that may be pruned, layer by layer.

    Filters that are the network's own output, or are otherwise not its to lose, stay out.

    Args:
      channels: of the network (`groups.analyze`).
      params: arrays or shapes.
      prunable: of which leaves.

    Raises:
      ValueError: if there are none.
    """
    shapes = dict(trees.items(params))
    fixed = {(path, axis) for path, axis, _ in channels.fixed}
    found = []
    for group in channels.filters:
        maker = _maker(group)
        if (maker.path, maker.axis) not in fixed and prunable(maker.path, shapes[maker.path]):
            found.append(group)
    if not found:
        raise ValueError(
            "there are no filters to prune: the network has no convolution (or none that "
            "`prunable` accepts) whose channels it is free to lose."
        )
    return tuple(found)


def full(filters: Sequence[groups.Group]) -> Keep:
    """Keep all filters."""
    return tuple(jnp.ones(group.size, jnp.bool_) for group in filters)


def num_kept(keep: Keep) -> jax.Array:
    """Count the live filters of every layer: ``[layers]`` int32."""
    return jnp.stack([jnp.sum(bits, dtype=jnp.int32) for bits in keep])


def norms(
    params: Params, filters: Sequence[groups.Group], *, order: int = 2
) -> tuple[jax.Array, ...]:
    """Measure every filter by a norm of its kernel: one ``[F]`` float32 a layer.

    Args:
      params: the parameters.
      filters: layer by layer.
      order: 2 for the Euclidean norm, 1 for the sum of magnitudes.
    """
    return tuple(groups.norms(params, group, order=order) for group in filters)


def peaks(params: Params, filters: Sequence[groups.Group]) -> tuple[jax.Array, ...]:
    """Measure every filter by its largest magnitude: one ``[F]`` float32 a layer."""
    leaves = dict(trees.items(params))

    def layer(group):
        maker = _maker(group)
        lines = jnp.moveaxis(jnp.abs(leaves[maker.path]), maker.axis, 0)
        peak = jnp.max(lines.reshape(lines.shape[0], -1), axis=1).astype(jnp.float32)
        return jnp.max(peak[maker.indices], axis=1)

    return tuple(map(layer, filters))


def largest(scores: Sequence[jax.Array], live: jax.Array, num_kept: jax.Array) -> jax.Array:
    """Keep the `num_kept` ``[]`` best of the live filters: ``[F]`` bool.

    Every filter is compared with every other, which for a layer's few hundred is cheaper than to
    sort.

    Args:
      scores: ``[F]`` each: the first decides, the next among equals, at last the lower index.
      live: ``[F]`` bool.
      num_kept: may be traced.
    """
    index = jnp.arange(live.shape[0], dtype=jnp.int32)
    better = index[None, :] < index[:, None]  # [F, F]: is the other one before this one?
    for score in reversed(scores):
        mine, other = score[:, None], score[None, :]
        better = (other > mine) | ((other == mine) & better)
    rank = jnp.sum(better & live[None, :], axis=1, dtype=jnp.int32)
    return live & (rank < num_kept)


def exact(number: float) -> fractions.Fraction:
    """Take a number for the decimals that it is written with."""
    return fractions.Fraction(repr(float(number)))


def even_steps(sparsity: float, num_steps: int) -> list[fractions.Fraction]:
    """List the pruned fractions that lead from 0 to `sparsity`: ``j / num_steps`` of it."""
    return [exact(sparsity) * j / num_steps for j in range(num_steps + 1)]


def quotas(fraction_steps: Sequence[fractions.Fraction], size: int) -> Quota:
    """Work out, exactly, what each of some fractions in [0, 1) comes to in a layer of `size`.

    Returns:
      A `Quota` with an axis of steps before all others, to be indexed by a traced step.
    """
    rows = [
        (min(round(f * size), size - 1), -(-f * size // 1), -(-f * (size - 1) // 1))
        for f in fraction_steps
    ]
    columns = [jnp.asarray(np.array(column, np.int32)) for column in zip(*rows, strict=True)]
    return Quota(*columns)


def remaining(factor: fractions.Fraction, size: int) -> jax.Array:
    """Tell what is left of `k` filters when `factor` of them is pruned, for all ``k <= size``.

    Returns:
      ``[size + 1]`` int32, ``k - round(factor * k)``, half to even, and 1 at least of any.
    """
    left = [max(k - round(factor * k), min(k, 1)) for k in range(size + 1)]
    return jnp.asarray(np.array(left, np.int32))


def targets(
    filters: Sequence[groups.Group],
    fraction_steps: Sequence[fractions.Fraction],
    *,
    of_remaining: float | None = None,
) -> TargetFn:
    """Say how many filters of every layer a ranking keeps in a step; never more than live.

    Args:
      filters: layer by layer.
      fraction_steps: fraction of each layer's filters that is pruned after each step.
      of_remaining: if given, every step but the first prunes this fraction of the remaining filters
        instead, in (0, 1).
    """
    if of_remaining is None:
        wanted = [quotas(fraction_steps, group.size) for group in filters]
        return lambda step, keep: [
            jnp.minimum(bits.shape[0] - quota.nearest[step], jnp.sum(bits, dtype=jnp.int32))
            for bits, quota in zip(keep, wanted, strict=True)
        ]
    tables = [remaining(exact(of_remaining), group.size) for group in filters]

    def relative(step, keep):
        counts = [jnp.sum(bits, dtype=jnp.int32) for bits in keep]
        return [
            jnp.where(step > 0, table[count], count)
            for table, count in zip(tables, counts, strict=True)
        ]

    return relative


def ranked(
    filters: Sequence[groups.Group],
    params: Params,
    keep: Keep,
    counts: Sequence[jax.Array],
    *,
    order: int = 2,
) -> Keep:
    """Keep, of every layer, so many of the live filters of largest norm (`norms`)."""
    found = norms(params, filters, order=order)
    return tuple(
        largest((norm,), bits, count) for norm, bits, count in zip(found, keep, counts, strict=True)
    )


def of_masks(filters: Sequence[groups.Group], masks: Masks) -> Keep:
    """Read the live filters off masks that clear whole filters alone."""
    ones = jax.tree.map(lambda mask: mask.astype(jnp.float32), masks)
    return tuple(norm > 0 for norm in norms(ones, filters))


def to_masks(
    channels: groups.Analysis,
    filters: Sequence[groups.Group],
    keep: Keep,
    params: Params,
    *,
    drops: Drops,
) -> Masks:
    """Expand one bit a filter to masks of the parameters; both forms compute the same outputs.

    Args:
      channels: of the network.
      filters: the layers that `keep` is about (`layers`).
      keep: one ``[F]`` bool a layer; may be traced.
      params: the parameters, or their shapes.
      drops: ``"filters"`` clears the filters with their bias and normalization; ``"channels"`` also
        what reads a channel all of whose filters are gone, unless the network makes something of
        its zeros (`groups.Group.leaks`).
    """
    own = groups.to_masks(filters, keep, params, drop_inputs=False)
    if drops == "filters":
        return own
    bits = {
        (_maker(group).path, _maker(group).axis): line
        for group, line in zip(filters, keep, strict=True)
    }
    whole = [group for group in channels.groups if not group.leaks]
    lines = []
    for group in whole:
        live = jnp.zeros(group.size, jnp.bool_)
        for member in group.members:
            if member.role == "filter":
                line = bits.get((member.path, member.axis))
                makes = True if line is None else jnp.any(line[member.indices], axis=1)
                live = live | makes
        lines.append(live)
    removed = groups.to_masks(whole, lines, params, drop_inputs=True)
    return jax.tree.map(jnp.logical_and, own, removed)


def _maker(group: groups.Group) -> groups.Member:
    """Find the leaf that makes a layer's channels."""
    return next(member for member in group.members if member.role == "filter")
