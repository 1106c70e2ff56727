"""The training round of a method: broadcast, local work, upload, aggregation, server, revision.

Each step is a function of plain values; `training` puts them in order.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.federated import aggregators, attacks, cohort, server_optimizers, uplinks
from fedjaxprune.models import gates
from fedjaxprune.pruning import pruners
from fedjaxprune.rounds import downloads, hostility, measuring, silence, stages, traffic
from fedjaxprune.rounds.protocol import (
    Given,
    Hooks,
    Masking,
    Protocol,
    broadcast_of,
    check,
    joining,
    no_correction,
    weigh,
)
from fedjaxprune.traffic import Payload
from fedjaxprune.types import (
    Aggregator,
    Algorithm,
    Broadcast,
    Client,
    ClientData,
    ClientState,
    Cohort,
    Correction,
    Delta,
    FieldSpec,
    Key,
    Message,
    Params,
    Population,
    PrunableFn,
    Pruner,
    PrunerInputs,
    RoundState,
    Stage,
    State,
    Uplink,
)


class Parts(NamedTuple):
    """What the steps of a round are made of; nothing is missing.

    Attributes:
      protocol: says how the cohort is mapped.
      client: with the correction around it, and the attack, if there is one.
      uplink: of the deltas.
      server: the server's optimizer.
      correction: of client drift.
      pruner: of the prunable leaves.
      prunable: which leaves these are.
      fields: how the fields of messages travel.
      aggregators: of all fields.
      masking: which masks rule where.
      hooks: what the method adds to every round.
    """

    protocol: Protocol
    client: Client
    uplink: Uplink
    server: optax.GradientTransformation
    correction: Correction
    pruner: Pruner
    prunable: PrunableFn
    fields: Mapping[str, FieldSpec]
    aggregators: hostility.ByField
    masking: Masking
    hooks: Hooks = Hooks()

    @property
    def read(self) -> dict[str, Callable[[Delta, Broadcast], Params]]:
        """What the server reads off each delta, by field."""
        return {n: spec.read for n, spec in self.fields.items() if spec.read is not None}


class Stepped(NamedTuple):
    """What the server made of the messages, before masks are revised.

    Attributes:
      params: stepped.
      server: state of the server's optimizer.
      model_state: what is not trained.
      correction: the server's part.
      is_heard: ``[]`` bool; False where no message arrived, or where what they lead to is not
        finite; then nothing changes.
    """

    params: Params
    server: State
    model_state: State
    correction: State
    is_heard: jax.Array


def training(
    protocol: Protocol,
    *,
    client: Client,
    pruner: Pruner | None = None,
    prunable: PrunableFn = masks_lib.is_kernel,
    fields: Mapping[str, FieldSpec] = MappingProxyType({}),
    masking: Masking | None = None,
    hooks: Hooks | None = None,
    name: str = "train",
) -> Algorithm:
    """Build a federated pruning method of one stage.

    A round: clients train from the broadcast (under `masking.train`), each delta goes through the
    uplink, messages are aggregated by field, the server steps, the pruner revises the masks, and
    what is pruned becomes exact zero in the parameters and in the server's memory.

    Args:
      protocol: what every method shares; batcher, optimizer and scale are the client's business.
      client: local work; its message has at least `delta`, `model_state` and `metrics`.
      pruner: revises the masks at the end of a round, seeing only the `prunable` leaves; by default
        the masks stay.
      prunable: which leaves may be pruned.
      fields: of the message, those that are not sent whole or aggregated by default.
      masking: which masks rule where.
      hooks: what happens before and after each round.
      name: the stage's name in the record.

    Raises:
      ValueError: if a number of the protocol is out of range; in `init`, if there is a pruner and
        nothing prunable.
    """
    parts = _complete(protocol, client, pruner, prunable, fields, masking)
    parts = parts if hooks is None else parts._replace(hooks=hooks)
    downlink = protocol.downlink

    def init_fn(params, model_state):
        if pruner is not None:
            stages.check_prunable(params, prunable)
        return RoundState(
            round=jnp.int32(0),
            params=params,
            masks=masks_lib.full(params),
            masks_id=jnp.int32(0),
            model_state=model_state,
            server=server_optimizers.init(parts.server, params),
            pruner=parts.pruner.init(params),
            correction=parts.correction.init(params),
            downlink=() if downlink is None else downlink.init(params),
        )

    def init_client_fn(params):
        return ClientState(
            client=parts.client.init(params),
            uplink=parts.uplink.init(params),
            masks_held=jnp.int32(0),
            held=downloads.nothing_held(downlink, parts.hooks.announcement),
        )

    def round_fn(key, state, members, population):
        client_key, train_key, pruner_key = jax.random.split(key, 3)
        given, memory = broadcast(train_key, parts, state)
        outcome = aggregate(client_key, parts, given, members, population)
        if parts.hooks.conclude is not None:
            changed = parts.hooks.conclude(outcome.fields, state, population)
            outcome = outcome._replace(fields={**outcome.fields, **changed})
        stepped = server_step(parts, state, outcome.fields, population)
        after = revise(pruner_key, parts, state, stepped, outcome.fields)
        after = after._replace(downlink=memory)
        rows = ClientState(
            client=outcome.states[0],
            uplink=outcome.states[1],
            masks_held=jnp.where(members.participated, state.masks_id, members.states.masks_held),
            held=downloads.held_after(downlink, memory, parts.hooks.announcement, state, members),
        )
        counts = stepped.is_heard & stages.is_sound_pruner(state.pruner, after.pruner)
        after, rows = stages.keep_if(counts, state, members, after, rows)
        states = state, after
        metrics = measuring.of_round(parts, states, given, members, outcome, counts, memory)
        return after, rows, metrics, counts

    stage = Stage(
        name=name, num_rounds=protocol.num_rounds, round=stages.with_hooks(round_fn, hooks)
    )
    return Algorithm(
        init=init_fn,
        init_client=init_client_fn,
        stages=(stage,),
        deployed_params=lambda state: deployed_params(parts, state),
        prunable=prunable,
        payload=parts.uplink.payload,
        shaped_payload=parts.uplink.shaped_payload,
        downlink_payload=Payload if downlink is None else downlink.payload,
    )


def deployed_params(parts: Parts, state: RoundState) -> Params:
    """Give the parameters that clients receive, and that are evaluated.

    A downlink does not change what is evaluated.
    """
    if parts.masking.server_is_dense:
        return masks_lib.apply(state.masks, state.params)
    return state.params


def broadcast(key: Key, parts: Parts, state: RoundState) -> tuple[Given, State]:
    """Give every client the model, and masks to train under; also give the downlink's state."""
    rules, announcement = parts.masking, parts.hooks.announcement
    download = state.masks if rules.download is None else rules.download(state)
    params, own = state.params, None if rules.train is None else rules.train(key, state)
    given = Given(
        upload=state.masks if rules.upload is None else rules.upload(state),
        download=download,
        broadcast=broadcast_of(state, masks=own)._replace(
            params=masks_lib.apply(download, params) if rules.server_is_dense else params,
            correction_state=state.correction,
            announced=() if announcement is None else announcement.seen(state),
        ),
    )
    seen, memory = downloads.show(
        key, parts.protocol.downlink, state, given.broadcast, given.download
    )
    return given._replace(broadcast=seen), memory


