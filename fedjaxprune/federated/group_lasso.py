"""Group lasso over the channels of kernels: a penalty, its coefficient, and the exact shrinkage.

A kernel is cut in two ways, into all that makes one output channel and into all that reads one
input channel. Each such *block* adds its Euclidean norm. So an entry counts in two blocks, or in
one where the other kind is left out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.federated.penalties import PenaltyFn
from fedjaxprune.structure.channels import groups
from fedjaxprune.types import Broadcast, Params, PrunableFn

EPSILON = 1e-8  # added to squares under the root, as published: the gradient of zeros is zero

Weights = Literal["equal", "sqrt_size"]


class Blocks(NamedTuple):
    """How one kernel is cut along one of its axes.

    Attributes:
      path: of the kernel in the parameters.
      axis: of the kernel.
      indices: ``[G, n]`` ints, the places of each of ``G`` channels along the axis.
      factor: what the norm of each block is multiplied by.
    """

    path: str
    axis: int
    indices: np.ndarray
    factor: float


def blocks(
    channels: groups.Analysis,
    params: Any,
    *,
    prunable: PrunableFn = masks_lib.is_kernel,
    weights: Weights = "equal",
) -> tuple[Blocks, ...]:
    """List the blocks of all kernels.

    What the network is not free to lose has none: the inputs of the first layer, and the outputs of
    the last. Neither have kernels that treat each channel by itself (depthwise).

    Args:
      channels: of the network (`groups.analyze`).
      params: arrays or shapes.
      prunable: which leaves are kernels.
      weights: ``"equal"`` takes norms as they are, ``"sqrt_size"`` times the square root of the
        number of entries in the block.

    Returns:
      The cuts, kernel by kernel in the tree's order, each kernel's outputs before its inputs.

    Raises:
      ValueError: if there are none.
    """
    leaves = dict(trees.items(params))
    found = []
    for role in ("filter", "input"):
        for group in channels.groups:
            for member in group.members:
                leaf = leaves[member.path]
                if member.role == role and prunable(member.path, leaf):
                    each = math.prod(leaf.shape) // leaf.shape[member.axis]
                    size = each * member.indices.shape[1]
                    factor = 1.0 if weights == "equal" else math.sqrt(size)
                    found.append(Blocks(member.path, member.axis, member.indices, factor))
    if not found:
        raise ValueError(
            "there are no channels to penalize: the network has no layer whose channels it is free "
            "to lose."
        )
    order = {path: place for place, path in enumerate(leaves)}
    return tuple(sorted(found, key=lambda cut: order[cut.path]))


def norms(params: Params, cut: Blocks) -> jax.Array:
    """Measure each block by its Euclidean norm: ``[G]`` float32."""
    return jnp.sqrt(_squares(dict(trees.items(params))[cut.path], cut))


def total(params: Params, cuts: Sequence[Blocks]) -> jax.Array:
    """Add up ``factor * sqrt(norm ** 2 + 1e-8)`` over all blocks: ``[]`` float32.

    References:
      Lym et al., `PruneTrain <https://arxiv.org/abs/1901.09290>`_, 2019, and its code.
    """
    leaves = dict(trees.items(params))
    sums = [
        cut.factor * jnp.sum(jnp.sqrt(_squares(leaves[cut.path], cut) + EPSILON)) for cut in cuts
    ]
    return trees.tree_sum(sums, dtype=jnp.float32)


def penalty(cuts: Sequence[Blocks], *, coefficient: Callable[[Broadcast], jax.Array]) -> PenaltyFn:
    """Add ``coefficient(broadcast)`` ``[]`` times `total` to the loss of every local step."""
    return lambda params, broadcast: coefficient(broadcast) * total(params, cuts)


def coefficient(loss: jax.Array, total: jax.Array, *, ratio: float) -> jax.Array:
    """Choose the coefficient of which the penalty is the share `ratio` of the objective: ``[]``.

    Args:
      loss: ``[]``, without the penalty.
      total: ``[]``, of `total`, at the same parameters.
      ratio: in [0, 1).

    Raises:
      ValueError: if the ratio is out of range.
    """
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"ratio must lie in [0, 1), got {ratio}.")
    return (ratio / (1.0 - ratio)) * loss / total


def shrink(params: Params, cuts: Sequence[Blocks], amount: jax.Array) -> Params:
    """Shorten each block by `amount` ``[]`` times its factor; a shorter one becomes exact zero.

    It is the proximal step of the penalty without its `EPSILON`, for one cut after another: outputs
    and inputs of a kernel overlap, so it is not that of their sum.
    """

    def leaf_fn(path: str, leaf: jax.Array) -> jax.Array:
        for cut in cuts:
            if cut.path != path:
                continue
            lengths, short = jnp.sqrt(_squares(leaf, cut)), cut.factor * amount
            stays = lengths > short
            left = 1.0 - short / jnp.where(stays, lengths, jnp.ones_like(lengths))
            left = jnp.where(stays, left, jnp.zeros_like(left)).astype(leaf.dtype)
            line = jnp.ones(leaf.shape[cut.axis], leaf.dtype)
            line = line.at[cut.indices.ravel()].set(jnp.repeat(left, cut.indices.shape[1]))
            shape = [1] * leaf.ndim
            shape[cut.axis] = -1
            line = line.reshape(shape)
            leaf = jnp.where(line > 0, leaf * line, jnp.zeros_like(leaf))
        return leaf

    return trees.map_with_path(leaf_fn, params)


def _squares(leaf: jax.Array, cut: Blocks) -> jax.Array:
    """Add up the squares of each block: ``[G]`` float32."""
    lines = jnp.moveaxis(leaf.astype(jnp.float32), cut.axis, 0).reshape(leaf.shape[cut.axis], -1)
    return jnp.sum(jnp.sum(jnp.square(lines), axis=1)[cut.indices], axis=1)
