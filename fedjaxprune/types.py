"""The vocabulary: type aliases and the protocol tuples that the rest of the package uses.

Letters in shapes: ``N`` population, ``C`` cohort, ``E`` examples of all, ``B`` batch, ``L`` leaves
of the parameters, ``T`` models. Tuples of functions are components, tuples of arrays state or data.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from fedjaxprune.traffic import Payload, PublishedBits, Send, Sent

Key = jax.Array  # a typed key, as jax.random.key makes it
Params = Any  # tree of float arrays
Masks = Any  # the tree of the parameters, every leaf bool; True means kept
Delta = Any  # local minus broadcast parameters
State = Any  # a component's own tree of arrays
Metrics = Any  # tree of metrics accumulators
Examples = Any  # tree of arrays [E, ...]

Schedule = Callable[[jax.Array], jax.Array]  # round [] -> value []; optax schedules fit
PrunableFn = Callable[[str, jax.Array], bool]  # (path "a/b/kernel", leaf) -> may it be pruned?


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


class Population(NamedTuple):
    """The examples of all clients, stored once, as compressed rows: no client is padded.

    Client `i` holds ``examples[order[offsets[i]:offsets[i + 1]]]``.

    Attributes:
      examples: tree of ``[E, ...]``, as stored (images uint8).
      order: ``[sum of sizes]`` int32, rows of the examples, grouped by client.
      offsets: ``[N + 1]`` int32.
    """

    examples: Examples
    order: jax.Array
    offsets: jax.Array


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
    """

    init: Callable[[Params], State]
    update: Callable[[Key, Delta, State, Masks], tuple[Delta, State]]
    payload: Callable[[int], Payload]


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
      beside: joins statistics and gradients, if its numbers are for deltas alone; None: itself.
    """

    reduce: Callable[[Any, Masks | None, jax.Array], Any]
    beside: "CohortAggregator | None" = None


class FieldSpec(NamedTuple):
    """How one field of the clients' messages travels, and what becomes of it.

    Attributes:
      aggregate: joins the clients' values; None takes the protocol's for `delta`, the sum for
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


class PrunerInputs(NamedTuple):
    """What a pruner may look at.

    Attributes:
      params: parameters to be ranked.
      grads: mean dense gradient over the cohort, or None if the clients report none.
      round: ``[]`` int32.
      statistics: trees of the parameters, by name: `FieldSpec.read` or joined, `to_pruner`; or ().
    """

    params: Params
    grads: Params | None
    round: jax.Array
    statistics: Any = ()


class Pruner(NamedTuple):
    """Masks to masks; the mask flows through as an update flows through optax.

    Attributes:
      init: ``params -> state``.
      update: ``(key, masks, state, inputs) -> (masks, state)``.
    """

    init: Callable[[Params], State]
    update: Callable[[Key, Masks, State, PrunerInputs], tuple[Masks, State]]


class Cohort(NamedTuple):
    """Who takes part in a round, and what they remember.

    Attributes:
      client_ids: ``[C]`` int32, distinct where present.
      participated: ``[C]`` bool; False for a client that dropped out after the broadcast, and for
        filling, whose id is below 0 or that of another slot.
      states: tree of ``[C, ...]``, the clients' own rows.
    """

    client_ids: jax.Array
    participated: jax.Array
    states: State


class RoundState(NamedTuple):
    """All that the next round needs, besides the clients' rows.

    Attributes:
      round: ``[]`` int32, rounds completed.
      params: global parameters.
      masks: masks in force.
      masks_id: ``[]`` int32, 0 for the all-True masks of the start; grows whenever they change.
      model_state: what is not trained.
      server: state of the server's optimizer.
      pruner: state of the pruner.
      correction: the server's part of a correction of client drift (control variates), or ``()``.
      method: what the method's stages hand on to one another (candidates), or ``()``.
    """

    round: jax.Array
    params: Params
    masks: Masks
    masks_id: jax.Array
    model_state: State
    server: State
    pruner: State
    correction: State = ()
    method: State = ()


class ClientState(NamedTuple):
    """What the simulator keeps for one client.

    Attributes:
      client: the client's own state.
      uplink: the uplink's state (a residual, for instance).
      masks_held: ``[]`` int32, `masks_id` of the masks that it received last.
    """

    client: State
    uplink: State
    masks_held: jax.Array


class RoundMetrics(NamedTuple):
    """Metrics of a round; counts are of elements, never of bits.

    Attributes:
      train: merged accumulators of the clients' training metrics (at least ``loss``).
      num_live: ``[L]`` int32, live entries per leaf after the round.
      num_changed: ``[]`` int32, mask entries that the round flipped.
      num_downloaded: ``[C, T, L]`` int32, entries per leaf of the `T` models that each received.
      num_uploaded: ``[C, L]`` int32, entries per leaf that each present client could send.
      participated, num_participating: ``[C]`` bool and ``[]`` int32, who took part.
      num_rejected: ``[]`` int32, of those, clients whose message or round was dropped.
      sent: the messages, as the ledger needs them.
    """

    train: Metrics
    num_live: jax.Array
    num_changed: jax.Array
    num_downloaded: jax.Array
    num_uploaded: jax.Array
    participated: jax.Array
    num_participating: jax.Array
    num_rejected: jax.Array
    sent: Sent


_Result = tuple[RoundState, ClientState, RoundMetrics]
RoundFn = Callable[[Key, RoundState, Cohort, Population], _Result]
FormulaFn = Callable[[RoundMetrics, RoundState], PublishedBits]  # on the host, of shapes of a state
# A new sample in each round, the same in all, every client, the same without drop-outs, or so many.
CohortRule = Literal["sampled", "same", "everyone", "population"] | int


class Stage(NamedTuple):
    """A run of alike rounds.

    Attributes:
      name: shown in the record.
      num_rounds: how many.
      round: ``(key, state, cohort, population) -> (state, rows [C, ...], metrics)``, traced once.
      cohort: who is asked.
    """

    name: str
    num_rounds: int
    round: RoundFn
    cohort: CohortRule = "sampled"


class Algorithm(NamedTuple):
    """A federated pruning method.

    Attributes:
      init: ``(params, model_state) -> RoundState``.
      init_client: ``params -> ClientState`` of a client that has never taken part.
      stages: in order; they share one `RoundState`.
      deployed_params: ``state -> params`` to be evaluated; pruned entries are exact zeros.
      prunable: the leaves whose masks travel.
      payload: of the uplink, from which the ledger knows the length of a delta; hashable.
      published: by name, what papers charge for a round.
      diagnostics: ``metrics -> dict`` on the host, what the method itself puts on record.
      notes: sentences about this run that the user should read before it starts.
      counted: the leaves whose sparsity is on record; None: those that are prunable.
      has_fixed_masks: whether the last stage trains plainly under masks of the stages before.
    """

    init: Callable[[Params, State], RoundState]
    init_client: Callable[[Params], ClientState]
    stages: tuple[Stage, ...]
    deployed_params: Callable[[RoundState], Params]
    prunable: PrunableFn
    payload: Callable[[int], Payload]
    published: Mapping[str, FormulaFn] = {}
    diagnostics: Callable[[RoundMetrics], dict[str, Any]] = lambda metrics: {}
    notes: tuple[str, ...] = ()
    counted: PrunableFn | None = None
    has_fixed_masks: bool = False
