"""SCAFFOLD: control variates that take each client's drift out of its local steps.

Every local step follows ``g - c_i + c``: the client's own control variate goes, the server's comes.
Afterwards ``c_i`` becomes the mean of the plain gradients ``g`` over the local steps, which for SGD
without momentum and weight decay is the paper's option II, ``c_i - c + (x - y_i) / (K lr)``, and
needs no learning rate. So it goes with any local optimizer. A decay is not part of ``g``.

We differ from the paper in that clients weigh by their numbers of examples, as everywhere here: the
server's ``c`` is at all times the mean of all clients' ``c_i``, weighted by examples (clients that
have never taken part stand at zero). With equal numbers that is the paper's.

Under masks a client changes and sends ``c_i`` only where it trains. What is known of a pruned
weight stays as it was, at the server and at the clients, so that their means agree when it grows
back; until then no gradient passes there.

References:
  Karimireddy et al., `SCAFFOLD <https://arxiv.org/abs/1910.06378>`_, 2020.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune.registry import Part
from fedjaxprune.settings import Settings
from fedjaxprune.types import (
    Batcher,
    Client,
    Correction,
    FieldSpec,
    Message,
    Params,
    State,
    count_examples,
)


class ControlState(NamedTuple):
    """What one client remembers.

    Attributes:
      control: its control variate; the structure of the parameters.
      inner: state of the wrapped client.
    """

    control: Params
    inner: State


def control_variates() -> Correction:
    """Correct any client's local steps by control variates, under any masks.

    Put it into the protocol of any method: ``protocol._replace(correction=control_variates())``. A
    client keeps one value for each weight; each way one more value travels for each live weight,
    uncompressed.

    Returns:
      A `Correction` whose state is the server's control variate.
    """

    def init_fn(params):
        return jax.tree.map(jnp.zeros_like, params)

    def wrap_fn(client):
        def init_client_fn(params):
            return ControlState(control=init_fn(params), inner=client.init(params))

        def update_fn(key, broadcast, state, data):
            correction = jax.tree.map(jnp.subtract, broadcast.correction_state, state.control)
            message, inner = client.update(
                key, broadcast._replace(correction=correction), state.inner, data
            )
            fields = dict(message.fields)
            if "local_grads" not in fields:
                raise ValueError(
                    "scaffold.control_variates needs clients that follow the broadcast's "
                    "correction and report local_grads, as local_training.local_sgd does."
                )
            grads = fields.pop("local_grads")
            change = masks_lib.apply(
                broadcast.masks, jax.tree.map(jnp.subtract, grads, state.control)
            )
            control = jax.tree.map(jnp.add, state.control, change)
            # A client without examples has no gradients, and nothing to say.
            worked = data.size > 0
            control = jax.tree.map(
                lambda new, old: jnp.where(worked, new, old), control, state.control
            )
            fields["control"] = change
            return Message(fields=fields, weight=message.weight), ControlState(control, inner)

        return Client(init=init_client_fn, update=update_fn)

    def update_fn(fields, state, population):
        num_examples = count_examples(population)
        control = jax.tree.map(
            lambda old, total: old + (total / num_examples).astype(old.dtype),
            state,
            fields["control"],
        )
        return fields["delta"], control

    return Correction(
        init=init_fn,
        wrap=wrap_fn,
        update=update_fn,
        fields={"control": FieldSpec(send="masked", is_sum=True)},
    )


def build(settings: Settings, *, batcher: Batcher, optimizer_settings: Any) -> Correction:
    """Correct by control variates, with any local optimizer."""
    del settings, batcher, optimizer_settings  # the rule needs none of them
    return control_variates()


PARTS = {
    "scaffold": Part(
        build=build, summary="control variates (Karimireddy et al., 2020, arXiv 1910.06378)"
    )
}
