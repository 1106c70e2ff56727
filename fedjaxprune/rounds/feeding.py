"""Populations that hold the examples of a cohort alone, for the same round and the same bits.

All other clients are of size 0. Examples are padded to a capacity that no cohort exceeds, so that a
round is compiled once. A client's draws follow from its id and its number of examples, not from
where these are stored.

The examples may be in parts, one for each device of a mesh, which trains the clients of its part.
Clients are shared out to devices on the host then, as a round would do it, so that a process can
fetch the clients of its own devices alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjaxprune.data import stores
from fedjaxprune.data.stores import ClientStore
from fedjaxprune.federated import cohort
from fedjaxprune.federated.cohort import COUNTED_EXACTLY
from fedjaxprune.settings import INT_MAX
from fedjaxprune.types import Examples, Population, ReadRule, Whole


class Pantry(NamedTuple):
    """What the populations of one stage's rounds are made of.

    Attributes:
      store: of the clients' examples.
      capacity: examples that a cohort may have.
      part_capacity: examples that each of the parts has room for; `capacity` where there is one.
      reads: ids of clients whose examples the stage uses besides those of its cohorts.
      order: ``[capacity]`` int32, of all populations.
      held: what the server holds.
      whole: what rounds know of all clients, and the number of parts.
    """

    store: ClientStore
    capacity: int
    part_capacity: int
    reads: np.ndarray
    order: Any
    held: Examples
    whole: Whole


def stock(
    store: ClientStore,
    *,
    cohort_size: int,
    reads: ReadRule = (),
    held: Examples = (),
    num_parts: int = 1,
) -> Pantry:
    """Prepare to feed rounds of a stage.

    Args:
      store: of the clients' examples.
      cohort_size: clients of a round.
      reads: as `Stage.reads`.
      held: tree of ``[S, ...]``, what the server holds.
      num_parts: parts of a population, as many as a mesh has devices that share a cohort. A stage
        that `reads` has one: the server looks for these examples on every device.

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
    total = int(store.sizes.sum())
    whole = Whole(np.float32(total), is_wide=total >= COUNTED_EXACTLY)  # pyright: ignore[reportArgumentType]
    part_capacity = capacity
    if num_parts > 1 and not others.size:
        slots = -(-cohort_size // num_parts)
        part_capacity = max(1, int(np.sort(largest)[::-1][:slots].sum()))
        whole = dataclasses.replace(whole, num_parts=num_parts, most_clients=slots)
    if (room := whole.num_parts * part_capacity) > INT_MAX:
        raise ValueError(
            f"a round may have at most {INT_MAX} examples, and one of {number} clients may have "
            f"{room}: take a smaller federation.cohort_size."
        )
    order = np.arange(capacity, dtype=np.int32)
    return Pantry(store, capacity, part_capacity, others, order, held, whole)


def shapes(pantry: Pantry) -> Population:
    """Give the shapes of a population, all parts included."""
    room = pantry.whole.num_parts * pantry.part_capacity

    def shape(like: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((room, *like.shape), like.dtype)

    def vector(length: int) -> Any:
        return jax.ShapeDtypeStruct((length,), np.int32)

    def same(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    return Population(
        examples=jax.tree.map(shape, pantry.store.like),
        order=vector(pantry.capacity),
        offsets=vector(len(pantry.store.sizes) + 1),
        held=jax.tree.map(same, pantry.held),
        whole=jax.tree.map(same, pantry.whole),
    )


def population(
    pantry: Pantry, ids: np.ndarray, *, parts: Sequence[int] | None = None
) -> Population:
    """Fetch the examples of some clients; those whose ids are no client's are left out.

    Args:
      pantry: of the stage.
      ids: ``[C]`` integers; an id may occur twice where there is one part.
      parts: those whose clients are fetched, one after the other; None for all.

    Returns:
      A population on the host, but for what the pantry has on the device. Of its examples there
      are those of `parts` alone, ``[len(parts) * part_capacity, ...]``; all else is of all parts.

    Raises:
      ValueError: an id occurs twice, and there are parts.
    """
    sizes, number = pantry.store.sizes, pantry.whole.num_parts
    asked = _clients(ids, sizes)
    wanted = np.union1d(asked, _clients(pantry.reads, sizes))
    offsets: Any = np.zeros(len(sizes) + 1, np.int32)
    offsets[wanted + 1] = sizes[wanted]
    np.cumsum(offsets, out=offsets)
    order, shares = pantry.order, {0: wanted}
    if number > 1:
        if len(asked) > len(wanted):
            found, times = np.unique(asked, return_counts=True)
            raise ValueError(
                f"a cohort that devices of several processes are fed must have each client once, "
                f"and client {found[times.argmax()]} was drawn {times.max()} times: set "
                "execution.examples device."
            )
        slots = pantry.whole.most_clients
        devices = cohort.deal(sizes[asked], num_devices=number, num_slots=slots)
        shares = {part: np.sort(asked[devices == part]) for part in range(number)}
        order = _order(pantry, offsets, shares)
    chosen = [shares[part] for part in (range(number) if parts is None else parts)]
    return Population(
        examples=_fetched(pantry, chosen),
        order=order,
        offsets=offsets,
        held=pantry.held,
        whole=pantry.whole,
    )


def _clients(ids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Take those ids that are of a client with examples."""
    ids = np.asarray(ids, np.int64)
    ids = ids[(ids >= 0) & (ids < len(sizes))]
    return ids[sizes[ids] > 0]


def _order(pantry: Pantry, offsets: np.ndarray, shares: Mapping[int, np.ndarray]) -> Any:
    """Say where each client's examples are among those of all parts, ``[capacity]`` int32."""
    order = np.zeros(pantry.capacity, np.int32)
    for part, ids in shares.items():
        own = pantry.store.sizes[ids]
        places = np.arange(own.sum())
        shifts = offsets[ids] - (np.cumsum(own) - own)
        order[np.repeat(shifts, own) + places] = part * pantry.part_capacity + places
    return order


def _fetched(pantry: Pantry, shares: Sequence[np.ndarray]) -> Examples:
    """Fetch the clients of some parts, each part padded to its capacity."""
    leaves, structure = jax.tree.flatten(pantry.store.like)
    given = [np.zeros((0, *like.shape), like.dtype) for like in leaves]
    if sum(ids.size for ids in shares):
        given = stores.fetched(pantry.store, np.concatenate(shares))
    numbers = [int(pantry.store.sizes[ids].sum()) for ids in shares]
    size = pantry.part_capacity

    def padded(leaf: np.ndarray, like: Any) -> np.ndarray:
        # Fresh in each round: JAX may use the memory as it is.
        made = np.empty((len(shares) * size, *like.shape), like.dtype)
        begin = 0
        for part, number in enumerate(numbers):
            made[part * size : part * size + number] = leaf[begin : begin + number]
            made[part * size + number : (part + 1) * size] = 0
            begin += number
        return made

    examples = [padded(leaf, like) for leaf, like in zip(given, leaves, strict=True)]
    return jax.tree.unflatten(structure, examples)
