"""Populations that hold the examples of a cohort alone, for the same round and the same bits.

All other clients are of size 0. Examples are padded to a capacity that no cohort exceeds, so that a
round is compiled once. A client's draws follow from its id and its number of examples, not from
where these are stored.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from fedjaxprune.data import stores
from fedjaxprune.data.stores import ClientStore
from fedjaxprune.federated.cohort import COUNTED_EXACTLY
from fedjaxprune.settings import INT_MAX
from fedjaxprune.types import Examples, Population, ReadRule, Whole


class Pantry(NamedTuple):
    """What the populations of one stage's rounds are made of.

    Attributes:
      store: of the clients' examples.
      capacity: examples that a population has room for.
      reads: ids of clients whose examples the stage uses besides those of its cohorts.
      order: ``[capacity]`` int32, of all populations.
      held: what the server holds.
      whole: what rounds know of all clients.
    """

    store: ClientStore
    capacity: int
    reads: np.ndarray
    order: Any
    held: Examples
    whole: Whole


def stock(
    store: ClientStore, *, cohort_size: int, reads: ReadRule = (), held: Examples = ()
) -> Pantry:
    """Prepare to feed rounds of a stage.

    Args:
      store: of the clients' examples.
      cohort_size: clients of a round.
      reads: as `Stage.reads`.
      held: tree of ``[S, ...]``, what the server holds.

    Raises:
      ValueError: a cohort may have more examples than int32 counts, or a client is none.
    """
    num_clients = len(store.sizes)
    others = np.arange(num_clients) if reads == "everyone" else np.array(reads, np.int64)
    if others.size and others.max() >= num_clients:
        raise ValueError(f"client_id must be less than {num_clients}, got {others.max()}.")
    number = min(cohort_size, num_clients)
    largest = np.partition(store.sizes, num_clients - number)[num_clients - number :]
    capacity = int(largest.sum()) + int(store.sizes[others].sum())
    capacity = max(1, min(capacity, int(store.sizes.sum())))
    if capacity > INT_MAX:
        raise ValueError(
            f"a round may have at most {INT_MAX} examples, and one of {number} clients may have "
            f"{capacity}: take a smaller federation.cohort_size."
        )
    total = int(store.sizes.sum())
    whole = Whole(np.float32(total), is_wide=total >= COUNTED_EXACTLY)  # pyright: ignore[reportArgumentType]
    return Pantry(store, capacity, others, np.arange(capacity, dtype=np.int32), held, whole)


def shapes(pantry: Pantry) -> Population:
    """Give the shapes of a population."""
    size = pantry.capacity

    def shape(like: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *like.shape), like.dtype)

    def vector(length: int) -> Any:
        return jax.ShapeDtypeStruct((length,), np.int32)

    def same(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    return Population(
        examples=jax.tree.map(shape, pantry.store.like),
        order=vector(size),
        offsets=vector(len(pantry.store.sizes) + 1),
        held=jax.tree.map(same, pantry.held),
        whole=jax.tree.map(same, pantry.whole),
    )


def population(pantry: Pantry, ids: np.ndarray) -> Population:
    """Fetch the examples of some clients; those whose ids are no client's are left out.

    Args:
      pantry: of the stage.
      ids: ``[C]`` integers; an id may occur twice.

    Returns:
      A population on the host, but for what the pantry has on the device.
    """
    sizes = pantry.store.sizes
    wanted = np.union1d(ids, pantry.reads).astype(np.int64)
    wanted = wanted[(wanted >= 0) & (wanted < len(sizes))]
    wanted = wanted[sizes[wanted] > 0]
    offsets: Any = np.zeros(len(sizes) + 1, np.int32)
    offsets[wanted + 1] = sizes[wanted]
    np.cumsum(offsets, out=offsets)

    def padded(leaf: np.ndarray, like: Any) -> np.ndarray:
        # Fresh in each round: JAX may use the memory as it is.
        made = np.empty((pantry.capacity, *like.shape), like.dtype)
        made[: len(leaf)] = leaf
        made[len(leaf) :] = 0
        return made

    leaves, structure = jax.tree.flatten(pantry.store.like)
    given = [np.zeros((0, *like.shape), like.dtype) for like in leaves]
    if wanted.size:
        given = stores.fetched(pantry.store, wanted)
    examples = [padded(leaf, like) for leaf, like in zip(given, leaves, strict=True)]
    return Population(
        examples=jax.tree.unflatten(structure, examples),
        order=pantry.order,
        offsets=offsets,
        held=pantry.held,
        whole=pantry.whole,
    )
