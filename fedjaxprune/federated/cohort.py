"""The machine room: maps one client over a cohort, in chunks, and reduces as it goes.

The only file that knows how a cohort is mapped. Chunks of clients run side by side under ``vmap``,
chunks follow each other in a ``scan``, and every message is folded into the accumulators as soon as
it is there: memory holds one chunk, never the cohort. The fold runs in the cohort's order whatever
the chunk size, so that chunk sizes differ only by what ``vmap`` does to a client's own rounding.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import trees
from fedjaxprune.base import (
    Aggregator,
    Broadcast,
    ClientData,
    Cohort,
    CohortAggregator,
    Key,
    Message,
    Population,
    State,
    client_data,
)

ClientUpdate = Callable[[Key, Broadcast, State, ClientData], tuple[Message, State]]


class Outcome(NamedTuple):
    """What a cohort comes to.

    Attributes:
      fields: the messages' fields, aggregated, by name.
      states: tree of ``[C, ...]``; absent and rejected clients keep the rows they had.
      rejected: ``[C]`` bool, clients left out because what they computed was not finite.
    """

    fields: dict[str, Any]
    states: State
    rejected: jax.Array


def run(
    key: Key,
    update: ClientUpdate,
    aggregators: Mapping[str, Aggregator | CohortAggregator],
    broadcast: Broadcast,
    cohort: Cohort,
    population: Population,
    *,
    chunk_size: int,
) -> Outcome:
    """Let every client of a cohort work, and aggregate what they say.

    A client's key is folded from its id, so its place in the cohort does not matter. A message or a
    state that is not finite is left out: it counts for nothing and the client's row stays.

    Args:
      key: the round's key for its clients.
      update: one client's work, ``(key, broadcast, state, data) -> (message, state)``.
      aggregators: by field of the message; `masks` need none.
      broadcast: what every client starts from.
      cohort: who takes part; `states` holds what `update` takes and returns, by row ``[C, ...]``.
      population: everybody's examples.
      chunk_size: clients under one ``vmap``; 1 runs them one by one, without ``vmap``.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    size = cohort.client_ids.shape[0]
    chunk_size = min(chunk_size, size)

    def one_client(client_id, present, state):
        data = client_data(population, client_id)
        # An absent client is seen as one without examples, so that it costs nothing.
        data = data._replace(size=jnp.where(present, data.size, jnp.zeros_like(data.size)))
        message, after = update(jax.random.fold_in(key, client_id), broadcast, state, data)
        finite = trees.all_finite((message, after))
        valid = present & finite
        weight = jnp.where(valid, message.weight, jnp.zeros_like(message.weight))
        message = message._replace(weight=weight)  # aggregators add nothing of weight 0
        return message, trees.select(valid, after, state), present & ~finite

    rows = (cohort.client_ids, cohort.present, cohort.states)
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), rows)
    shapes, _, _ = jax.eval_shape(one_client, *first)
    streaming, gathering = _sort(aggregators, shapes.fields)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    accumulators = {name: streaming[name].init(zeros.fields[name]) for name in streaming}
    needs_masks = bool(gathering) and "masks" in shapes.fields

    def fold(accumulators, message):
        masks = message.fields.get("masks")
        return {
            name: streaming[name].add(
                accumulators[name], message.fields[name], masks, message.weight
            )
            for name in streaming
        }

    def keep(message):
        kept = {name: message.fields[name] for name in gathering}
        return kept, message.fields["masks"] if needs_masks else (), message.weight

    def one_by_one(accumulators, row):
        message, state, rejected = one_client(*row)
        return fold(accumulators, message), (state, rejected, keep(message))

    def side_by_side(accumulators, chunk):
        messages, states, rejected = jax.vmap(one_client)(*chunk)
        accumulators, _ = jax.lax.scan(
            lambda sums, message: (fold(sums, message), None), accumulators, messages
        )
        return accumulators, (states, rejected, keep(messages))

    if chunk_size == 1:
        accumulators, outputs = jax.lax.scan(one_by_one, accumulators, rows)
    else:
        chunks = jax.tree.map(lambda leaf: _split(leaf, chunk_size), rows)
        accumulators, outputs = jax.lax.scan(side_by_side, accumulators, chunks)
        outputs = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:size], outputs)

    states, rejected, (values, masks, weights) = outputs
    fields = {name: streaming[name].finish(accumulators[name]) for name in streaming}
    for name, aggregator in gathering.items():
        fields[name] = aggregator.reduce(values[name], masks if needs_masks else None, weights)
    return Outcome(fields=fields, states=states, rejected=rejected)


def _sort(aggregators, fields):
    """Split the aggregators in use by kind, and see that every field has one."""
    missing = sorted(set(fields) - set(aggregators) - {"masks"})
    if missing:
        raise ValueError(
            f"the clients' messages have fields without an aggregator: {', '.join(missing)}; "
            f"there are aggregators for {', '.join(sorted(aggregators))}."
        )
    used = {name: aggregators[name] for name in sorted(fields) if name in aggregators}
    streaming = {n: a for n, a in used.items() if isinstance(a, Aggregator)}
    gathering = {n: a for n, a in used.items() if isinstance(a, CohortAggregator)}
    return streaming, gathering


def _split(leaf, chunk_size):
    """Reshape ``[C, ...]`` to chunks, filling the last one with zeros: absent clients of id 0."""
    filling = -leaf.shape[0] % chunk_size
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError("a client's state must not hold a key: keys are derived from its id.")
    padded = jnp.concatenate([leaf, jnp.zeros((filling, *leaf.shape[1:]), leaf.dtype)])
    return padded.reshape(-1, chunk_size, *leaf.shape[1:])
