"""Clients that send what they have trained only if their loss has fallen since they last did."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import metrics as metrics_lib
from fedjaxprune import trees
from fedjaxprune.federated.local_training import Local, LocalStep, LossFn, PostStepFn
from fedjaxprune.metrics import Mean
from fedjaxprune.traffic import SILENT
from fedjaxprune.types import Client, State

NEVER = 1e18  # the loss of a client that has sent nothing so far; below `cohort.VALUE_LIMIT`


class LastSent(NamedTuple):
    """What a client remembers.

    Attributes:
      loss: ``[]`` float32, when it last sent what it had trained.
      inner: state of the client that trains.
    """

    loss: jax.Array
    inner: State


MakeFn = Callable[[LossFn, PostStepFn], Client]


def if_improved(make: MakeFn, loss: LossFn, *, num_epochs: int) -> Client:
    """Send what was trained if its loss is below that of the last time; else be silent.

    The loss is the mean over the batches of the round's last epoch. A client that has never sent
    anything sends. Sending is decided here; `rounds` makes of a silent client one that is absent,
    keeps its state, and counts one bit.

    Args:
      make: ``(loss, post_step) -> client`` that trains, such as `local_training.local_sgd`.
      loss: as in a `Model`; its metrics have the accumulator ``loss``.
      num_epochs: passes over its examples that a client makes in a round; 1 takes all local steps.

    Returns:
      A `Client` whose message also has the field `traffic.SILENT`, ``[]`` bool.

    References:
      Xu et al., `FL-PQSU <https://doi.org/10.1109/ACCESS.2021.3063291>`_, 2021. Its code takes the
      loss of the last batch.
    """

    def with_sums(params, model_state, batch, key):
        value, (after, found) = loss(params, model_state[0], batch, key)
        return value, ((after, model_state[1]), found)

    def post_step(step: LocalStep) -> Local:
        epoch = jnp.maximum(step.num_steps // num_epochs, 1)
        counts = step.step >= step.num_steps - epoch
        before: Mean = step.before.model_state[1]
        sums = trees.tree_where(counts, metrics_lib.merge(before, step.metrics["loss"]), before)
        return step.after._replace(model_state=(step.after.model_state[0], sums))

    inner = make(with_sums, post_step)

    def update_fn(key, broadcast, state, data):
        start = (broadcast.model_state, metrics_lib.zero())
        given = broadcast._replace(model_state=start)
        message, after = inner.update(key, given, state.inner, data)
        moved, sums = message.fields["model_state"]
        now = sums.total / jnp.where(sums.weight > 0, sums.weight, jnp.ones_like(sums.weight))
        improves = (now < state.loss) & (sums.weight > 0)
        fields = {**message.fields, "model_state": moved, SILENT: ~improves}
        return message._replace(fields=fields), LastSent(loss=now, inner=after)

    def init_fn(params):
        return LastSent(loss=jnp.float32(NEVER), inner=inner.init(params))

    return Client(init=init_fn, update=update_fn)


def with_state_of(later: Client, client: Client) -> Client:
    """Train as a `client` without state does, beside the state of a `later` one, which stays."""

    def update_fn(key, broadcast, state, data):
        message, _ = client.update(key, broadcast, client.init(broadcast.params), data)
        return message, state

    return Client(init=later.init, update=update_fn)
