"""What the clients of a training round are sent by what each of them holds.

Masks and what a method announces travel never, where they changed, or always. Parameters travel
whole, or through a downlink, which may know what changed since a client last received them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.rounds.protocol import Announcement, Given, Masking, under
from fedjaxprune.traffic import DOWNLINK, Sent
from fedjaxprune.types import Broadcast, Cohort, Downlink, Key, Masks, RoundState, State

PARAMS = "params"  # in `ClientState.held`, beside the names of announced fields
_OWN = 2**31 - 1  # the masks to train under are drawn from the broadcast's key itself


def nothing_held(downlink: Downlink | None, announcement: Announcement | None) -> dict[str, Any]:
    """Say what a client holds that has never taken part, of what it is sent only once."""
    names = [PARAMS] if downlink is not None and downlink.version is not None else []
    names += [] if announcement is None else sorted(announcement.versions)
    return {name: jnp.int32(0) for name in names}


def show(
    key: Key, downlink: Downlink | None, state: RoundState, broadcast: Broadcast, received: Masks
) -> tuple[Broadcast, State]:
    """Put in the place of the parameters what clients see of them; also give the downlink's state.

    Args:
      key: the broadcast's.
      downlink: None leaves everything as it is.
      state: before the round.
      broadcast: with the exact parameters.
      received: masks of the entries that clients receive.
    """
    if downlink is None:
        return broadcast, state.downlink
    own_key = jax.random.fold_in(key, _OWN)
    seen, memory = downlink.update(own_key, broadcast.params, state.downlink, received)
    trees.check_shapes(seen, broadcast.params, what="what the downlink shows")
    return broadcast._replace(params=seen), memory


def for_client(masking: Masking, given: Given, client_id: jax.Array, state: State) -> Given:
    """Cut what a round's clients are given down to the sub-model of one client, if it has its own.

    Args:
      masking: says which it is.
      given: what all are given.
      client_id: ``[]`` int32.
      state: of the client's own, from before the round.
    """
    if masking.of_client is None:
        return given
    broadcast = given.broadcast
    own = masking.of_client(broadcast, client_id, state)

    def narrow(masks: Masks) -> Masks:
        return jax.tree.map(jnp.logical_and, masks, own)

    return given._replace(
        broadcast=under(
            narrow(broadcast.masks),
            broadcast._replace(params=masks_lib.apply(own, broadcast.params)),
        ),
        upload=narrow(given.upload),
        download=narrow(given.download),
    )


def count(
    masking: Masking, given: Given, cohort: Cohort, of_one: Callable[[Given], jax.Array]
) -> jax.Array:
    """Count entries of what clients are given: ``[L]`` if all are given the same, else ``[C, L]``.

    Args:
      masking: says whether clients have sub-models of their own.
      given: what all are given.
      cohort: who was asked, with their rows from before the round.
      of_one: ``given -> [L]`` int32.
    """
    if masking.of_client is None:
        return of_one(given)
    rows = cohort.client_ids, cohort.states.client
    return jax.lax.map(lambda row: of_one(for_client(masking, given, *row)), rows)


def check(downlink: Downlink | None, masking: Masking) -> None:
    """Refuse a downlink that cannot know what each client holds.

    Raises:
      ValueError: it has versions without entries that are due, or the reverse; or it sends changes,
        and clients have sub-models.
    """
    if downlink is None:
        return
    if (downlink.due is None) != (downlink.version is None):
        raise ValueError(
            "the downlink must have both `version` and `due`, or neither, got only "
            f"`{'version' if downlink.due is None else 'due'}`."
        )
    if downlink.due is not None and masking.of_client is not None:
        raise ValueError(
            "the downlink must send all entries in every round where clients have sub-models of "
            "their own, as 'identity' and 'quantize' do; got one that sends what changed."
        )


def charge(
    downlink: Downlink | None, memory: State, sent: Sent, cohort: Cohort, received: Masks
) -> Sent:
    """Say of the parameters what the downlink sends to whom.

    Args:
      downlink: None leaves the messages as they are.
      memory: state of the downlink that `show` gave.
      sent: the messages of a round that sends all parameters.
      cohort: who was asked, with their rows from before the round.
      received: masks of the entries that clients receive.
    """
    if downlink is None:
        return sent
    down = dict(sent.down)
    fields = dict(down.pop("broadcast"))
    if downlink.due is not None:
        due = functools.partial(downlink.due, memory)

        def num_due(version: jax.Array) -> jax.Array:
            return masks_lib.num_kept(jax.tree.map(jnp.logical_and, received, due(version)))

        counts = jax.lax.map(num_due, cohort.states.held[PARAMS])
        fields[PARAMS] = fields[PARAMS]._replace(sent_counts=counts)
    return sent._replace(down={DOWNLINK: fields, **down})


def held_after(
    downlink: Downlink | None,
    memory: State,
    announcement: Announcement | None,
    state: RoundState,
    cohort: Cohort,
) -> Mapping[str, jax.Array]:
    """Say what the clients of a round hold after it; who is absent holds what it held before.

    Args:
      downlink: of the round.
      memory: its state, as `show` gave it.
      announcement: of the round.
      state: before the round.
      cohort: who was asked, with their rows from before the round.
    """
    held = dict(cohort.states.held)
    new = {} if announcement is None else announcement.versions_sent(state)
    if downlink is not None and downlink.version is not None:
        new[PARAMS] = downlink.version(memory), jnp.bool_(True)
    for name, (version, is_sent) in new.items():
        held[name] = jnp.where(cohort.participated & is_sent, version, held[name])
    return held
