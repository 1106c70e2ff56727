"""Which entries of a leaf survive, once their number is known?"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjaxprune import topk

# (scores [...], num_kept [] int32) -> mask [...]; -inf marks what is not there to be chosen
SelectionFn = Callable[[jax.Array, jax.Array], jax.Array]

top_k = topk.top_k


def n_of_m(*, n: int, m: int, axis: int = -2) -> SelectionFn:
    """Keep the `n` best of every `m` consecutive entries along an axis.

    That is the pattern which sparse matrix units compute fast (2 of 4). The pattern fixes the
    number, so the number that was allocated is ignored. Ties keep the lower index.

    Args:
      n: entries kept of every group.
      m: entries in a group.
      axis: along which groups lie; -2, the default, holds the inputs of a dense or convolution
        kernel.

    Raises:
      ValueError: while tracing, if a leaf lacks the axis or its length is no multiple of `m`.
    """
    if not 1 <= n <= m:
        raise ValueError(f"n and m must satisfy 1 <= n <= m, got n={n} and m={m}.")

    def select(scores: jax.Array, num_kept: jax.Array) -> jax.Array:
        del num_kept  # n / m says it
        _check_axis("n_of_m", axis, scores)
        if scores.shape[axis] % m:
            raise ValueError(
                f"n_of_m groups axis {axis} by {m}, but a leaf of shape {scores.shape} has "
                f"{scores.shape[axis]} entries there, which is no multiple: exempt the leaf."
            )
        moved = jnp.moveaxis(topk.order_keys(scores), axis, -1)
        groups = moved.reshape((*moved.shape[:-1], moved.shape[-1] // m, m))
        mine, others = groups[..., :, None], groups[..., None, :]
        index = jnp.arange(m, dtype=jnp.int32)
        earlier = jnp.expand_dims(
            index[None, :] < index[:, None], tuple(range(groups.ndim - 1))
        )  # [..., m, m]
        better = (others > mine) | ((others == mine) & earlier)
        kept = jnp.sum(better, axis=-1, dtype=jnp.int32) < n
        return jnp.moveaxis(kept.reshape(moved.shape), -1, axis)

    return select


def channels(*, axis: int = -1) -> SelectionFn:
    """Keep whole channels: all entries at one index of an axis, or none.

    A channel is worth the sum of its entries' scores (its l1 norm if they are magnitudes; entries
    that are not there to be chosen add nothing). As many channels are kept as fit into the number
    that was allocated, but one at least if that number is not 0. Ties keep the lower index.

    Args:
      axis: the channels'; -1, the default, holds the outputs of a dense or convolution kernel.

    Raises:
      ValueError: while tracing, if a leaf lacks the axis.
    """

    def select(scores: jax.Array, num_kept: jax.Array) -> jax.Array:
        _check_axis("channels", axis, scores)
        num_channels = scores.shape[axis]
        if scores.size == 0:
            return jnp.zeros(scores.shape, jnp.bool_)
        rows = jnp.moveaxis(scores, axis, 0).reshape((num_channels, -1))
        absent = jnp.isneginf(rows)
        worth = jnp.sum(jnp.where(absent, jnp.zeros_like(rows), rows), axis=1)
        worth = jnp.where(jnp.all(absent, axis=1), -jnp.inf, worth)
        num_whole = jnp.maximum(num_kept // rows.shape[1], jnp.minimum(num_kept, 1))
        kept = top_k(worth, num_whole)
        lengths = [1] * scores.ndim
        lengths[axis] = num_channels
        return jnp.broadcast_to(kept.reshape(lengths), scores.shape)

    return select


def per_output(*, axis: int = -1, sparsity: float | None = None) -> SelectionFn:
    """Keep the best entries of each output, of all outputs as many.

    Ties keep the lower index.

    Args:
      axis: the outputs'; -1, the default, holds those of a dense or convolution kernel.
      sparsity: of `n` entries of an output ``floor(sparsity * n)`` are left out, and the number
        that was allocated is ignored. None shares that number out; of a rest the first outputs keep
        one more each.

    Raises:
      ValueError: if `sparsity` lies outside [0, 1); while tracing, if a leaf lacks the axis.

    References:
      Sun et al., `Wanda <https://arxiv.org/abs/2306.11695>`_, 2024.
    """
    if sparsity is not None and not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}.")

    def select(scores: jax.Array, num_kept: jax.Array) -> jax.Array:
        _check_axis("per_output", axis, scores)
        if scores.size == 0:
            return jnp.zeros(scores.shape, jnp.bool_)
        moved = jnp.moveaxis(scores, axis, 0)
        rows = topk.order_keys(moved).reshape(moved.shape[0], -1)
        if sparsity is None:
            index = jnp.arange(rows.shape[0], dtype=jnp.int32)
            has_one_more = index < num_kept % rows.shape[0]
            counts = num_kept // rows.shape[0] + has_one_more.astype(jnp.int32)
        else:
            size = rows.shape[1]
            num_pruned = math.floor(sparsity * size * (1.0 + 1e-12))  # 0.29 of 100 is 29
            counts = jnp.full(rows.shape[0], size - num_pruned, jnp.int32)
        best_first = jnp.argsort(~rows, axis=1, stable=True)
        rank = jnp.argsort(best_first, axis=1)
        kept = rank < counts[:, None]
        return jnp.moveaxis(kept.reshape(moved.shape), 0, axis)

    return select


def _check_axis(name: str, axis: int, scores: jax.Array) -> None:
    if not -scores.ndim <= axis < scores.ndim:
        raise ValueError(
            f"{name} works along axis {axis}, which a leaf of shape {scores.shape} lacks: "
            "exempt the leaf."
        )
