"""Client stores: examples that stay off the device, fetched for some clients at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune.data import mapped
from fedjaxprune.errors import DataError
from fedjaxprune.types import Examples


class ClientStore(NamedTuple):
    """Where the clients' examples are, if not on the device.

    Attributes:
      sizes: ``[N]`` int64, the clients' numbers of examples.
      fetch: ``ids [K] -> examples``, all of these clients' one after the other, in their order:
        tree of NumPy arrays ``[sum of sizes, ...]``. A thread of its own may call it.
      like: tree of the shapes of one example, in the types in which JAX keeps them.
      test: inputs and labels of test examples, where the store is a run's data set.
      checksum: gives a number that is another one if the examples are others, so that a run is not
        continued with these; None does not look.
    """

    sizes: np.ndarray
    fetch: Callable[[np.ndarray], Examples]
    like: Any
    test: Any = None
    checksum: Callable[[], int] | None = None


def of_arrays(examples: Examples, order: np.ndarray, offsets: np.ndarray) -> ClientStore:
    """Make a store of arrays in memory, or of memory-mapped files, which are read as needed.

    Args:
      examples: tree of NumPy arrays ``[E, ...]``.
      order: ``[sum of sizes]`` integers, rows of the examples, grouped by client.
      offsets: ``[N + 1]`` integers, where each client begins, as in a `Population`.

    Raises:
      DataError: a client would have rows that do not exist.
    """
    order, ends = np.asarray(order), np.asarray(offsets, np.int64)
    begins, sizes = ends[:-1], np.diff(ends)
    num_examples = min(map(len, jax.tree.leaves(examples)))
    low, high = int(order.min(initial=0)), int(order.max(initial=0))
    if low < 0 or (order.size and high >= num_examples):
        raise DataError(
            f"the order of a client store must hold rows in [0, {num_examples}), got {low} to "
            f"{high}."
        )
    if not sizes.size or ends[0] != 0 or ends[-1] != order.size or sizes.min() < 0:
        raise DataError(
            f"the offsets of a client store must not fall, from 0 to the {order.size} entries of "
            f"its order, got {ends.tolist() if ends.size < 9 else f'{ends[0]} to {ends[-1]}'}."
        )

    def fetch_fn(ids):
        own = sizes[ids]
        shifts = begins[ids] - (np.cumsum(own) - own)  # from a place among those fetched
        rows = order[np.repeat(shifts, own) + np.arange(own.sum())]
        for leaf in jax.tree.leaves(examples):
            mapped.advise(leaf, order="any")
        return jax.tree.map(lambda leaf: leaf[rows], examples)

    def checksum_fn():
        return mapped.checksum([order, *jax.tree.leaves(examples)])

    like = jax.tree.map(_like, examples)
    return ClientStore(sizes, fetch_fn, like, checksum=checksum_fn)


def of_value(value: Any) -> ClientStore:
    """Make a store of whatever has its `sizes` and `fetch`, by what it fetches for one client.

    Its `checksum` is taken, too, if it has one.

    Raises:
      DataError: the sizes are none, what is fetched does not fit them, or the checksum is none.
    """
    sizes = np.asarray(value.sizes)
    if sizes.ndim != 1 or sizes.dtype.kind not in "ui" or not sizes.size or sizes.min() < 0:
        raise DataError(
            "the sizes of a client store must be a vector of numbers of examples, got "
            f"{sizes.dtype} of shape {sizes.shape}."
        )
    holders = np.flatnonzero(sizes)
    if not holders.size:
        raise DataError("the clients of a store must have at least one example, got none.")
    first = jax.tree.map(np.asarray, value.fetch(holders[:1]))
    checksum: Callable[[], int] | None = getattr(value, "checksum", None)
    if not isinstance(checksum, Callable | None):
        raise DataError(
            "the checksum of a client store must be a function without arguments, got "
            f"{type(checksum).__name__}."
        )
    like = jax.tree.map(_like, first)
    store = ClientStore(sizes.astype(np.int64), value.fetch, like, checksum=checksum)
    fetched(store, holders[:1])
    return store


def of_tokens(store: ClientStore, *, below: int) -> ClientStore:
    """Make a store that refuses tokens, the inputs of examples, that are not in ``[0, below)``."""

    def fetch_fn(ids):
        found: Any = store.fetch(ids)
        tokens = np.asarray(found["inputs"])
        low, high = int(tokens.min(initial=below)), int(tokens.max(initial=0))
        if low < 0 or high >= below:
            raise DataError(
                f"a client store must fetch tokens in [0, {below}), of which the network knows, "
                f"got {low} to {high}: make the data set by `as_dataset(store, num_classes=...)`, "
                "or take a network of more tokens."
            )
        return found

    return store._replace(fetch=fetch_fn)


def fetched(store: ClientStore, ids: np.ndarray) -> list[np.ndarray]:
    """Fetch clients' examples, as leaves ``[sum of sizes, ...]`` like those that the store names.

    Raises:
      DataError: they differ from these in structure, shape or number.
    """
    number = int(store.sizes[ids].sum())
    given = store.fetch(ids)
    if jax.tree.structure(given) != jax.tree.structure(store.like):
        raise DataError(
            f"a client store must fetch {jax.tree.structure(store.like)}, got "
            f"{jax.tree.structure(given)}."
        )
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(given)]
    for leaf, like in zip(leaves, jax.tree.leaves(store.like), strict=True):
        if not np.can_cast(leaf.dtype, like.dtype, "same_kind"):
            raise DataError(f"a client store must fetch {like.dtype}, got {leaf.dtype}.")
        if leaf.shape != (number, *like.shape):
            raise DataError(
                f"a client store must fetch arrays of shape {(number, *like.shape)} for "
                f"{len(ids)} clients, got {leaf.shape}."
            )
    return leaves


def num_bytes(store: ClientStore, num_examples: int) -> int:
    """Count the bytes of so many examples on a device."""
    leaves = jax.tree.leaves(store.like)
    return num_examples * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _like(leaf: Any) -> jax.ShapeDtypeStruct:
    """Give shape and type of one example of an array as JAX keeps them.

    No device is asked, as processes are not joined yet where a store is given in Python.
    """
    found = jax.eval_shape(jnp.asarray, np.zeros(0, leaf.dtype))
    return jax.ShapeDtypeStruct(leaf.shape[1:], found.dtype)
