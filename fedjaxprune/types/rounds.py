"""Rounds: their state, their metrics, and the stages of a method."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from fedjaxprune.traffic import Payload, PublishedBits, Sent
from fedjaxprune.types.aliases import Key, Masks, Metrics, Params, PrunableFn, State
from fedjaxprune.types.data import Population


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
      downlink: state of the downlink: what clients saw last, or ``()``.
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
    downlink: State = ()


class ClientState(NamedTuple):
    """What the simulator keeps for one client.

    Attributes:
      client: the client's own state.
      uplink: the uplink's state (a residual, for instance).
      masks_held: ``[]`` int32, `masks_id` of the masks that it received last.
      held: by name, ``[]`` int32, the version of what else it received last and keeps; 0: nothing.
        What a client was sent in a round that it dropped out of does not count, as in `masks_held`.
    """

    client: State
    uplink: State
    masks_held: jax.Array
    held: Mapping[str, jax.Array] = {}


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
ReadRule = tuple[int, ...] | Literal["everyone"]  # ids of clients


class Stage(NamedTuple):
    """A run of alike rounds.

    Attributes:
      name: shown in the record.
      num_rounds: how many.
      round: ``(key, state, cohort, population) -> (state, rows [C, ...], metrics)``, traced once.
      cohort: who is asked.
      reads: whose examples the round uses besides those of its cohort and of the server; others may
        be left out of the population that it is given. Where they are, a stage that reads nobody
        can give its population to `federated.cohort.run` alone.
    """

    name: str
    num_rounds: int
    round: RoundFn
    cohort: CohortRule = "sampled"
    reads: ReadRule = ()


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
      has_fixed_masks: whether the last stage trains under masks of the stages before, and keeps
        them.
      shaped_payload: of the uplink, hashable, too; None: `payload` counts.
      downlink_payload: of the downlink, as `payload` of the uplink.
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
    shaped_payload: Callable[[int, tuple[int, ...]], Payload] | None = None
    downlink_payload: Callable[[int], Payload] = Payload