def local_work(
    key: Key, parts: Parts, given: Given, own: tuple[State, State], data: ClientData
) -> tuple[Message, tuple[State, State]]:
    """Let one client train on its own data, and send what came of it."""
    work_key, wire_key = jax.random.split(key)
    given = downloads.for_client(parts.masking, given, data.client_id, own[0])
    message, client_state = parts.client.update(work_key, given.broadcast, own[0], data)
    message, uplink_state = upload(wire_key, parts, message, given, own[1])
    return silence.keep_still(message, (client_state, uplink_state), own)


def upload(
    key: Key, parts: Parts, message: Message, given: Given, state: State
) -> tuple[Message, State]:
    """Make of one client's message what arrives: masked, through the uplink, and counted."""
    fields, rules = traffic.zero_unsent(parts.fields, message.fields), parts.masking
    sendable = given.upload
    if "masks" in fields:  # personal ones
        sendable = jax.tree.map(jnp.logical_and, sendable, fields["masks"])
    narrow = rules.upload_masks
    narrowed = {} if narrow is None else dict(narrow(fields, given.broadcast.masks))
    counts_holders = rules.of_client is not None
    if "delta" in narrowed:
        sendable = jax.tree.map(jnp.logical_and, sendable, narrowed.pop("delta"))
        counts_holders |= parts.protocol.aggregator is not None
    delta = masks_lib.apply(sendable, fields["delta"])
    dense = delta
    delta, state = parts.uplink.update(key, delta, state, sendable)
    trees.check_shapes(delta, dense, what="what the uplink sends")
    if parts.protocol.clip is not None:
        delta = trees.clip_norm(delta, parts.protocol.clip)
    arrived = {
        **fields,
        **{name: masks_lib.apply(masks, fields[name]) for name, masks in narrowed.items()},
        **({"masks": sendable} if counts_holders else {}),
        **({} if parts.hooks.conclude is None else {traffic.NUM_EXAMPLES: jnp.float32(1.0)}),
        "delta": rules.with_absent(delta, sendable, given.broadcast),
        **{name: read(delta, given.broadcast) for name, read in parts.read.items()},
        traffic.NUM_UPLOADED: masks_lib.num_kept(sendable),
        traffic.SUMMARY: traffic.summarize_message(
            fields, parts.fields, narrowed, given.broadcast.masks
        ),
        traffic.NUM_MESSAGES: jnp.int32(1),
    }
    return Message(fields=arrived, weight=weigh(parts.protocol, message.weight)), state


