"""Networks and examples: what clients train, and what they train on."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune.types.aliases import Examples, Key, Metrics, Params, State


class Batch(NamedTuple):
    """Examples of one local step.

    Attributes:
      inputs: ``[B, ...]``.
      labels: ``[B]`` integer classes; ``[B, T]`` for one at each position of a sequence, negative
        where there is none; ``[B]`` or ``[B, K]`` float32 targets of a regression.
      weights: ``[B]`` float32; 0 marks filling of a client's last batch, which counts for nothing.
    """

    inputs: Any
    labels: Any
    weights: jax.Array


class Model(NamedTuple):
    """A network as three pure functions.

    Attributes:
      init: ``key -> (params, state)``; `state` is not trained (BatchNorm statistics), or ``{}``.
      loss: ``(params, state, batch, key) -> (loss, (state, metrics))``: the weighted mean over the
        batch's labels in training mode; metrics is a dict of accumulators, ``loss`` among them.
      predict: ``(params, state, inputs [B, ...]) -> logits [B, (T,) classes]`` in inference mode.
      inspect: ``(params, state, inputs [B, ...], counts [B] bool) -> metrics``: what gates let
        through in a prediction, over the examples that count; None without gates.
      head: what the output is for; None where the loss is the model's own.
      with_head: ``head -> Model``, the same network for another task; None likewise.
    """

    init: Callable[[Key], tuple[Params, State]]
    loss: Callable[[Params, State, Batch, Key], tuple[jax.Array, tuple[State, Metrics]]]
    predict: Callable[[Params, State, Any], jax.Array]
    inspect: Callable[[Params, State, Any, jax.Array], Metrics] | None = None
    head: Any = None
    with_head: Callable[[Any], "Model"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Whole:
    """What a round knows of all clients where it is given the examples of some.

    Attributes:
      num_examples: ``[]`` float32, examples of all clients.
      is_wide: whether these are so many that sums of arrays keep what rounding takes; static.
      num_parts: equal parts that the examples' arrays are divided into, one for each device of a
        mesh, which has its part alone; 1 where every device has all of them. The examples of a
        client are all in one part, and the device that has it trains the client; static.
      most_clients: clients of a cohort at most whose examples are in one part; static.
    """

    num_examples: jax.Array
    is_wide: bool = dataclasses.field(metadata={"static": True})
    num_parts: int = dataclasses.field(default=1, metadata={"static": True})
    most_clients: int = dataclasses.field(default=0, metadata={"static": True})


class Population(NamedTuple):
    """The examples of all clients, stored once, as compressed rows: no client is padded.

    Client `i` holds ``examples[order[offsets[i]:offsets[i + 1]]]``. A round may be given the
    examples of its cohort alone: all others are then of size 0, and `whole` says what is left out.

    Attributes:
      examples: tree of ``[E, ...]``, as stored (images uint8).
      order: ``[sum of sizes]`` int32, rows of the examples, grouped by client.
      offsets: ``[N + 1]`` int32.
      held: tree of ``[S, ...]`` like `examples`, those that the server holds; ``()`` for none.
      whole: of all clients, where some are left out; else ``()``.
    """

    examples: Examples
    order: jax.Array
    offsets: jax.Array
    held: Examples = ()
    whole: Whole | tuple[()] = ()


def count_examples(population: Population) -> jax.Array:
    """Count the examples of all clients, ``[]`` float32, those that are left out included."""
    if isinstance(population.whole, Whole):
        return population.whole.num_examples
    return population.offsets[-1].astype(jnp.float32)


class ClientData(NamedTuple):
    """What one client sees of the population: its own `size` entries of `order` from `start`.

    Attributes:
      examples, order: of the population, shared by all clients.
      start, size: ``[]`` int32.
      client_id: ``[]`` int32, which decides the client's own draws; the server's is ``N``.
    """

    examples: Examples
    order: jax.Array
    start: jax.Array
    size: jax.Array
    client_id: jax.Array


def client_data(population: Population, client_id: jax.Array) -> ClientData:
    """Look up what client `client_id` ``[]`` holds; nothing is copied."""
    start, end = population.offsets[client_id], population.offsets[client_id + 1]
    return ClientData(population.examples, population.order, start, end - start, client_id)


class Batcher(NamedTuple):
    """How a client's examples become local steps.

    Attributes:
      num_steps: ``data -> [] int32``, dynamic: it depends on the client's size.
      batch: ``(key, data, step []) -> Batch``; the same key for all steps of a round.
    """

    num_steps: Callable[[ClientData], jax.Array]
    batch: Callable[[Key, ClientData, jax.Array], Batch]
