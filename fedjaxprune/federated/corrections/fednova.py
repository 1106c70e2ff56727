"""FedNova: average directions, not distances, when clients take different numbers of steps.

A client sends its delta divided by its effective number of local steps; the server multiplies the
mean of these by the mean number of steps. So a client that takes more steps no longer pulls the
objective towards its own. Numbers of steps are dynamic: they follow from each client's size.

References:
  Wang et al., `Tackling the Objective Inconsistency Problem in Heterogeneous Federated
  Optimization <https://arxiv.org/abs/2007.07481>`_, 2020.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune.registry import Part
from fedjaxprune.settings import Settings
from fedjaxprune.types import Batcher, Client, Correction, FieldSpec, Message

STEPS = "effective_steps"  # the field of messages whose deltas are divided by it


def effective_steps(num_steps: jax.Array, *, momentum: float) -> jax.Array:
    """Count how far local steps reach, in plain steps: ``[]`` float32.

    With momentum `rho`, step `k` of `K` also acts in the later ones and counts
    ``(1 - rho^(K - k + 1)) / (1 - rho)``; together
    ``(K - rho (1 - rho^K) / (1 - rho)) / (1 - rho)``, the paper's ``|a_i|_1``.
    """
    count = num_steps.astype(jnp.float32)
    if momentum == 0.0:
        return count
    faded = momentum * (1.0 - momentum**count) / (1.0 - momentum)
    return (count - faded) / (1.0 - momentum)


def normalized_averaging(*, batcher: Batcher, momentum: float = 0.0) -> Correction:
    """Average any client's deltas per effective local step, under any masks.

    It is a protocol's `correction`, for any method. What goes through the uplink is the divided
    delta, as in the paper; one more value goes up.

    Args:
      batcher: the clients', which knows their numbers of steps.
      momentum: of the local optimizer, in [0, 1).

    Returns:
      A `Correction` without state.

    Raises:
      ValueError: if `momentum` is outside [0, 1).
    """
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}.")

    def wrap_fn(client):
        def update_fn(key, broadcast, state, data):
            message, state = client.update(key, broadcast, state, data)
            steps = effective_steps(batcher.num_steps(data), momentum=momentum)
            divisor = jnp.where(steps > 0, steps, jnp.ones_like(steps))
            delta = jax.tree.map(
                lambda leaf: leaf / divisor.astype(leaf.dtype), message.fields["delta"]
            )
            fields = {**message.fields, "delta": delta, STEPS: steps}
            return Message(fields=fields, weight=message.weight), state

        return Client(init=client.init, update=update_fn)

    def update_fn(fields, state, population):
        del population  # the mean is over those that took part
        steps = fields[STEPS]
        return jax.tree.map(lambda leaf: steps.astype(leaf.dtype) * leaf, fields["delta"]), state

    return Correction(
        init=lambda params: (),
        wrap=wrap_fn,
        update=update_fn,
        fields={STEPS: FieldSpec()},
    )


def build(settings: Settings, *, batcher: Batcher, optimizer_settings: Any) -> Correction:
    """Average per effective step of the clients' optimizer.

    Raises:
      ValueError: the optimizer has no `momentum`, so that it is not SGD.
    """
    del settings  # there are none
    momentum = getattr(optimizer_settings, "momentum", None)
    if momentum is None:
        raise ValueError(
            "client.optimizer must be 'sgd' with client.correction 'fednova', which counts steps "
            f"of SGD, got {getattr(optimizer_settings, 'name', 'another')!r}."
        )
    return normalized_averaging(batcher=batcher, momentum=momentum)


PARTS = {
    "fednova": Part(
        build=build,
        summary="averages per effective local step (Wang et al., 2020, arXiv 2007.07481)",
    )
}
