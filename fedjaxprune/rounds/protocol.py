"""What a training round is made of: the protocol that methods share, and rules that they set."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjaxprune import live_weights, trees
from fedjaxprune import masks as masks_lib
from fedjaxprune.federated import aggregators
from fedjaxprune.federated.aggregators import ServerAggregator
from fedjaxprune.federated.attacks import Attackers
from fedjaxprune.federated.corrections import fednova
from fedjaxprune.traffic import FieldLength
from fedjaxprune.types import (
    Aggregator,
    Batcher,
    Broadcast,
    Cohort,
    CohortAggregator,
    Correction,
    Delta,
    Downlink,
    FieldSpec,
    Key,
    Masks,
    Population,
    RoundMetrics,
    RoundState,
    Schedule,
    State,
    Uplink,
)

__all__ = [
    "AfterRound",
    "Announcement",
    "ConcludeFn",
    "Correction",
    "FieldSpec",
    "Given",
    "Hooks",
    "MaskTransport",
    "Masking",
    "Protocol",
    "add_reports",
    "broadcast_of",
    "check",
    "joining",
    "no_correction",
    "weigh",
]


class Protocol(NamedTuple):
    """What every method shares: one protocol under which methods can be compared.

    Attributes:
      num_rounds: rounds of the run; schedules stretch over them.
      batcher: how a client's examples become local steps.
      optimizer: local optimizer, an optax transformation (`local_training.local_sgd`).
      learning_rate_scale: factor on local updates, by round (an optax schedule fits).
      uplink: what a delta looks like after the wire; None sends it as it is.
      aggregator: of the deltas; None takes the weighted mean. A `CohortAggregator` bounds what a
        few wrong clients can do, so statistics and gradients go through it as well.
      server: the server's optimizer, an optax transformation (see `server_optimizers`); None takes
        the aggregated delta as it is.
      chunk_size: clients that run side by side; changes nothing but speed and memory.
      mesh: devices that share the cohort (`cohort.make_mesh`); changes nothing but speed and
        memory. None uses one device.
      correction: of client drift (SCAFFOLD, FedNova); None trains and averages plainly.
      attackers: hostile clients, in training rounds; None: all are honest.
      clip: largest Euclidean norm of a delta, as it arrives; a longer one is shortened to it.
      max_weight: what a client counts for at most, in examples.
      downlink: what clients see of the parameters; None: all, as they are.
    """

    num_rounds: int
    batcher: Batcher
    optimizer: optax.GradientTransformation
    learning_rate_scale: Schedule | None = None
    uplink: Uplink | None = None
    aggregator: Aggregator | CohortAggregator | ServerAggregator | None = None
    server: optax.GradientTransformation | None = None
    chunk_size: int = 1
    mesh: jax.sharding.Mesh | None = None
    correction: Correction | None = None
    attackers: Attackers | None = None
    clip: float | None = None
    max_weight: float | None = None
    downlink: Downlink | None = None


class MaskTransport(NamedTuple):
    """How the masks in force reach the clients; a client that holds them is sent none.

    Attributes:
      encode: ``state -> FieldLength`` of the field `masks`, in a message of that name. None sends
        the prunable leaves in the shortest coding, which the ledger finds out on the host.
      is_needed: ``state -> [] bool``, whether there is anything to say; None always sends them.
      choose: ``(state, masks_held [C]) -> FieldLength`` of the field `chosen`, which goes with the
        parameters and says which of several masks are in force; its `clients` are those that hold
        all of these and need nothing else. None: there is no such client.
      charged: ``"never"`` if clients can make the masks themselves, as from the run's seed and
        their ids; ``"always"`` if they keep none from round to round.
    """

    encode: Callable[[RoundState], FieldLength] | None = None
    is_needed: Callable[[RoundState], jax.Array] | None = None
    choose: Callable[[RoundState, jax.Array], FieldLength] | None = None
    charged: Literal["never", "changed", "always"] = "changed"

    def receivers(self, state: RoundState, masks_held: jax.Array) -> jax.Array:
        """Mark the clients that have to be sent the masks, ``[C]``, by what each holds."""
        if self.charged == "changed":
            missing = masks_held != state.masks_id
        else:
            missing = jnp.full(masks_held.shape, self.charged == "always")
        return missing if self.is_needed is None else missing & self.is_needed(state)


class Masking(NamedTuple):
    """Which masks rule where; by default the masks in force, everywhere.

    Attributes:
      train: ``(key, state) -> masks`` that the clients train under.
      upload: ``state -> masks`` of the entries that a client sends.
      download: ``state -> masks`` of the entries that a client receives.
      server_is_dense: whether the server keeps the values of pruned entries. It broadcasts those
        that `download` says, and what it deploys is under the masks in force.
      upload_masks: ``(fields, masks) -> masks by field``, what one client sends of its `delta` and
        other fields, where that follows from its own bits and the masks that it was given. What
        does not travel counts as zero; a ``protocol.aggregator`` that counts holders sees who sent
        an entry.
      transport: how the masks travel.
      of_client: ``(broadcast, client_id [], state) -> masks``, the sub-model of one client: of what
        all train, receive and send, the entries that this one does; None: all. Client and server
        both know them, by its id, the round and its own state, so they never travel. A delta is
        averaged over the clients that hold an entry.
      absent: what an entry counts as that a client does not send: a weight that is ``"unchanged"``,
        or one that the client has made ``"zero"``. An aggregator that counts holders sees neither.
    """

    train: Callable[[Key, RoundState], Masks] | None = None
    upload: Callable[[RoundState], Masks] | None = None
    download: Callable[[RoundState], Masks] | None = None
    server_is_dense: bool = False
    upload_masks: Callable[[Mapping[str, Any], Masks], Mapping[str, Masks]] | None = None
    transport: MaskTransport = MaskTransport()
    of_client: Callable[[Broadcast, jax.Array, State], Masks] | None = None
    absent: Literal["unchanged", "zero"] = "unchanged"

    def with_absent(self, delta: Delta, sent: Masks, broadcast: Broadcast) -> Delta:
        """Fill in one client's delta what it did not send."""
        if self.absent == "unchanged":
            return delta
        return jax.tree.map(
            lambda change, mask, start: jnp.where(mask, change, jnp.zeros_like(change) - start),
            delta,
            sent,
            broadcast.params,
        )