def aggregate(
    key: Key, parts: Parts, given: Given, members: Cohort, population: Population
) -> cohort.Outcome:
    """Let the cohort work, and join its messages field by field."""

    def server_message(data):
        server_key = jax.random.fold_in(key, population.offsets.shape[0])  # no client's
        own = parts._replace(uplink=uplinks.identity())  # nothing of it travels
        rows = (own.client.init(given.broadcast.params), own.uplink.init(given.broadcast.params))
        return local_work(server_key, own, given, rows, data)[0].fields

    by_field = hostility.beside_server(parts.aggregators, population, server_message)
    if parts.protocol.attackers is not None:
        parts.protocol.attackers.check(population.offsets.shape[0] - 1)
        by_field, members = hostility.under_attack(parts.protocol.attackers, by_field, members)
    rows = members.states
    return cohort.run(
        key,
        lambda key, given, own, data: local_work(key, parts, given, own, data),
        by_field,
        given,
        members._replace(states=(rows.client, rows.uplink)),
        population,
        chunk_size=parts.protocol.chunk_size,
        mesh=parts.protocol.mesh,
    )


def server_step(
    parts: Parts, state: RoundState, fields: Mapping[str, Any], population: Population
) -> Stepped:
    """Move the model by what was aggregated."""
    delta, correction = parts.correction.update(fields, state.correction, population)
    params, server = server_optimizers.step(parts.server, delta, state.server, state.params)
    moved = state._replace(
        params=params,
        server=server,
        model_state=server_optimizers.shift(state.model_state, fields["model_state"]),
        correction=correction,
    )
    is_heard = (fields[traffic.NUM_MESSAGES] > 0) & stages.is_sound(state, moved)
    moved = trees.tree_where(is_heard, moved, state)
    return Stepped(moved.params, moved.server, moved.model_state, moved.correction, is_heard)


def revise(
    key: Key, parts: Parts, state: RoundState, stepped: Stepped, fields: Mapping[str, Any]
) -> RoundState:
    """Revise the masks, and make what is pruned exact zero; the round is counted."""
    inputs = PrunerInputs(
        params=stepped.params,
        grads=fields.get("grads"),
        round=state.round,
        statistics={n: fields[n] for n, one in parts.fields.items() if one.read or one.to_pruner},
    )
    masks, pruner_state = parts.pruner.update(key, state.masks, state.pruner, inputs)
    params, server = stepped.params, stepped.server
    if not parts.masking.server_is_dense:
        params = masks_lib.apply(masks, params)
        server = server_optimizers.zero_pruned(parts.server, server, masks)
    has_changed = masks_lib.num_changed(state.masks, masks) > 0
    return state._replace(
        round=state.round + 1,
        params=params,
        masks=masks,
        masks_id=state.masks_id + has_changed.astype(jnp.int32),
        model_state=stepped.model_state,
        server=server,
        pruner=pruner_state,
        correction=stepped.correction,
    )


def _complete(protocol, client, pruner, prunable, fields, masking) -> Parts:
    """Put a part in the place of everything that was left out."""
    masking = Masking() if masking is None else masking
    check(protocol, masking)
    downloads.check(protocol.downlink, masking)
    correction = no_correction() if protocol.correction is None else protocol.correction
    fields = {"model_state": FieldSpec(travels=gates.is_of_client), **correction.fields, **fields}
    total, stack = aggregators.unweighted_sum(), aggregators.stack()
    by_field = {
        "delta": _joining_deltas(protocol, masking),
        "model_state": joining(protocol),
        "grads": joining(protocol),
        "metrics": total,
        **dict.fromkeys(traffic.reported(fields), stack),
        traffic.NUM_UPLOADED: stack,
        traffic.SUMMARY: stack,
        traffic.NUM_MESSAGES: total,
        traffic.NUM_EXAMPLES: aggregators.weighted_sum(),
    }
    for name, spec in fields.items():
        traffic.check_field(name, spec)
        chosen = spec.aggregate or by_field.get(name)
        by_field[name] = chosen or joining(protocol, by="sum" if spec.is_sum else "examples")
    client, attackers = correction.wrap(client), protocol.attackers
    return Parts(
        protocol=protocol,
        client=client if attackers is None else attacks.among(client, attackers.attack),
        uplink=uplinks.identity() if protocol.uplink is None else protocol.uplink,
        server=server_optimizers.fedavg() if protocol.server is None else protocol.server,
        correction=correction,
        pruner=pruners.keep() if pruner is None else pruners.exempt(pruner, prunable),
        prunable=prunable,
        fields=fields,
        aggregators=by_field,
        masking=masking,
    )


def _joining_deltas(protocol: Protocol, masking: Masking) -> Any:
    """Choose what combines deltas: the user's aggregator, or a mean over holders for sub-models."""
    if masking.of_client is not None and isinstance(protocol.aggregator, Aggregator | None):
        return aggregators.holder_mean()
    return joining(protocol) if protocol.aggregator is None else protocol.aggregator
