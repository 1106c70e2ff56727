"""Make a `Model` from a flax linen module, a flax nnx module or plain functions."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjaxprune import metrics
from fedjaxprune.base import Batch, Key, Model, Params, State

LossFn = Callable[[jax.Array, jax.Array], jax.Array]  # (logits [B, classes], labels [B]) -> [B]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the softmax cross-entropy of every example, in nats: ``[B]``."""
    chosen = labels[:, None] == jnp.arange(logits.shape[-1], dtype=labels.dtype)[None]
    picked = jnp.sum(jnp.where(chosen, logits, jnp.zeros_like(logits)), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def from_linen(
    module: nn.Module, *, input_shape: Sequence[int], loss: LossFn = cross_entropy
) -> Model:
    """Make a model from a flax linen module.

    Its `params` collection becomes the parameters, all other collections become the state. The loss
    calls the module in training mode and predictions in inference mode, told by whichever of the
    arguments ``train``, ``training`` or ``deterministic`` its ``__call__`` has. If it has one named
    ``mask``, the loss passes ``[B]`` booleans there that are False for filling, so that statistics
    leave it out. The key of the loss feeds the `dropout` stream.

    Args:
      module: takes ``[B, *input_shape]`` and gives logits ``[B, classes]``.
      input_shape: of one example.
      loss: of each example, from logits and labels.
    """
    names = inspect.signature(type(module).__call__).parameters
    has_mask = "mask" in names

    def mode(train: bool) -> dict[str, Any]:
        flags = {"train": train, "training": train, "deterministic": not train}
        return {name: flag for name, flag in flags.items() if name in names}

    def init_fn(key: Key) -> tuple[Params, State]:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            state = module.init(key, jnp.zeros((1, *input_shape), jnp.float32), **mode(False))
        state = dict(state)
        return state.pop("params"), state

    def apply_fn(
        params: Params, state: State, inputs: Any, mask: jax.Array, key: Key
    ) -> tuple[jax.Array, State]:
        options: dict[str, Any] = mode(True)
        if has_mask:
            options["mask"] = mask
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            logits, new_state = module.apply(
                {"params": params, **state},
                inputs,
                rngs={"dropout": key},
                mutable=list(state),
                **options,
            )
        return logits, dict(new_state)

    def predict_fn(params: Params, state: State, inputs: Any) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return module.apply({"params": params, **state}, inputs, **mode(False))  # pyright: ignore[reportReturnType]

    return Model(init=init_fn, loss=_training_loss(apply_fn, loss), predict=predict_fn)


def _training_loss(apply_fn: Callable[..., tuple[jax.Array, State]], loss: LossFn) -> Any:
    """Make a model's loss: the weighted mean over the batch, and its metrics."""

    def loss_fn(params: Params, state: State, batch: Batch, key: Key) -> Any:
        logits, state = apply_fn(params, state, batch.inputs, batch.weights > 0, key)
        losses = metrics.mean(loss(logits, batch.labels), batch.weights)
        correct = jnp.argmax(logits, axis=-1).astype(batch.labels.dtype) == batch.labels
        accuracy = metrics.mean(correct.astype(jnp.float32), batch.weights)
        # Zero, with zero gradients, for a batch that is all filling.
        mean = losses.total / jnp.where(losses.weight > 0, losses.weight, 1)
        return mean, (state, {"loss": losses, "accuracy": accuracy})

    return loss_fn
