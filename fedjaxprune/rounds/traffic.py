"""What a round's messages were, in counts: noted at the client, gathered for the ledger."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.rounds import downloads
from fedjaxprune.rounds.protocol import Announcement, Given, Masking
from fedjaxprune.traffic import FieldLength, Send, Sent
from fedjaxprune.types import Cohort, FieldSpec, Masks, PrunableFn, RoundState

# Fields of a message that are charged in their own way, or, as metrics, not at all: what a run
# reports to its reader is no part of the method.
SPECIAL = ("delta", "masks", "metrics")
# Ways whose lengths follow from the shapes and types of what is sent.
_SHAPED: tuple[Send, ...] = ("whole", "places", "bits")
# Fields that training itself adds to each client's message: for the ledger, and for counting.
NUM_UPLOADED, NUM_MESSAGES, SUMMARY = "num_uploaded", "num_messages", "message_summary"
NUM_EXAMPLES = "num_examples"  # of the clients that were heard, where `Hooks.conclude` asks for it


def check_field(name: str, spec: FieldSpec) -> None:
    """See that a field of a training round's messages can travel as its spec says.

    Raises:
      ValueError: the way is unknown, or some leaves shall stay away of a field that is not sent
        whole.
    """
    if spec.send not in get_args(Send):
        raise ValueError(
            f"the field {name!r} must be sent as one of {', '.join(get_args(Send))}; "
            f"got {spec.send!r}."
        )
    if spec.travels is not None and spec.send != "whole":
        raise ValueError(
            f"the field {name!r} must be sent as 'whole' if `travels` says which of its leaves are "
            f"sent; got {spec.send!r}."
        )


def summarize_message(
    fields: Mapping[str, Any],
    specs: Mapping[str, FieldSpec],
    narrowed: Mapping[str, Masks],
    given: Masks,
) -> dict[str, Any]:
    """Note of a client's message what the ledger has to know.

    A field without a spec travels whole; `narrowed` has the masks of those that travel in part. A
    client's own masks travel unless they are those that it was `given`.
    """
    others = {
        name: only_sent(specs, name, tree)
        for name, tree in fields.items()
        if name not in SPECIAL and _send(specs, name) != "nothing"
    }

    def of(*kinds: Send) -> dict[str, Any]:
        return {name: tree for name, tree in others.items() if _send(specs, name) in kinds}

    marks = jax.tree.map(_is_set, of("pairs", "places", "bits"))
    summary = {
        "clients": {
            name: jnp.bool_(True) if name == "model_state" else _says_anything(tree)
            for name, tree in others.items()
        },
        "template": trees.shape_only(
            {**of(*_SHAPED), **{name: marks[name] for name in of("places")}}
        ),
        "sent_counts": {name: masks_lib.num_kept(tree) for name, tree in marks.items()},
        "live_counts": {
            name: masks_lib.num_kept(only_sent(specs, name, masks))
            for name, masks in narrowed.items()
        },
    }
    if "masks" in fields:
        summary["masks"] = masks_lib.num_kept(fields["masks"])
        summary["has_own"] = masks_lib.num_changed(given, fields["masks"]) > 0
    return summary


def only_sent(specs: Mapping[str, FieldSpec], name: str, tree: Any) -> Any:
    """Put None in the place of the leaves of a field that its spec does not let travel."""
    travels = _travels(specs, name)
    return trees.map_with_path(lambda path, leaf: leaf if travels(path, leaf) else None, tree)


def zero_unsent(specs: Mapping[str, FieldSpec], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Put zeros in the place of the leaves that do not travel, as the server sees them.

    Of entries whose places alone travel it knows no more than that: they are 1.
    """

    def zeroed(name: str, tree: Any) -> Any:
        if _send(specs, name) == "places":
            return jax.tree.map(lambda leaf: _is_set(leaf).astype(leaf.dtype), tree)
        travels = _travels(specs, name)
        return trees.map_with_path(
            lambda path, leaf: leaf if travels(path, leaf) else jnp.zeros_like(leaf), tree
        )

    return {name: zeroed(name, tree) for name, tree in fields.items()}


