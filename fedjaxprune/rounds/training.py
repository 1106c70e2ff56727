"""client + uplink + aggregators + server + pruner -> Algorithm: where the two wings meet."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.costs import ledger
from fedjaxprune.federated import aggregators as aggregators_lib
from fedjaxprune.federated import cohort as cohort_lib
from fedjaxprune.federated import server_optimizers
from fedjaxprune.federated import uplinks as uplink_lib
from fedjaxprune.pruning import pruners
from fedjaxprune.rounds import traffic
from fedjaxprune.traffic import FieldLength, Sent, SentAs
from fedjaxprune.types import (
    Aggregator,
    Algorithm,
    Batcher,
    Broadcast,
    Client,
    ClientState,
    CohortAggregator,
    Delta,
    Key,
    Masks,
    Message,
    Params,
    Population,
    PrunableFn,
    Pruner,
    PrunerInputs,
    RoundMetrics,
    RoundState,
    Schedule,
    Stage,
    State,
    Uplink,
)

EvidenceFn = Callable[[Delta, Broadcast], Params]


class Correction(NamedTuple):
    """A remedy against client drift that goes around any local client, under any masks.

    Attributes:
      init: ``params -> state``, the server's part: () or the tree of the parameters, of which every
        client receives, with the model, the entries that it trains.
      wrap: ``client -> client``; the result sees the server's part as ``broadcast.drift``.
      aggregators: by field of the wrapped client's message.
      update: ``(fields, state, population) -> (delta, state)`` at the server, from the aggregated
        fields; a round in which nobody was heard must leave the state as it was.
      sent_as: how fields of the wrapped client's message travel, where it is not ``"whole"``.
    """

    init: Callable[[Params], State]
    wrap: Callable[[Client], Client]
    aggregators: Mapping[str, Aggregator | CohortAggregator]
    update: Callable[[Mapping[str, Any], State, Population], tuple[Delta, State]]
    sent_as: Mapping[str, SentAs]


class Protocol(NamedTuple):
    """What every method shares: one protocol under which methods can be compared.

    Attributes:
      num_rounds: rounds of the run; schedules stretch over them.
      batcher: how a client's examples become local steps.
      optimizer: local optimizer, any optax transformation.
      learning_rate_scale: factor on local updates, by round (an optax schedule fits).
      uplink: what a delta looks like after the wire; None sends it as it is.
      aggregator: of the deltas; None takes the weighted mean.
      server: the server's optimizer, an optax transformation (see `servers`); None takes the
        aggregated delta as it is.
      chunk_size: clients that run side by side; changes nothing but speed and memory.
      mesh: devices that share the cohort (`cohort.make_mesh`); changes nothing but speed and
        memory. None uses one device.
      drift: remedy against client drift (SCAFFOLD, FedNova); None trains and averages plainly.
    """

    num_rounds: int
    batcher: Batcher
    optimizer: optax.GradientTransformation
    learning_rate_scale: Schedule | None = None
    uplink: Uplink | None = None
    aggregator: Aggregator | CohortAggregator | None = None
    server: optax.GradientTransformation | None = None
    chunk_size: int = 1
    mesh: jax.sharding.Mesh | None = None
    drift: Correction | None = None


class Masking(NamedTuple):
    """Which masks rule where, for methods in which training, sending and storing differ.

    Attributes:
      train: ``(key, state) -> masks`` that the clients train under.
      send: ``state -> masks`` of the entries that a client sends.
      server_is_dense: whether the server keeps the values of pruned entries to itself (what it
        broadcasts and deploys is masked all the same).
      receive: ``state -> masks`` of the entries that a client receives; None for those in force.
    """

    train: Callable[[Key, RoundState], Masks]
    send: Callable[[RoundState], Masks]
    server_is_dense: bool
    receive: Callable[[RoundState], Masks] | None = None


# From the fields of a client's message, what it sends of others: masks by field.
NarrowFn = Callable[[Mapping[str, Any]], Mapping[str, Masks]]


def masks_in_force() -> Masking:
    """Train, send and store under the masks in force: the plain case."""
    return Masking(
        train=lambda key, state: state.masks,
        send=lambda state: state.masks,
        server_is_dense=False,
    )


def compose(
    setup: Protocol,
    *,
    client: Client,
    pruner: Pruner | None = None,
    prunable: PrunableFn = masks_lib.is_kernel,
    aggregators: Mapping[str, Aggregator | CohortAggregator] | None = None,
    travel: Masking | None = None,
    reports: Sequence[str] = (),
    sent_as: Mapping[str, SentAs] | None = None,
    narrow: NarrowFn | None = None,
    modeled: Mapping[str, ledger.FormulaFn] | None = None,
    evidence: Mapping[str, EvidenceFn] | None = None,
    name: str = "train",
) -> Algorithm:
    """Build a federated pruning method of one stage.

    A round: clients train from the broadcast (``travel.train`` masks), each delta goes through the
    uplink, messages are aggregated by field, the server steps, the pruner revises the masks, and
    what is pruned becomes exact zero in the parameters and in the server's memory.

    Args:
      setup: what every method shares; its batcher, optimizer and scale are the client's business
        and are not read here.
      client: local work; its message has at least `delta`, `model_state` and `metrics`.
      pruner: revises the masks at the end of a round, seeing only the `prunable` leaves; by default
        the masks stay.
      prunable: which leaves may be pruned.
      aggregators: by field of the message, beside the defaults: ``setup.aggregator`` for `delta`,
        weighted means of `model_state` and `grads`, the sum of `metrics`.
      travel: where which masks rule; by default the masks in force, everywhere.
      reports: fields of the message that tell the simulator something of each client, and would
        not travel; they end up in ``metrics.sent.reports`` and are charged nothing.
      sent_as: how fields of the message travel, where it is not ``"whole"``: ``"live"`` for the
        entries that clients train and may send, ``"pairs"`` for pairs of position and value among
        those that they do not train, one for each entry that is not zero, ``"bits"`` for booleans,
        in a message of their own that comes first. A field of zeros alone does not travel.
      narrow: ``fields -> masks by field``: what a client sends of its `delta` and other fields,
        where that follows from its bits. What does not travel counts as zero; a
        ``setup.aggregator`` that counts holders sees who sent an entry.
      modeled: by name, what the method's own paper charges for a round, to stand in the ledger
        beside what is measured.
      evidence: by name, what the server reads off each delta as it arrives, a tree of the
        parameters: the pruner sees it as ``inputs.evidence``, joined by the aggregator of that
        name. It follows from what travels, and is charged nothing.
      name: the stage's name in the record.
    """
    uplink = uplink_lib.identity() if setup.uplink is None else setup.uplink
    server = server_optimizers.fedavg() if setup.server is None else setup.server
    drift = plain() if setup.drift is None else setup.drift
    client = drift.wrap(client)
    is_pruning = pruner is not None
    pruner = pruners.exempt(pruner, prunable) if pruner is not None else pruners.keep()
    codes: Mapping[str, SentAs] = {**drift.sent_as, **(sent_as or {})}
    travel = masks_in_force() if travel is None else travel
    evidence = evidence or {}
    mean = aggregators_lib.weighted_mean()
    by_field = {
        "delta": mean if setup.aggregator is None else setup.aggregator,
        "model_state": mean,
        "grads": mean,
        "metrics": aggregators_lib.unweighted_sum(),
        **drift.aggregators,
        **(aggregators or {}),
        **dict.fromkeys(("num_uploaded", "told", *reports), aggregators_lib.stack()),
        **dict.fromkeys(("num_messages", "num_personal_masks"), aggregators_lib.unweighted_sum()),
    }

    def init_fn(params, model_state):
        if is_pruning and not any(masks_lib.prunable_leaves(params, prunable)):
            raise ValueError(
                "the pruner has nothing to prune: none of the leaves "
                f"{', '.join(trees.paths(params))} is prunable; say which are by `prunable=`."
            )
        return RoundState(
            round=jnp.int32(0),
            params=params,
            masks=masks_lib.full(params),
            mask_version=jnp.int32(0),
            model_state=model_state,
            server=server_optimizers.init(server, params),
            pruner=pruner.init(params),
            drift=drift.init(params),
        )

    def init_client_fn(params):
        return ClientState(
            client=client.init(params), uplink=uplink.init(params), mask_version=jnp.int32(0)
        )

    def deployed_fn(state):
        return (
            masks_lib.apply(state.masks, state.params) if travel.server_is_dense else state.params
        )

    def received(state):
        return state.masks if travel.receive is None else travel.receive(state)

    def pack_masks(masks, *, needed):
        """Pack the masks to bits for the ledger, in the rounds in which somebody is sent them."""
        flags = masks_lib.prunable_leaves(masks, prunable)
        leaves = zip(jax.tree.leaves(masks), flags, strict=True)
        own = tuple(leaf for leaf, flag in leaves if flag)
        blank = jax.tree.map(jnp.zeros_like, jax.eval_shape(masks_lib.pack, own))
        return jax.lax.cond(needed, masks_lib.pack, lambda own: blank, own)

    def sent_fn(state, broadcast, sendable, cohort, fields):
        """Say what the messages of a round were."""
        num_masks = (cohort.states.mask_version != state.mask_version).astype(jnp.int32)
        shared = jax.tree.map(jnp.logical_and, broadcast.masks, sendable)
        trained = masks_lib.num_kept(shared)  # what stays at home has no drift from others
        pruned = masks_lib.num_kept(jax.tree.map(jnp.logical_not, broadcast.masks))
        told = fields["told"]
        reply = {
            "delta": FieldLength(known=fields["num_uploaded"]),
            "weight": FieldLength(like=trees.shape_only(jnp.float32(0.0))),
        }
        alone = {}  # messages of their own, which say how the reply is to be read
        for name, field in traffic.to_fields(told, codes, trained=trained, pruned=pruned).items():
            if codes.get(name) == "bits":
                alone[name] = {name: field}
            else:
                reply[name] = field
        own = {"masks": FieldLength(pairs=told["masks"])} if "masks" in told else {}
        down = {
            "params": FieldLength(known=masks_lib.num_kept(received(state))),
            "model_state": FieldLength(),
        }
        if jax.tree.leaves(state.drift):
            down["drift"] = FieldLength(known=trained)
        return Sent(
            round=state.round,
            client_ids=cohort.client_ids,
            num_masks=num_masks,
            packed_masks=pack_masks(state.masks, needed=jnp.any(num_masks > 0)),
            down={"broadcast": down},
            up={"reply": reply, **alone, **({"masks": own} if own else {})},
            reports={name: fields[name] for name in reports},
        )

    def round_fn(key, state, cohort, population):
        client_key, train_key, pruner_key = jax.random.split(key, 3)
        sendable = travel.send(state)
        broadcast = Broadcast(
            params=deployed_fn(state),
            masks=travel.train(train_key, state),
            model_state=state.model_state,
            round=state.round,
            drift=state.drift,
        )

        def update(key, given, own, data):
            broadcast, sendable = given
            work_key, wire_key = jax.random.split(key)
            message, client_state = client.update(work_key, broadcast, own[0], data)
            sent = sendable
            is_personal = "masks" in message.fields
            if is_personal:
                sent = jax.tree.map(jnp.logical_and, sent, message.fields["masks"])
            narrowed = dict(narrow(message.fields)) if narrow is not None else {}
            holders = {}
            if "delta" in narrowed:
                sent = jax.tree.map(jnp.logical_and, sent, narrowed.pop("delta"))
                holders = {} if setup.aggregator is None else {"masks": sent}
            parts = {n: masks_lib.apply(m, message.fields[n]) for n, m in narrowed.items()}
            delta = masks_lib.apply(sent, message.fields["delta"])
            delta, uplink_state = uplink.update(wire_key, delta, own[1], sent)
            fields = {
                **message.fields,
                **parts,
                **holders,
                "delta": delta,
                **{name: read(delta, broadcast) for name, read in evidence.items()},
                "num_uploaded": masks_lib.num_kept(sent),
                "told": traffic.summarize_message(message.fields, codes, reports, narrowed),
                "num_personal_masks": jnp.int32(is_personal),
                "num_messages": jnp.int32(1),
            }
            return Message(fields=fields, weight=message.weight), (client_state, uplink_state)

        rows = cohort.states
        outcome = cohort_lib.run(
            client_key,
            update,
            by_field,
            (broadcast, sendable),
            cohort._replace(states=(rows.client, rows.uplink)),
            population,
            chunk_size=setup.chunk_size,
            mesh=setup.mesh,
        )
        fields = outcome.fields

        delta, drift_state = drift.update(fields, state.drift, population)
        stepped = server_optimizers.step(server, delta, state.server, state.params)
        # A round in which nobody was heard moves nothing, momentum and masks included; nor does one
        # in which finite messages came to something that is not finite.
        overflown = (fields["num_messages"] > 0) & ~trees.all_finite(stepped)
        heard = (fields["num_messages"] > 0) & ~overflown
        params, server_state = trees.tree_where(heard, stepped, (state.params, state.server))
        inputs = PrunerInputs(
            params=params,
            grads=fields.get("grads"),
            round=state.round,
            evidence={name: fields[name] for name in evidence},
        )
        masks, pruner_state = trees.tree_where(
            heard,
            pruner.update(pruner_key, state.masks, state.pruner, inputs),
            (state.masks, state.pruner),
        )
        if not travel.server_is_dense:
            params = masks_lib.apply(masks, params)
            server_state = server_optimizers.zero_pruned(server, server_state, masks)

        num_changed = masks_lib.num_changed(state.masks, masks)
        shifted = server_optimizers.shift(state.model_state, fields["model_state"])
        new_state = state._replace(
            round=state.round + 1,
            params=params,
            masks=masks,
            mask_version=state.mask_version + (num_changed > 0).astype(jnp.int32),
            model_state=trees.tree_where(heard, shifted, state.model_state),
            server=server_state,
            pruner=pruner_state,
            drift=trees.tree_where(trees.all_finite(drift_state), drift_state, state.drift),
        )
        stale = cohort.participated & (rows.mask_version != state.mask_version)
        new_rows = ClientState(
            client=outcome.states[0],
            uplink=outcome.states[1],
            mask_version=jnp.where(cohort.participated, state.mask_version, rows.mask_version),
        )
        round_metrics = RoundMetrics(
            train=fields["metrics"],
            kept=masks_lib.num_kept(masks),
            num_changed=num_changed,
            num_downloaded=masks_lib.num_kept(received(state)),
            num_uploaded=fields["num_uploaded"],
            participated=cohort.participated,
            num_participating=jnp.sum(cohort.participated, dtype=jnp.int32),
            num_rejected=jnp.sum(
                outcome.rejected | (cohort.participated & overflown), dtype=jnp.int32
            ),
            num_masks_sent=jnp.sum(stale, dtype=jnp.int32),
            num_personal_masks=fields["num_personal_masks"],
            sent=sent_fn(state, broadcast, sendable, cohort, fields),
        )
        return new_state, new_rows, round_metrics

    def num_bits_fn(metrics, state):
        return ledger.account(
            metrics, state, payload=uplink.payload, prunable=prunable, modeled=modeled or {}
        )

    return Algorithm(
        init=init_fn,
        init_client=init_client_fn,
        stages=(Stage(name=name, num_rounds=setup.num_rounds, round=round_fn),),
        deployed_params=deployed_fn,
        num_bits=num_bits_fn,
    )


def plain() -> Correction:
    """Do nothing against drift."""
    return Correction(
        init=lambda params: (),
        wrap=lambda client: client,
        aggregators={},
        update=lambda fields, state, population: (fields["delta"], state),
        sent_as={},
    )