class Given(NamedTuple):
    """What the clients of a round are given.

    Attributes:
      broadcast: where they start from.
      upload: masks of the entries that they send.
      download: masks of the entries that they received.
    """

    broadcast: Broadcast
    upload: Masks
    download: Masks


AfterRound = Callable[[RoundState, RoundState, RoundMetrics], tuple[RoundState, RoundMetrics]]
ConcludeFn = Callable[[Mapping[str, Any], RoundState, Population], Mapping[str, Any]]


class Announcement(NamedTuple):
    """What a method tells every client of a round besides the model.

    Attributes:
      fields: ``state -> {name: tree}``, which clients find as `Broadcast.announced`. Each is a
        field of the message that has the parameters: a tree of booleans travels in a coding of
        counts, any other whole.
      is_due: ``state -> [] bool``, the rounds in which it travels; else clients see zeros.
      versions: of fields that clients keep, ``state -> [] int32``, which is at least 1 and another
        number whenever the field is another one. In rounds that are due such a field travels to
        clients that hold another version; all others travel to everybody.
      derived: fields that clients can make themselves, as from the run's seed; they never travel.
    """

    fields: Callable[[RoundState], Mapping[str, Any]]
    is_due: Callable[[RoundState], jax.Array]
    versions: Mapping[str, Callable[[RoundState], jax.Array]] = {}
    derived: Collection[str] = ()

    def seen(self, state: RoundState) -> dict[str, Any]:
        """Give what the clients of a round see."""
        fields, due = dict(self.fields(state)), self.is_due(state)
        return trees.tree_where(due, fields, jax.tree.map(jnp.zeros_like, fields))

    def lengths(
        self, state: RoundState, seen: Mapping[str, Any], cohort: Cohort
    ) -> dict[str, FieldLength]:
        """Describe the fields of a round for the ledger, by what each client holds."""
        due = jnp.broadcast_to(self.is_due(state), cohort.client_ids.shape)

        def length(name: str, tree: Any) -> FieldLength:
            are_bits = all(leaf.dtype == jnp.bool_ for leaf in jax.tree.leaves(tree))
            counts = masks_lib.num_kept(tree) if are_bits else ()
            clients = due
            if name in self.versions:
                clients = due & (cohort.states.held[name] != self.versions[name](state))
            return FieldLength(trees.shape_only(tree), clients=clients, sent_counts=counts)

        return {name: length(name, tree) for name, tree in seen.items() if name not in self.derived}

    def versions_sent(self, state: RoundState) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Give the versions of the fields that clients keep, and whether they see them now."""
        return {name: (of(state), self.is_due(state)) for name, of in self.versions.items()}


class Hooks(NamedTuple):
    """What a method adds to every round of a stage.

    Attributes:
      before_round: ``state -> state`` that the round starts from.
      after_round: ``(before, after, metrics) -> (after, metrics)``; `before` is the state that came
        in, as it was before `before_round`.
      conclude: ``(aggregated fields, state, population) -> fields``, those that the server changes
        before it steps. Among the given ones is `traffic.NUM_EXAMPLES`, what the clients that were
        heard count for in all.
      announcement: what the server sends every client besides the model.
    """

    before_round: Callable[[RoundState], RoundState] | None = None
    after_round: AfterRound | None = None
    conclude: ConcludeFn | None = None
    announcement: Announcement | None = None


def broadcast_of(state: RoundState, *, masks: Masks | None = None) -> Broadcast:
    """Give clients the parameters, and the masks in force or others to train under."""
    masks = state.masks if masks is None else masks
    return under(masks, Broadcast(state.params, masks, state.model_state, state.round))


def under(masks: Masks, broadcast: Broadcast) -> Broadcast:
    """Replace the masks of a broadcast, and tell a network of them that normalizes live weights."""
    told = live_weights.with_masks(broadcast.model_state, masks)
    return broadcast._replace(masks=masks, model_state=told)


def joining(
    protocol: Protocol, *, by: Literal["examples", "clients", "sum"] = "examples"
) -> Aggregator | CohortAggregator:
    """Choose what combines a field beside the deltas: the user's robust aggregator, else a mean.

    Args:
      protocol: names the aggregator.
      by: whether a mean counts examples, or each client once; ``"sum"`` multiplies the mean by
        examples, or the robust aggregate, by the sum of the weights.
    """
    robust = protocol.aggregator
    if robust is None or isinstance(robust, Aggregator):
        means = {"examples": aggregators.weighted_mean, "clients": aggregators.unweighted_mean}
        return aggregators.weighted_sum() if by == "sum" else means[by]()
    if isinstance(robust, ServerAggregator):  # it judges what the server can compute itself
        robust = aggregators.median()
    elif robust.beside is not None:
        robust = robust.beside
    if by != "sum":
        return robust

    def reduce_fn(values, masks, weights):
        middle, total = robust.reduce(values, masks, weights), jnp.sum(weights)
        return jax.tree.map(lambda leaf: leaf * total.astype(leaf.dtype), middle)

    return CohortAggregator(reduce=reduce_fn)


def check(protocol: Protocol, masking: Masking) -> None:
    """Refuse a protocol with numbers that would stop training, or turn it round, in silence.

    Raises:
      ValueError: a bound is not a positive number, the chunk size no positive whole number, or
        what is not sent would count as zero among deltas that are divided by steps.
    """
    correction = protocol.correction
    if masking.absent == "zero" and correction is not None and fednova.STEPS in correction.fields:
        raise ValueError(
            "client.correction 'fednova' divides deltas by steps, so what a client does not send "
            "cannot count as zero in their mean, as it does here: take another correction."
        )
    for name in ("clip", "max_weight"):
        bound = getattr(protocol, name)
        if bound is not None and not (math.isfinite(bound) and bound > 0):
            raise ValueError(f"{name} must be a positive number, or None, got {bound}.")
    size = protocol.chunk_size
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise ValueError(f"chunk_size must be a whole number of at least 1, got {size!r}.")


def weigh(protocol: Protocol, weight: jax.Array) -> jax.Array:
    """Bound what a client counts for."""
    if protocol.max_weight is None:
        return weight
    return jnp.minimum(weight, jnp.asarray(protocol.max_weight, weight.dtype))


def add_reports(metrics: RoundMetrics, reports: Mapping[str, jax.Array]) -> RoundMetrics:
    """Put arrays that hold for all clients alike into the round's reports, as ``[C, ...]``."""
    num_slots = metrics.participated.shape[0]
    alike = {n: jnp.broadcast_to(x[None], (num_slots, *x.shape)) for n, x in reports.items()}
    sent = metrics.sent._replace(reports={**metrics.sent.reports, **alike})
    return metrics._replace(sent=sent)


def no_correction() -> Correction:
    """Train and average plainly."""
    return Correction(
        init=lambda params: (),
        wrap=lambda client: client,
        update=lambda fields, state, population: (fields["delta"], state),
        fields={},
    )
