"""Maps one client over a cohort, in chunks, over devices, and aggregates the messages.

No other module depends on how a cohort is mapped. Every device of a mesh has a part of the cohort.
Chunks of clients run side by side under ``vmap``, chunks one after the other in a ``scan``, and
every message is folded into the accumulators at once: memory holds one chunk for each device, not
the cohort. At the end the devices merge their accumulators. Chunk sizes and numbers
of devices differ only in rounding.

Every device has everybody's examples, or, of a population in parts, those of its own clients alone
(`Whole.num_parts`): then each client is trained where its examples are.
"""

import functools
import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fedjaxprune import trees
from fedjaxprune.federated import populations
from fedjaxprune.types import (
    Aggregator,
    ClientData,
    Cohort,
    CohortAggregator,
    Key,
    Message,
    Population,
    State,
    client_data,
)

AXIS = "clients"  # of the mesh
MODEL_AXIS = "model"  # of a mesh whose devices share a copy of the model between them

# A message counts if its values are smaller than this, either way, and its weight is in [0, 2^31]:
# then no total of a cohort overflows, and one client cannot make every round infinite.
VALUE_LIMIT = 2.0**64
WEIGHT_LIMIT = 2.0**31
COUNTED_EXACTLY = 2**24  # examples; where there are more, sums of arrays keep what rounding takes

ClientUpdate = Callable[[Key, Any, State, ClientData], tuple[Message, State]]


class Outcome(NamedTuple):
    """What a cohort comes to.

    Attributes:
      fields: the messages' fields, aggregated, by name.
      states: tree of ``[C, ...]``; absent and rejected clients keep the rows they had.
      rejected: ``[C]`` bool, clients left out because what they computed was not plausible.
    """

    fields: dict[str, Any]
    states: State
    rejected: jax.Array


def make_mesh(*, devices: Sequence[Any] | None = None, model_devices: int = 1) -> Mesh:
    """Make the mesh that a cohort is sharded over: an axis `clients`, and `model` if asked for.

    Args:
      devices: JAX devices to use; all of the back end by default. A CPU counts as one device
        unless ``jax.config.update("jax_num_cpu_devices", n)`` comes before JAX is first used.
      model_devices: how many neighboring devices share one copy of the model; XLA shares the work
        of a client out to them. With 1 the mesh has the axis `clients` alone.

    Raises:
      ValueError: if `model_devices` does not divide the number of devices.
    """
    chosen = np.array(jax.devices() if devices is None else list(devices))
    if model_devices < 1 or chosen.size % model_devices:
        raise ValueError(
            f"model_devices must divide the number of devices ({chosen.size}), got {model_devices}."
        )
    if model_devices == 1:
        return Mesh(chosen, (AXIS,), axis_types=(AxisType.Auto,))
    grid = chosen.reshape(-1, model_devices)
    return Mesh(grid, (AXIS, MODEL_AXIS), axis_types=(AxisType.Auto, AxisType.Auto))


# Messages of a chunk written out one after the other, in the same order: a client's share of a loop
# is otherwise one small operation a leaf, and weighs more than the additions of a small model.
_FOLDED_AT_ONCE = 16


