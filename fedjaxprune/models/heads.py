"""What a network's output is for: losses and hits of classes, of one logit and of numbers."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
      are_known: ``labels -> bool``: which labels are classes, for a loss that gives others a number
        as well: a training step that sees another reports a NaN. None: the loss itself tells.
    """

    loss: Callable[[jax.Array, jax.Array], jax.Array]
    test_loss: Callable[[jax.Array, jax.Array], jax.Array]
    hits: Callable[[jax.Array, jax.Array], jax.Array] | None
    are_known: Callable[[jax.Array], jax.Array] | None = None


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the softmax cross-entropy of every label, in nats: labels' shape, ``[B]`` or more.

    That of a label that is no class of the network is NaN.
    """
    labels = _check_classes(logits, labels)
    # Compared, not gathered: XLA fuses this with the exponentials, so that the gradient takes the
    # logits' place; that of a gather is scattered into a second array of their size.
    classes = jnp.arange(logits.shape[-1], dtype=labels.dtype)
    chosen = labels[..., None] == classes.reshape(*[1] * labels.ndim, -1)
    picked = jnp.sum(jnp.where(chosen, logits, jnp.zeros_like(logits)), axis=-1)
    return _where_class(jax.nn.logsumexp(logits, axis=-1) - picked, labels, logits.shape[-1])


def sigmoid_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the cross-entropy of labels 0 and 1 ``[B]``, in nats, from one logit ``[B, 1]``.

    Any other label counts as 0 here; in training its client reports a NaN and is left out, in tests
    its loss is NaN, and `partitions.population` refuses it if `num_classes` is 2.

    Raises:
      ValueError: the logits are not ``[B, 1]``, or the labels not ``[B]`` whole numbers.
    """
    _check_outputs(logits)
    if logits.shape[-1:] != (1,):
        raise ValueError(
            f"two classes by one logit need outputs of shape (batch, 1), got {logits.shape}; for "
            'one output a class give the model heads.for_task(model, "classification").'
        )
    labels = _check_labels(labels, logits.shape[:-1])
    logit = logits[..., 0]
    return jax.nn.softplus(jnp.where(labels == 1, -logit, logit))


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Compute the squared error ``[B]``, the mean over an example's targets, ``[B]`` or more."""
    return _mean(jnp.square(_errors(outputs, targets)))


def absolute_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Compute the absolute error ``[B]``, the mean over an example's targets, ``[B]`` or more."""
    return _mean(jnp.abs(_errors(outputs, targets)))


def is_largest(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Tell where the label has the largest logit; of equal ones the first."""
    labels = _wide(labels)
    return jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels


def is_right_side(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Tell where one logit ``[B, 1]`` is positive exactly for labels ``[B]`` of 1."""
    return (logits[..., 0] > 0) == (labels == 1)


def are_binary(labels: jax.Array) -> jax.Array:
    """Tell which labels are 0 or 1."""
    return (labels == 0) | (labels == 1)


def counts_hits(head: Head, outputs: Any, labels: Any) -> bool:
    """Tell whether labels are classes, one for each row of outputs among which one can be right."""
    if head.hits is None or not (hasattr(outputs, "dtype") and hasattr(labels, "dtype")):
        return False
    are_classes = jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == outputs.shape[:-1]
    return are_classes and (head.hits is not is_largest or outputs.shape[-1] > 1)


def _test_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    labels = _check_classes(logits, labels)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return _where_class(losses, labels, logits.shape[-1])


def _test_sigmoid_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    losses = sigmoid_cross_entropy(logits, labels)
    return jnp.where(are_binary(labels), losses, jnp.full_like(losses, jnp.nan))


def _where_class(losses: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """Keep the losses of labels in ``[0, num_classes)``; others would be those of no label."""
    is_class = (labels >= 0) & (labels < num_classes)
    return jnp.where(is_class, losses, jnp.full_like(losses, jnp.nan))


def _mean(errors: jax.Array) -> jax.Array:
    return jnp.mean(errors, axis=tuple(range(1, errors.ndim)))


def _errors(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    _check_outputs(outputs)
    _check_array(targets)
    if outputs.ndim < 2 or outputs.shape not in (targets.shape, (*targets.shape, 1)):
        raise ValueError(
            "a regression needs outputs (batch, targets) and labels of the same shape, or (batch,) "
            f"for one target, got outputs {outputs.shape} and labels {targets.shape}."
        )
    return outputs.astype(jnp.float32) - targets.reshape(outputs.shape).astype(jnp.float32)


def _wide(labels: jax.Array) -> jax.Array:
    """Give integers of fewer bits, which may not hold the number of classes, as int32."""
    return labels if labels.dtype.itemsize >= 4 else labels.astype(jnp.int32)


def _check_classes(logits: Any, labels: Any) -> jax.Array:
    """Refuse outputs that are not one for each class, and labels that are not one for each row."""
    _check_outputs(logits)
    if logits.shape[-1:] == (1,):
        raise ValueError(
            "the network has one output, and classes need one each: for two classes by one logit "
            'give the model heads.for_task(model, "binary"), for numbers "regression".'
        )
    return _check_labels(labels, logits.shape[:-1])


def _check_labels(labels: Any, shape: tuple[int, ...]) -> jax.Array:
    """Refuse labels that are not integers of a shape."""
    _check_array(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"classes are integers, got labels of {labels.dtype}: give labels.argmax(axis=-1) if "
            "they are one-hot, labels.astype(int) if they are whole, and if they are numbers a "
            'loss of their own or the model heads.for_task(model, "regression").'
        )
    if labels.shape != shape:
        advice = "."
        if labels.shape == (*shape, 1):
            advice = ": give labels[..., 0]."
        elif labels.shape[:-1] == shape:
            advice = ": give labels.argmax(axis=-1) if they are one-hot."
        raise ValueError(
            f"a batch's labels must have the shape {shape}, got {labels.shape}{advice}"
        )
    return _wide(labels)


def _check_outputs(outputs: Any) -> None:
    if not hasattr(outputs, "dtype"):
        raise ValueError(f"a network's output must be one array, got {type(outputs).__name__}.")
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(f"a network's outputs must be real numbers, got {outputs.dtype}.")


def _check_array(labels: Any) -> None:
    if not hasattr(labels, "dtype"):
        raise ValueError(
            f"labels must be one array, got {type(labels).__name__}; several need a loss of their "
            "own."
        )


CLASSES = Head(loss=cross_entropy, test_loss=_test_cross_entropy, hits=is_largest)
HEADS: Mapping[str, Head] = {
    "classification": CLASSES,
    "sequence": CLASSES,
    "binary": Head(sigmoid_cross_entropy, _test_sigmoid_cross_entropy, is_right_side, are_binary),
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