def sent(
    state: RoundState,
    given: Given,
    cohort: Cohort,
    fields: Mapping[str, Any],
    *,
    specs: Mapping[str, FieldSpec],
    prunable: PrunableFn,
    masking: Masking,
    announcement: Announcement | None = None,
) -> Sent:
    """Say what the messages of a training round were, from the state before it.

    `given` is the broadcast, with masks of what clients send and receive.
    """
    transport, summary = masking.transport, fields[SUMMARY]
    count = functools.partial(downloads.count, masking, given, cohort)
    # What stays at home has no drift from others.
    trained = count(
        lambda own: masks_lib.num_kept(
            jax.tree.map(jnp.logical_and, own.broadcast.masks, own.upload)
        )
    )
    pruned = count(
        lambda own: masks_lib.num_kept(jax.tree.map(jnp.logical_not, own.broadcast.masks))
    )

    reply = {"delta": FieldLength(live_counts=fields[NUM_UPLOADED]), "weight": weight_field()}
    up: dict[str, dict[str, FieldLength]] = {"reply": reply}
    for name, field in _to_fields(summary, specs, trained=trained, pruned=pruned).items():
        if _send(specs, name) == "bits":  # a message of its own: how the reply is to be read
            up[name] = {name: field}
        else:
            reply[name] = field
    if "masks" in summary:
        own = FieldLength(clients=summary["has_own"], sent_counts=summary["masks"])
        up["masks"] = {"masks": own}

    params = FieldLength(live_counts=count(lambda own: masks_lib.num_kept(own.download)))
    down = {"broadcast": {"params": params, "model_state": FieldLength()}}
    if jax.tree.leaves(state.correction):
        down["broadcast"]["drift"] = FieldLength(live_counts=trained)
    if announcement is not None:
        down["broadcast"] |= announcement.lengths(state, given.broadcast.announced, cohort)
    receivers = transport.receivers(state, cohort.states.masks_held)
    if transport.choose is not None:
        chosen = transport.choose(state, cohort.states.masks_held)
        down["broadcast"]["chosen"] = chosen._replace(clients=receivers & chosen.clients)
        receivers = receivers & ~chosen.clients
    packed: Any = ()
    travel = transport.charged != "never"
    if travel and transport.encode is not None:
        down["masks"] = {"masks": transport.encode(state)._replace(clients=receivers)}
    elif travel:
        packed = _pack(state.masks, prunable, needed=jnp.any(receivers))
    return Sent(
        round=state.round,
        client_ids=cohort.client_ids,
        num_masks=receivers.astype(jnp.int32),
        packed_masks=packed,
        down=down,
        up=up,
        reports={name: fields[name] for name in reported(specs)},
    )


def reported(specs: Mapping[str, FieldSpec]) -> list[str]:
    """List the fields that clients report to the simulator, and that do not travel."""
    return [n for n, s in specs.items() if s.send == "nothing" and s.read is None]


def weight_field() -> FieldLength:
    """Describe a client's number of examples, which goes with every reply."""
    return FieldLength(template=trees.shape_only(jnp.float32(0.0)))


def _to_fields(summary, specs, *, trained, pruned) -> dict[str, FieldLength]:
    """Say of each field that went up beside the deltas what travelled, from `summarize_message`.

    Clients trained ``[L]`` int32 entries of the parameters; the others are pruned.
    """
    fields = {}
    for name, clients in summary["clients"].items():
        send = _send(specs, name)
        template = summary["template"][name] if send in _SHAPED else ()
        live: Any = {"masked": trained, "pairs": pruned, "places": pruned}.get(send, ())
        fields[name] = FieldLength(
            template=jax.tree.map(lambda leaf: leaf[0], template),
            clients=clients,
            live_counts=summary["live_counts"].get(name, live),
            sent_counts=summary["sent_counts"].get(name, ()),
        )
    return fields


def _pack(masks: Masks, prunable: PrunableFn, *, needed: jax.Array) -> tuple[jax.Array, ...]:
    """Pack the masks to bits for the ledger, in the rounds in which somebody is sent them."""
    own = tuple(leaf for path, leaf in trees.items(masks) if prunable(path, leaf))
    blank = jax.tree.map(jnp.zeros_like, jax.eval_shape(masks_lib.pack, own))
    return jax.lax.cond(needed, masks_lib.pack, lambda own: blank, own)


def _send(specs: Mapping[str, FieldSpec], name: str) -> Send:
    return specs[name].send if name in specs else "whole"


def _travels(specs: Mapping[str, FieldSpec], name: str) -> Callable[[str, Any], bool]:
    spec = specs.get(name)
    return (lambda path, leaf: True) if spec is None or spec.travels is None else spec.travels


def _says_anything(tree: Any) -> jax.Array:
    """Tell whether any entry of a tree is set."""
    leaves = [jnp.any(_is_set(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.any(jnp.stack(leaves)) if leaves else jnp.bool_(False)


def _is_set(leaf: jax.Array) -> jax.Array:
    return leaf if leaf.dtype == jnp.bool_ else leaf != 0
