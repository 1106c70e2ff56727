"""Compute in fewer bits than what is learnt is kept in."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune.types import Batch, Key, Model, Params, State


def compute_in(model: Model, dtype: Any) -> Model:
    """Run a model's training, forward and backward, in `dtype`; all that it keeps stays as it was.

    Parameters and inputs are cast on their way into the loss, and gradients come back in the
    parameters' own type: what the optimizer, error feedback, masks and aggregation work on is
    float32, and small updates are not lost. The loss, the metrics and the state that the model
    returns (BatchNorm's running statistics) have the types that they had. The state itself is not
    cast: layers take their statistics in float32 (`layers.BatchNorm` and flax's do so).
    Predictions are not touched: what is tested and shipped are the float32 parameters.

    It works on any `Model`. One whose loss is its own should widen the logits before it takes their
    logarithm, as `adapters` do. bfloat16 is fast where the hardware has it (TPUs, GPUs from Ampere
    on); elsewhere it is slower than float32.

    Args:
      model: whose parameters are float32.
      dtype: a floating type of at most 32 bits, such as ``jnp.bfloat16``.

    Raises:
      ValueError: `dtype` is something else.
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 4:
        raise ValueError(f"dtype must be a floating type of at most 32 bits, got {dtype}.")
    if dtype == jnp.float32:
        return model

    def loss_fn(params: Params, state: State, batch: Batch, key: Key) -> Any:
        params, inputs = _cast((params, batch.inputs), jnp.float32, dtype)
        value, (after, report) = model.loss(params, state, batch._replace(inputs=inputs), key)
        after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)
        return value.astype(jnp.float32), (after, _cast(report, dtype, jnp.float32))

    return model._replace(loss=loss_fn)


def widen(x: jax.Array) -> jax.Array:
    """Give an array of fewer bits as float32, for what needs them: logarithms and statistics."""
    is_narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
    return x.astype(jnp.float32) if is_narrow else x


def _cast(tree: Any, old: Any, new: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(new) if leaf.dtype == old else leaf, tree)