def run(
    key: Key,
    update: ClientUpdate,
    aggregators: Mapping[str, Aggregator | CohortAggregator],
    broadcast: Any,
    cohort: Cohort,
    population: Population,
    *,
    chunk_size: int,
    mesh: Mesh | None = None,
) -> Outcome:
    """Let every client of a cohort work, and aggregate what they say.

    A client's key is folded from its id, so its place in the cohort does not matter. A message or a
    state that is not plausible is left out: it counts for nothing and the client's row stays. All
    values must be smaller than `VALUE_LIMIT`, and the weight in ``[0, WEIGHT_LIMIT]``.

    Args:
      key: the round's key for its clients.
      update: one client's work, ``(key, broadcast, state, data) -> (message, state)``. Whatever
        changes from round to round reaches it by its arguments, since devices share no closures.
      aggregators: by field of the message; `masks` need none.
      broadcast: what every client starts from, any tree that `update` understands.
      cohort: who takes part; `states` holds what `update` takes and returns, by row ``[C, ...]``.
      population: everybody's examples, on all devices or in parts.
      chunk_size: clients under one ``vmap``; 1 runs them one by one, without ``vmap``.
      mesh: devices to share the cohort out to, so that each has about as many examples (see
        `make_mesh`); it need not divide the cohort. Everything else but the parts of a population
        is replicated. None runs where the arguments are.

    Raises:
      ValueError: while tracing, if an argument does not fit the others.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    if mesh is not None and AXIS not in mesh.axis_names:
        raise ValueError(f"the mesh must have an axis {AXIS!r}, got {mesh.axis_names}.")
    populations.check_cohort(cohort)
    size = cohort.client_ids.shape[0]
    if size < 1:
        raise ValueError("a cohort must hold at least one client, which may be absent.")
    population = populations.all_of(population)
    populations.check_shapes(population)
    num_devices = 1 if mesh is None else mesh.shape[AXIS]
    num_parts = populations.num_parts(population)
    if num_parts not in (1, num_devices):
        raise ValueError(
            f"the population is in {num_parts} parts, one for each device, but the mesh has "
            f"{num_devices} devices."
        )
    num_slots = -(-size // num_devices)  # a device
    num_slots = max(num_slots, min(size, populations.most_clients(population)))
    chunk_size = min(chunk_size, num_slots)

    rows = (cohort.client_ids, cohort.participated, cohort.states)
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), rows)
    everybodys = (key, broadcast, population)
    # Traced once, for the shapes and for the loop: that is most of the time before compiling.
    work = jax.jit(functools.partial(_work, update), inline=True)
    shapes, _, _ = jax.eval_shape(work, (key, broadcast, _part(population, num_parts)), first)
    is_wide = populations.is_wide(population, more_than=COUNTED_EXACTLY - 1)
    streaming, gathering = _sort(aggregators, shapes.fields, is_wide=is_wide)
    share = _share_fn(work, streaming, gathering, shapes.fields, chunk_size, num_devices)
    if num_devices == chunk_size == 1:
        accumulators, outputs = share(everybodys, rows)
    else:
        sizes = population.offsets[cohort.client_ids + 1] - population.offsets[cohort.client_ids]
        sizes = jnp.where(cohort.participated, sizes, jnp.zeros_like(sizes))
        where = None if num_parts == 1 else _part_of(population, cohort.client_ids, num_parts)
        clients, slots = _deal(sizes, num_devices, num_slots, where)
        dealt = jax.tree.map(lambda leaf: _take_or_zero(leaf, clients), rows)
        if mesh is not None:
            shared, whole = PartitionSpec(AXIS), PartitionSpec()
            of_all: Any = whole
            if num_parts > 1:
                share = _with_part(share)
                divided: Any = Population(shared, whole, whole, whole, whole)  # pyright: ignore[reportArgumentType]
                of_all = (whole, whole, divided)
            share = jax.shard_map(
                share,
                mesh=mesh,
                in_specs=(of_all, shared),
                out_specs=(whole, shared),
                axis_names={AXIS},  # further axes are left to XLA
                check_vma=False,  # the merged accumulators are alike on all devices
            )
        accumulators, outputs = share(everybodys, dealt)
        outputs = trees.take_rows(outputs, slots)

    states, rejected, (values, masks, weights) = outputs
    fields = {name: streaming[name].finish(accumulators[name]) for name in streaming}
    for name, aggregator in gathering.items():
        fields[name] = aggregator.reduce(values[name], masks, weights)
    outcome = Outcome(fields=fields, states=states, rejected=rejected)
    # Else XLA may leave the clients' states where they were computed; leaves that are shared out
    # along further axes go where the round's caller wants them.
    if mesh is not None and mesh.axis_names == (AXIS,):
        everywhere = NamedSharding(mesh, PartitionSpec())
        outcome = jax.lax.with_sharding_constraint(outcome, everywhere)
    return outcome


def _work(update, everybodys, row):
    """Let one client work: its message, its state, and whether they are not plausible."""
    key, broadcast, population = everybodys
    client_id, present, state = row
    data = client_data(population, client_id)
    # An absent client is seen as one without examples, so that it costs nothing.
    data = data._replace(size=jnp.where(present, data.size, jnp.zeros_like(data.size)))
    message, after = update(jax.random.fold_in(key, client_id), broadcast, state, data)
    weight = message.weight
    plausible = trees.all_below((message.fields, after), VALUE_LIMIT)
    plausible = plausible & (weight >= 0) & (weight <= WEIGHT_LIMIT)
    valid = present & plausible
    weight = jnp.where(valid, weight, jnp.zeros_like(weight))
    message = message._replace(weight=weight)  # aggregators add nothing of weight 0
    return message, trees.tree_where(valid, after, state), present & ~plausible


def _share_fn(work, streaming, gathering, like, chunk_size, num_devices):
    """Make the work of one device: ``(everybodys, rows) -> (accumulators, outputs by row)``."""

    def fold(accumulators, message):
        masks = message.fields.get("masks")
        return {
            name: each.add(accumulators[name], message.fields[name], masks, message.weight)
            for name, each in streaming.items()
        }

    def keep(message):
        kept = {name: message.fields[name] for name in gathering}
        return kept, message.fields.get("masks") if gathering else None, message.weight

    def share(everybodys, rows):
        def one_by_one(accumulators, row):
            message, state, rejected = work(everybodys, row)
            return fold(accumulators, message), (state, rejected, keep(message))

        def side_by_side(accumulators, chunk):
            messages, states, rejected = jax.vmap(work, in_axes=(None, 0))(everybodys, chunk)
            accumulators, _ = jax.lax.scan(
                lambda sums, message: (fold(sums, message), None),
                accumulators,
                messages,
                unroll=min(chunk_size, _FOLDED_AT_ONCE),
            )
            return accumulators, (states, rejected, keep(messages))

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        accumulators = {name: each.init(zeros[name]) for name, each in streaming.items()}
        if chunk_size == 1:
            accumulators, outputs = jax.lax.scan(one_by_one, accumulators, rows)
        else:
            chunks = jax.tree.map(lambda leaf: _split(leaf, chunk_size), rows)
            accumulators, outputs = jax.lax.scan(side_by_side, accumulators, chunks)
            outputs = jax.tree.map(lambda leaf: _join(leaf, rows[0].shape[0]), outputs)
        if num_devices > 1:
            accumulators = _merge(accumulators, streaming, num_devices)
        return accumulators, outputs

    return share


def deal(sizes: np.ndarray, *, num_devices: int, num_slots: int) -> np.ndarray:
    """Share clients out on the host as a round does that has everybody's examples.

    Args:
      sizes: ``[C']`` integers, examples of a cohort's clients that have any, in its order.
      num_devices: to share them out to.
      num_slots: clients at most that a device is given.

    Returns:
      For each client its device, ``[C']`` int64.
    """
    loads = [(np.float32(0.0), device) for device in range(num_devices)]  # the least first
    taken = [0] * num_devices
    devices = np.zeros(len(sizes), np.int64)
    for place in np.argsort(-sizes, kind="stable").tolist():
        load, device = heapq.heappop(loads)
        devices[place] = device
        taken[device] += 1
        if taken[device] < num_slots:
            heapq.heappush(loads, (load + np.float32(sizes[place]), device))
    return devices


def _deal(
    sizes: jax.Array, num_devices: int, num_slots: int, where: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Share clients out: the largest first, each to the device with the fewest examples so far.

    A client that has examples goes to the device that `where` says, ``[C]`` int32, if it is given.

    Returns:
      The place in the cohort of the client in each slot, ``[devices * slots]``, the cohort's size
      where a slot is empty; and the slot of each client of the cohort, ``[C]``. A device's clients
      come in order of size, so that a chunk holds clients of like size.
    """
    size = sizes.shape[0]
    order = jnp.argsort(-sizes, stable=True).astype(jnp.int32)
    if num_devices == 1:
        return order, jnp.zeros_like(order).at[order].set(jnp.arange(size, dtype=jnp.int32))

    def place(carry, client):
        load, taken = carry
        examples, at = client
        device = jnp.argmin(jnp.where(taken < num_slots, load, jnp.inf))
        device = device if at is None else jnp.where(examples > 0, at, device)
        slot = device.astype(jnp.int32) * num_slots + taken[device]
        return (load.at[device].add(examples), taken.at[device].add(1)), slot

    empty = (jnp.zeros(num_devices, jnp.float32), jnp.zeros(num_devices, jnp.int32))
    sorted_out = sizes[order].astype(jnp.float32), None if where is None else where[order]
    _, slots = jax.lax.scan(place, empty, sorted_out)
    clients = jnp.full(num_devices * num_slots, size, jnp.int32).at[slots].set(order)
    return clients, jnp.zeros_like(order).at[order].set(slots)


def _part_of(population: Population, client_ids: jax.Array, num_parts: int) -> jax.Array:
    """Look up in which part the examples of clients are, ``[C]`` int32; of none it may be any."""
    size = jax.tree.leaves(population.examples)[0].shape[0] // num_parts
    return population.order[population.offsets[client_ids]] // size


def _part(population: Population, num_parts: int) -> Population:
    """Give the shapes of what one device has of a population; all of it is given back as it is."""
    if num_parts == 1:
        return population

    def part(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct((leaf.shape[0] // num_parts, *leaf.shape[1:]), leaf.dtype)

    return population._replace(examples=jax.tree.map(part, population.examples))


def _with_part(share):
    """Let a device count the rows of the examples from the first one of its own part."""

    def share_fn(everybodys, rows):
        key, broadcast, population = everybodys
        size = jax.tree.leaves(population.examples)[0].shape[0]
        first = jax.lax.axis_index(AXIS) * size
        own = population._replace(order=population.order - first)
        return share((key, broadcast, own), rows)

    return share_fn


def _take_or_zero(leaf: jax.Array, rows: jax.Array) -> jax.Array:
    """Take rows; those that are not there are zeros: an absent client of id 0."""
    _refuse_keys(leaf)
    return leaf.at[rows].get(mode="fill", fill_value=0)


def _merge(accumulators, streaming, num_devices):
    """Merge all devices' accumulators; every device gets the same result, bit for bit."""

    def merge(first, second):
        return {name: streaming[name].merge(first[name], second[name]) for name in streaming}

    if num_devices & (num_devices - 1) == 0:
        # Pairs at growing distance: both partners compute the same, since merging commutes.
        distance = 1
        while distance < num_devices:
            pairs = [(device, device ^ distance) for device in range(num_devices)]
            accumulators = merge(accumulators, jax.lax.ppermute(accumulators, AXIS, pairs))
            distance *= 2
        return accumulators
    gathered = jax.lax.all_gather(accumulators, AXIS)
    return functools.reduce(
        merge, (trees.take_rows(gathered, jnp.int32(i)) for i in range(num_devices))
    )


def _sort(aggregators, fields, *, is_wide):
    """Split the aggregators in use by kind, and see that every field has one."""
    missing = sorted(set(fields) - set(aggregators) - {"masks"})
    if missing:
        raise ValueError(
            f"the clients' messages have fields without an aggregator: {', '.join(missing)}; "
            f"there are aggregators for {', '.join(sorted(aggregators))}."
        )
    used = {name: aggregators[name] for name in sorted(fields) if name in aggregators}
    streaming = {
        name: each.wide() if is_wide and each.wide is not None else each
        for name, each in used.items()
        if isinstance(each, Aggregator)
    }
    gathering = {n: a for n, a in used.items() if isinstance(a, CohortAggregator)}
    return streaming, gathering


def _split(leaf, chunk_size):
    """Reshape ``[C, ...]`` to chunks, filling the last one with zeros: absent clients of id 0."""
    filling = -leaf.shape[0] % chunk_size
    padded = jnp.concatenate([leaf, jnp.zeros((filling, *leaf.shape[1:]), leaf.dtype)])
    return padded.reshape(padded.shape[0] // chunk_size, chunk_size, *leaf.shape[1:])


def _join(leaf, size):
    """Undo `_split`."""
    return leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])[:size]


def _refuse_keys(leaf):
    """See that a client's state can be filled up with zeros."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError("a client's state must not hold a key: keys are derived from its id.")
