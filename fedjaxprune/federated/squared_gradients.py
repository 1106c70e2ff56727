"""Squared gradients as a message: what each weight could take off a client's loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import trees
from fedjaxprune.types import Client, PrunableFn, State


class SummedState(NamedTuple):
    """What one client has not sent yet.

    Attributes:
      squares: sum of the squared gradients of the rounds since the client sent any.
      inner: state of the wrapped client.
    """

    squares: Any
    inner: State


def squared_gradients(
    client: Client,
    *,
    prunable: PrunableFn,
    names: tuple[str, str],
    since_last: Callable[[jax.Array], jax.Array] | None = None,
) -> Client:
    """Send the squares of the gradients that a client reports.

    They are squared at the client: the square of a mean over clients is something else.

    Args:
      client: reports `grads` (``local_sgd(..., report_grads=...)``), in the rounds in which they
        are sent, or with `since_last` in all.
      prunable: leaves of which each square is sent; of all others only the sum.
      names: of the field with the squares, and of that with the sum.
      since_last: ``round [] -> [] bool``; if given, the client adds its squares up over its
        rounds, sends the sums in the rounds for which this holds, and begins again at zero.

    Returns:
      A `Client` whose message has, in the place of `grads`, a tree of the parameters, zero in the
      leaves that are not prunable, and a number ``[]`` float32.

    Raises:
      ValueError: while tracing, if the client reports no gradients.

    References:
      Jiang et al., `PruneFL <https://arxiv.org/abs/1909.12326>`_, 2022.
    """

    def init_fn(params):
        if since_last is None:
            return client.init(params)
        return SummedState(jax.tree.map(jnp.zeros_like, params), client.init(params))

    def update_fn(key, broadcast, state, data):
        inner = state if since_last is None else state.inner
        message, inner = client.update(key, broadcast, inner, data)
        if "grads" not in message.fields:
            raise ValueError(
                "squared_gradients sends squares of gradients, but the client reports none: build "
                "it with local_sgd(..., report_grads=...)."
            )
        squares = jax.tree.map(jnp.square, message.fields["grads"])
        if since_last is None:
            state = inner
        else:
            total, due = jax.tree.map(jnp.add, state.squares, squares), since_last(broadcast.round)
            nothing = jax.tree.map(jnp.zeros_like, total)
            squares = trees.tree_where(due, total, nothing)
            state = SummedState(trees.tree_where(due, nothing, total), inner)
        fields = {name: tree for name, tree in message.fields.items() if name != "grads"}
        fields[names[0]], fields[names[1]] = split(squares, prunable)
        return message._replace(fields=fields), state

    return Client(init=init_fn, update=update_fn)


def split(squares: Any, prunable: PrunableFn) -> tuple[Any, jax.Array]:
    """Keep the prunable leaves, with zeros elsewhere, and add all others up to ``[]`` float32."""
    own = trees.map_with_path(
        lambda path, leaf: leaf if prunable(path, leaf) else jnp.zeros_like(leaf), squares
    )
    others = [
        jnp.sum(leaf, dtype=jnp.float32)
        for path, leaf in trees.items(squares)
        if not prunable(path, leaf)
    ]
    return own, trees.tree_sum(others, dtype=jnp.float32)
