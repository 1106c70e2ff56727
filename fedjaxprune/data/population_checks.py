"""Why examples and clients' rows make no population, in one sentence each."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fedjaxprune.data import checks, mapped, rounding
from fedjaxprune.data.rows import Partition
from fedjaxprune.errors import DataError
from fedjaxprune.types import Examples

_INT32_MAX = 2**31 - 1


def examples(tree: Examples, *, num_classes: int | None) -> tuple[Examples, int]:
    """Check arrays ``[E, ...]`` and give them in the types in which JAX keeps them, with ``E``.

    Args:
      tree: of arrays.
      num_classes: that the labels must be less than; None if it is not known.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    if not leaves:
        raise DataError(f"examples must be a mapping of arrays, got {tree!r}.")
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    made = [_stored(leaf, at or "examples") for at, (_, leaf) in zip(paths, leaves, strict=True)]
    sizes = {len(leaf) for leaf in made}
    if len(sizes) != 1:
        raise DataError(f"examples must agree in their first axis, got sizes {sorted(sizes)}.")
    (size,) = sizes
    if not 0 < size <= _INT32_MAX:
        raise DataError(f"examples must number from 1 to {_INT32_MAX}, got {size}.")
    if num_classes is not None:
        labels = [leaf for at, leaf in zip(paths, made, strict=True) if at == "labels"]
        _check_classes(labels[0] if labels else None, num_classes)
    return jax.tree.unflatten(structure, made), size


def rows(
    parts: Iterable[Any], num_examples: int, *, what: str = "parts"
) -> tuple[np.ndarray, np.ndarray]:
    """Check the clients' rows, and give them one after the other, with where each client begins.

    Args:
      parts: lists of integers in ``[0, num_examples)``, or a `Partition`, which is checked as a
        whole.
      num_examples: ``E``.
      what: their name in errors.

    Returns:
      ``([sum of sizes], [N + 1])``, both int32.
    """
    if isinstance(parts, Mapping | str | bytes) or not hasattr(parts, "__iter__"):
        raise DataError(
            f"{what} must be a list with the rows of each client, got {checks.kind(parts)}"
            + ("; give list(parts.values())." if isinstance(parts, Mapping) else ".")
        )
    if isinstance(parts, Partition):
        index, offsets = _whole(parts, what)
    else:
        made = [_integers(part, client, what) for client, part in enumerate(parts)]
        offsets = np.cumsum([0, *map(len, made)])
        index = np.concatenate(made) if made else np.zeros(0, np.int64)
    if len(offsets) < 2:
        raise DataError(f"{what} must have at least one client, got none.")
    if index.size > _INT32_MAX:
        raise DataError(f"{what} must hold at most {_INT32_MAX} indices, got {index.size}.")
    if index.size and not (index.min() >= 0 and index.max() < num_examples):
        raise DataError(
            f"{what} must hold indices in [0, {num_examples}), got {index.min()} to {index.max()}."
        )
    return index.astype(np.int32, copy=False), offsets.astype(np.int32)


def _whole(parts: Partition, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Take order and offsets, both of integers, that fit each other."""
    order, offsets = np.asarray(parts.order), np.asarray(parts.offsets)
    for name, array in (("order", order), ("offsets", offsets)):
        if array.ndim != 1 or array.dtype.kind not in "ui":
            raise DataError(
                f"{what}: the {name} of a partition must be a vector of integers, got "
                f"{array.dtype} of shape {array.shape}."
            )
    ends = (int(offsets[0]), int(offsets[-1])) if offsets.size else (0, 0)
    if ends != (0, order.size) or np.any(offsets[1:] < offsets[:-1]):
        raise DataError(
            f"{what}: the offsets of a partition must not fall, from 0 to the {order.size} entries "
            f"of its order, got {ends[0]} to {ends[1]}."
        )
    return order, offsets


def _integers(part: Any, client: int, what: str) -> np.ndarray:
    """Take one client's rows as int64; of an empty list NumPy makes floats."""
    try:
        made = np.asarray(part)
    except (ValueError, TypeError) as error:
        raise DataError(f"{what}: client {client} has no list of rows: {error}") from None
    if made.ndim != 1:
        raise DataError(
            f"{what} must hold a list of rows for each client, but that of client {client} has the "
            f"shape {made.shape}."
        )
    if made.dtype == np.bool_ and made.size:
        raise DataError(
            f"{what} must hold integers, but client {client} has marks; give "
            "numpy.flatnonzero(marks)."
        )
    if made.size and made.dtype.kind not in "ui":
        raise DataError(f"{what} must hold integers, but client {client} has {made.dtype}.")
    if made.dtype == np.uint64 and made.size and made.max() > _INT32_MAX:
        raise DataError(f"{what}: client {client} has the row {made.max()}, which no example is.")
    return made.astype(np.int64)


def _stored(leaf: Any, path: str) -> Any:
    """Check one array, called by its path, and give it in the type in which JAX keeps it."""
    made = leaf if isinstance(leaf, jax.Array) else checks.array(leaf, path)
    if made.ndim == 0:
        raise DataError(f"{path} must be an array with an axis of examples, got one number.")
    given = made.dtype
    is_float = jnp.issubdtype(given, jnp.floating)
    is_whole = jnp.issubdtype(given, jnp.integer) or given == np.bool_
    if not (is_float or is_whole):
        raise DataError(f"{path} must be real numbers, got {_kind(made)}.")
    try:
        dtype = jnp.asarray(np.zeros(0, given)).dtype
    except TypeError:  # numbers of more bits than JAX has
        raise DataError(f"{path} must be numbers of at most 64 bits, got {given}.") from None
    if isinstance(made, Tracer):  # its values are not known
        return made
    if is_float:
        with np.errstate(over="ignore"):
            stored = made if made.dtype == dtype else made.astype(dtype)
        _check_finite(stored, path)
        if isinstance(made, np.ndarray) and stored is not made:
            rounding.check(made, path)
        return stored
    is_label = path.partition("/")[0] == "labels"  # batches hold int32
    limits = jnp.iinfo(jnp.int32 if is_label or given == np.bool_ else dtype)
    if limits.max < jnp.iinfo(jnp.uint8 if given == np.bool_ else given).max and made.size:
        low, high = int(made.min()), int(made.max())
        if low < limits.min or high > limits.max:
            raise DataError(
                f"{path} must fit {limits.dtype}, got {low} to {high}; number what occurs from 0: "
                "give numpy.unique(values, return_inverse=True)[1]."
            )
    return made


def _kind(made: Any) -> str:
    return checks.content(made) if isinstance(made, np.ndarray) else str(made.dtype)


def _check_finite(values: Any, path: str) -> None:
    for start, block in mapped.blocks(np.asarray(values)):
        bad = ~np.isfinite(block)
        if bad.any():
            example = int(np.argwhere(bad)[0][0])
            raise DataError(
                f"{path} must be finite {values.dtype} numbers, but example {start + example} has "
                f"{block[bad][0]}; fill what is missing, and say where by an array of its own."
            )


def _check_classes(labels: Any, num_classes: int) -> None:
    """Refuse labels that are no classes; with several an example, negative ones are none."""
    checks.whole(num_classes)
    if labels is None or labels.dtype.kind not in "bui":
        given = "no array of that name" if labels is None else str(labels.dtype)
        raise DataError(f"labels must be integers for {num_classes} classes, got {given}.")
    low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    if high >= num_classes or (low < 0 and labels.ndim == 1):
        raise DataError(f"labels must lie in [0, {num_classes}), got {low} to {high}.")
