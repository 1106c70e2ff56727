"""What travels between server and clients, and how many messages become one."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from fedjaxprune.traffic import Payload, Send
from fedjaxprune.types.aliases import Delta, Key, Masks, Params, State
from fedjaxprune.types.data import ClientData, Population


class Broadcast(NamedTuple):
    """What a client starts a round from.

    Attributes:
      params: global parameters.
      masks: the masks to train under.
      model_state: what is not trained (BatchNorm statistics).
      round: ``[]`` int32.
      correction_state: `RoundState.correction`.
      correction: added to the gradient of every local step, or ``()``; the tree of the parameters.
      announced: what the method tells every client besides the model, by name, or ``()``.
    """

    params: Params
    masks: Masks
    model_state: State
    round: jax.Array
    correction_state: State = ()
    correction: Params = ()
    announced: Any = ()


class Message(NamedTuple):
    """What one client sends up.

    Attributes:
      fields: named trees, each with its aggregator; `masks` are personal, for those that need them.
      weight: ``[]`` float32, usually the number of examples; 0 counts for nothing.
    """

    fields: Mapping[str, Any]
    weight: jax.Array


class Client(NamedTuple):
    """One client's local work, written without a client axis.

    Attributes:
      init: ``params -> state``, the state of a client that has never taken part.
      update: ``(key, broadcast, state, data) -> (message, state)``.
    """

    init: Callable[[Params], State]
    update: Callable[[Key, Broadcast, State, ClientData], tuple[Message, State]]


class Uplink(NamedTuple):
    """What a delta looks like after the wire.

    Attributes:
      init: ``params -> state`` of one client.
      update: ``(key, delta, state, masks) -> (delta, state)``; outside `masks` all is zero.
      payload: ``num_kept -> Payload``, in Python integers: what is sent of so many entries.
      shaped_payload: ``(num_kept, shape) -> Payload``, where that depends on the leaf's shape, too;
        it goes before `payload`. None: it does not.
    """

    init: Callable[[Params], State]
    update: Callable[[Key, Delta, State, Masks], tuple[Delta, State]]
    payload: Callable[[int], Payload]
    shaped_payload: Callable[[int, tuple[int, ...]], Payload] | None = None


class Downlink(NamedTuple):
    """What the clients of a round see of the parameters, and what of it is sent.

    All clients of a round see the same. It is the server's business alone: the server's parameters
    stay as they are, and deltas are relative to what the clients saw.

    Attributes:
      init: ``params -> state`` of the server.
      update: ``(key, params, state, masks) -> (seen, state)``; outside `masks`, the entries that
        clients receive, all is zero.
      payload: ``num_kept -> Payload``, in Python integers: what is sent of so many entries, where
        all are sent; entries that are `due` are sent as they are, with their positions.
      version: ``state -> [] int32``, the number of what the clients of the round before saw, 0
        where there was none; None: each client is sent all entries in every round.
      due: ``(state, held []) -> masks`` of the entries that a client has to be sent in a round that
        leaves this state if it last saw version `held`, or nothing (0); with `version`.
      restart: ``state -> state`` from which the next round sends everything to everybody, as the
        first one did, and counts on from there; None: each round does.
    """

    init: Callable[[Params], State]
    update: Callable[[Key, Params, State, Masks], tuple[Params, State]]
    payload: Callable[[int], Payload]
    version: Callable[[State], jax.Array] | None = None
    due: Callable[[State, jax.Array], Masks] | None = None
    restart: Callable[[State], State] | None = None


class Aggregator(NamedTuple):
    """Many messages to one, as a monoid, so that a cohort of any size streams through it.

    Attributes:
      init: ``like -> accumulator``, the zero, from one client's value.
      add: ``(accumulator, value, masks or None, weight) -> accumulator``; weight 0 adds nothing.
      merge: ``(accumulator, accumulator) -> accumulator``, associative and commutative.
      finish: ``accumulator -> value``.
      wide: ``() -> Aggregator``, the same for 2²⁴ examples and more; None: itself.
    """

    init: Callable[[Any], Any]
    add: Callable[[Any, Any, Masks | None, jax.Array], Any]
    merge: Callable[[Any, Any], Any]
    finish: Callable[[Any], Any]
    wide: "Callable[[], Aggregator] | None" = None


class CohortAggregator(NamedTuple):
    """Many messages to one where all are needed at once: memory grows with the cohort.

    Attributes:
      reduce: ``(values [C, ...], masks [C, ...] or None, weights [C]) -> value``; 0: absent.
      beside: combines statistics and gradients, if its numbers are for deltas alone; None: itself.
      note: ``C -> sentence`` that the user should read of cohorts of this size; empty: none.
    """

    reduce: Callable[[Any, Masks | None, jax.Array], Any]
    beside: "CohortAggregator | None" = None
    note: Callable[[int], str] = lambda num_clients: ""


class FieldSpec(NamedTuple):
    """How one field of the clients' messages travels, and what becomes of it.

    Attributes:
      aggregate: combines the clients' values; None takes the protocol's for `delta`, the sum for
        `metrics`, all values ``[C, ...]`` of a report, which is not sent, else `protocol.joining`.
      send: how it travels (`traffic.Send`); a field of zeros alone does not travel.
      read: ``(delta, broadcast) -> tree of the parameters``, what the server reads off each delta,
        in the place of a sent field, free of charge; the pruner sees it in ``inputs.statistics``.
      is_sum: whether the server needs the mean times the sum of the weights; with `aggregate` None.
      travels: ``(path, leaf) -> bool``, leaves of a ``"whole"`` field that are sent (None: all).
      to_pruner: whether the pruner sees the joined field, a tree of the parameters, as statistics.
    """

    aggregate: Aggregator | CohortAggregator | None = None
    send: Send = "whole"
    read: Callable[[Delta, Broadcast], Params] | None = None
    is_sum: bool = False
    travels: Callable[[str, Any], bool] | None = None
    to_pruner: bool = False


class Correction(NamedTuple):
    """A correction of client drift that goes around any local client, under any masks.

    Attributes:
      init: ``params -> state``, the server's part: () or the tree of the parameters, of which every
        client receives the entries that it trains, as ``broadcast.correction_state``.
      wrap: ``client -> client``.
      update: ``(aggregated fields, state, population) -> (delta, state)``, where a message arrived.
      fields: of the wrapped client's message.
    """

    init: Callable[[Params], State]
    wrap: Callable[[Client], Client]
    update: Callable[[Mapping[str, Any], State, Population], tuple[Delta, State]]
    fields: Mapping[str, FieldSpec]
