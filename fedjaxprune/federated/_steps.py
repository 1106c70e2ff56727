"""What clients that train or look at their examples share."""

from typing import Any

import jax
import jax.numpy as jnp

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


def _difference(after: jax.Array, before: jax.Array) -> jax.Array:
    """Subtract in float32; integers and booleans as signed integers, whatever they are."""
    if not jnp.issubdtype(before.dtype, jnp.inexact):
        wide = jnp.int64 if before.dtype.itemsize == 8 else jnp.int32
        after, before = after.astype(wide), before.astype(wide)
    return (after - before).astype(jnp.float32)
