"""Parameters that a client keeps for itself: they neither travel nor meet anybody else's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.types import Client, Masks, Params, PrunableFn, State


class PersonalState(NamedTuple):
    """What one client remembers.

    Attributes:
      own: list of its personal leaves, in the parameters' order.
      inner: state of the wrapped client.
    """

    own: list[jax.Array]
    inner: State


def keep_own(client: Client, *, is_own: PrunableFn) -> Client:
    """Let a client start from its own values of some leaves, and keep their new values.

    A client that has never taken part starts from the parameters that everybody starts from.

    Args:
      client: any local work.
      is_own: ``(path, leaf) -> bool``, which leaves of the parameters are personal.

    Returns:
      A `Client` in whose delta personal leaves are zero; `shared` marks those that may travel. A
      remedy against drift neither corrects personal leaves nor learns of their gradients.
    """

    def init_fn(params: Params) -> PersonalState:
        return PersonalState(own=_pick(params, is_own), inner=client.init(params))

    def update_fn(key, broadcast, state, data):
        start = _put(broadcast.params, state.own, is_own)
        given = broadcast._replace(params=start)
        if jax.tree.leaves(broadcast.correction):  # what is personal has no others to drift from
            given = given._replace(correction=_without(broadcast.correction, is_own))
        message, inner = client.update(key, given, state.inner, data)
        # Pruned entries start from zero, and their delta is counted from there.
        begun = _pick(masks_lib.apply(broadcast.masks, start), is_own)
        moved = _pick(message.fields["delta"], is_own)
        own = jax.tree.map(lambda old, change: old + change.astype(old.dtype), begun, moved)
        silent = {
            name: _without(message.fields[name], is_own)
            for name in ("delta", "local_grads")
            if name in message.fields
        }
        fields = {**message.fields, **silent}
        return message._replace(fields=fields), PersonalState(own=own, inner=inner)

    return Client(init=init_fn, update=update_fn)


def shared(masks: Masks, *, is_own: PrunableFn) -> Masks:
    """Leave out of masks what clients keep for themselves."""
    return trees.map_with_path(
        lambda path, mask: jnp.zeros_like(mask) if is_own(path, mask) else mask, masks
    )


def _without(tree: Params, is_own: PrunableFn) -> Params:
    """Put zeros in the place of personal leaves."""
    return _put(tree, jax.tree.map(jnp.zeros_like, _pick(tree, is_own)), is_own)


def _pick(params: Params, is_own: PrunableFn) -> list[jax.Array]:
    return [leaf for path, leaf in trees.items(params) if is_own(path, leaf)]


def _put(params: Params, own: list[jax.Array], is_own: PrunableFn) -> Any:
    rest = iter(own)
    return trees.map_with_path(
        lambda path, leaf: next(rest) if is_own(path, leaf) else leaf, params
    )
