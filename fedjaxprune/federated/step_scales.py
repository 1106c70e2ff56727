"""Factors on the updates of single local steps, and what a client derives once a round for them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedjaxprune.types import Broadcast, Client, Params, Schedule


class StepScale(NamedTuple):
    """A factor on the updates of each local step, where one for the whole round is not enough.

    Attributes:
      compute: ``(local parameters before the step, broadcast, step [], num_steps []) -> []``.
    """

    compute: Callable[[Params, Broadcast, jax.Array, jax.Array], jax.Array]


def deriving(client: Client, name: str, derive: Callable[[Broadcast], Any]) -> Client:
    """Let a client compute something from the broadcast once a round, before its local steps.

    Penalties and a `StepScale` find it as ``broadcast.announced[name]``. Nothing travels for it.
    """

    def update_fn(key, broadcast, state, data):
        announced = {**dict(broadcast.announced or {}), name: derive(broadcast)}
        return client.update(key, broadcast._replace(announced=announced), state, data)

    return Client(init=client.init, update=update_fn)


def factor(
    scale: Schedule | StepScale | None,
    broadcast: Broadcast,
    params: Params,
    at: tuple[jax.Array, jax.Array],
) -> Callable[[], jax.Array] | None:
    """Give the factor on the updates of a step, or None; `at` is the step and their number."""
    if scale is None:
        return None
    if isinstance(scale, StepScale):
        return functools.partial(scale.compute, params, broadcast, *at)
    return functools.partial(scale, broadcast.round)
