"""What clients that train or look at their examples share."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune.types import Broadcast, Key, Metrics, Params, State


def optimizer_step(optimizer, grads, state, params, *, factor=None) -> tuple[Params, State]:
    """Make the updates of one local step, times ``factor()`` if it is given."""
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes dtypes
        updates, state = optimizer.update(grads, state, params)
        if factor is not None:
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
        "model_state": jax.tree.map(
            lambda after, before: (after - before).astype(jnp.float32), model_state, before
        ),
    }
