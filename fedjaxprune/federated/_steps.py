"""What clients that train or look at their examples share."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import metrics, trees
from fedjaxprune.federated import _optax
from fedjaxprune.types import Broadcast, Key, Metrics, Params, State

_WHAT = "the local optimizer"


def optimizer_init(optimizer, params) -> State:
    """Make the state of a local optimizer; see `_optax.init`."""
    return _optax.init(optimizer, params, what=_WHAT)


def optimizer_step(optimizer, grads, state, params, *, loss, factor=None) -> tuple[Params, State]:
    """Make the updates of one local step, times ``factor()`` if it is given."""
    updates, state = _optax.update(optimizer, grads, state, params, what=_WHAT, loss=loss)
    if factor is not None:
        with jax.numpy_dtype_promotion("standard"):
            scale = factor()
            updates = jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates)
    return updates, state


def zero_metrics(key: Key, loss: Any, broadcast: Broadcast, batch: Any) -> Metrics:
    """Make the accumulators that a loss reports, at zero; of the batch, shapes will do."""
    shapes = jax.eval_shape(loss, broadcast.params, broadcast.model_state, batch, key)[1][1]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def changes(params: Params, start: Params, model_state: State, before: State) -> dict[str, Any]:
    """Say how far training moved the parameters, and what is not trained."""
    return {
        "delta": jax.tree.map(jnp.subtract, params, start),
        "model_state": jax.tree.map(_difference, model_state, before),
    }


def followed(objective, rules, start, params, value, given) -> _optax.Loss:
    """Make the loss whose gradient a step follows, for an optimizer that asks for it.

    `rules` are the correction, which is the gradient of its product with how far the parameters
    have moved, the masks of what the loss sees, and a term of all parameters, or None.
    """
    correction, masks, own = rules

    def linear(params):
        if not jax.tree.leaves(correction):
            return jnp.float32(0.0)
        moved = jax.tree.map(
            lambda c, to, from_: jnp.sum(c * (to - from_)), correction, params, start
        )
        return trees.tree_sum(moved, dtype=jnp.float32)

    def added(value, params):
        value = value + linear(params)
        return value if own is None else value + own(params)

    def value_fn(params):
        return added(objective(masks_lib.apply(masks, params), *given)[0], params)

    return _optax.Loss(added(value, params), value_fn)


def report(progress: Any, grads: Params, due: jax.Array, size: jax.Array) -> Any:
    """Add a gradient to the sums that are reported, where it is due."""
    seen = metrics.Mean(total=jnp.where(due, size, jnp.zeros_like(size)), weight=size)
    return progress._replace(
        grads=jax.lax.cond(
            due,
            lambda sums, new: jax.tree.map(jnp.add, sums, new),
            lambda sums, new: sums,
            progress.grads,
            grads,
        ),
        num_reported=progress.num_reported + due.astype(jnp.int32),
        dense=metrics.merge(progress.dense, seen),
    )


def divide(sums: Params, count: jax.Array) -> Params:
    """Make a mean of sums, zero where nothing was counted."""
    count = jnp.maximum(count, 1).astype(jnp.float32)
    return jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), sums)


def _difference(after: jax.Array, before: jax.Array) -> jax.Array:
    """Subtract in float32; integers and booleans as signed integers, whatever they are."""
    if not jnp.issubdtype(before.dtype, jnp.inexact):
        wide = jnp.int64 if before.dtype.itemsize == 8 else jnp.int32
        after, before = after.astype(wide), before.astype(wide)
    return (after - before).astype(jnp.float32)
