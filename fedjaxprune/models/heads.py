"""What a network's output is for: losses and hits of classes, of one logit and of numbers."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjaxprune.types import Model


class Head(NamedTuple):
    """What a network's output is for; each function maps outputs and labels to ``[B]`` or more.

    Attributes:
      loss: ``(outputs, labels) -> losses`` in training.
      test_loss: the same in tests, always in float32.
      hits: ``(outputs, labels) -> bool``: which labels are predicted right; None for numbers.
    """

    loss: Callable[[jax.Array, jax.Array], jax.Array]
    test_loss: Callable[[jax.Array, jax.Array], jax.Array]
    hits: Callable[[jax.Array, jax.Array], jax.Array] | None


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the softmax cross-entropy of every label, in nats: labels' shape, ``[B]`` or more."""
    classes = jnp.arange(logits.shape[-1], dtype=labels.dtype)
    chosen = labels[..., None] == classes.reshape(*[1] * labels.ndim, -1)
    picked = jnp.sum(jnp.where(chosen, logits, jnp.zeros_like(logits)), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def sigmoid_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the cross-entropy of labels 0 and 1 ``[B]``, in nats, from one logit ``[B, 1]``."""
    logit = logits[..., 0]
    return jax.nn.softplus(jnp.where(labels == 1, -logit, logit))


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Compute the squared error ``[B]``, the mean over targets ``[B]`` or ``[B, K]``."""
    return jnp.mean(jnp.square(_errors(outputs, targets)), axis=-1)


def absolute_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Compute the absolute error ``[B]``, the mean over targets ``[B]`` or ``[B, K]``."""
    return jnp.mean(jnp.abs(_errors(outputs, targets)), axis=-1)


def is_largest(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Tell where the label has the largest logit; of equal ones the first."""
    return jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels


def is_right_side(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Tell where one logit ``[B, 1]`` is positive exactly for labels ``[B]`` of 1."""
    return (logits[..., 0] > 0) == (labels == 1)


def _test_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def _errors(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return outputs.astype(jnp.float32) - targets.reshape(outputs.shape).astype(jnp.float32)


CLASSES = Head(loss=cross_entropy, test_loss=_test_cross_entropy, hits=is_largest)
HEADS: Mapping[str, Head] = {
    "classification": CLASSES,
    "sequence": CLASSES,
    "binary": Head(sigmoid_cross_entropy, sigmoid_cross_entropy, is_right_side),
    "regression": Head(squared_error, squared_error, None),
}


def for_task(model: Model, task: str) -> Model:
    """Give a model the loss of a task; one that was made with a loss of its own keeps it.

    Args:
      model: whose output is as wide as the task needs (`Dataset.num_outputs`).
      task: ``"classification"``, ``"binary"``, ``"regression"`` or ``"sequence"``.

    Raises:
      ValueError: the task is unknown.
    """
    if task not in HEADS:
        raise ValueError(f"task must be one of {', '.join(HEADS)}, got {task!r}.")
    if model.with_head is None or HEADS[task] is CLASSES:
        return model
    return model.with_head(HEADS[task])


def prediction_loss(model: Model) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Give the loss of predictions for the model's task; cross-entropy for a loss of its own."""
    return (model.head or CLASSES).test_loss
