"""Examples on the device with who holds which, and how many of each class."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from fedjaxprune.data import population_checks
from fedjaxprune.types import Examples, Population


def population(
    examples: Examples,
    parts: Iterable[ArrayLike],
    *,
    num_classes: int | None = None,
    held: ArrayLike = (),
) -> Population:
    """Put examples on the device, once and as stored, with who holds which.

    Values are kept as JAX keeps them: 64 bits as 32, unless ``jax_enable_x64`` is set.

    Args:
      examples: tree of ``[E, ...]``, of finite real numbers. Those of `batching` are ``{"inputs":
        ..., "labels": ...}``: inputs may be a tree of arrays; so may the targets of a loss of one's
        own.
      parts: the clients' indices, as a `Partition` or one by one; they may overlap, leave examples
        out, repeat one, which then counts as often, or be empty.
      num_classes: labels must be less; None does not look, and the loss of an example with another
        label is NaN.
      held: rows of the examples that the server holds; empty for none.

    Raises:
      DataError: a value cannot be used or does not fit its type, the leaves differ in `E`, or an
        index is no whole number in ``[0, E)``.
    """
    made = population_on_host(examples, parts, num_classes=num_classes, held=held)
    return jax.tree.map(jnp.asarray, made)


def population_on_host(
    examples: Examples,
    parts: Iterable[ArrayLike],
    *,
    num_classes: int | None = None,
    held: ArrayLike = (),
) -> Population:
    """Make a population of NumPy arrays; those of the examples are not copied.

    Arguments and errors are those of `population`.
    """
    stored, num_examples = population_checks.examples(examples, num_classes=num_classes)
    order, offsets = population_checks.rows(parts, num_examples)
    own, _ = population_checks.rows([held], num_examples, what="held")
    return Population(
        examples=stored,
        order=order,  # pyright: ignore[reportArgumentType]
        offsets=offsets,  # pyright: ignore[reportArgumentType]
        held=jax.tree.map(lambda leaf: leaf[own], stored) if own.size else (),
    )


def histogram(parts: Iterable[ArrayLike], labels: np.ndarray, *, num_classes: int) -> np.ndarray:
    """Count the labels of every client: ``[N, num_classes]`` int64.

    Raises:
      DataError: a label is no class, or a client's index no example.
    """
    stored, num_examples = population_checks.examples({"labels": labels}, num_classes=num_classes)
    order, offsets = population_checks.rows(parts, num_examples)
    num_clients = len(offsets) - 1
    clients = np.repeat(np.arange(num_clients), np.diff(offsets))
    owned = clients * num_classes + np.asarray(stored["labels"])[order]
    return np.bincount(owned, minlength=num_clients * num_classes).reshape(num_clients, -1)
