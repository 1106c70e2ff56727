"""Clients that train alone until their loss stops improving, and report how far weights moved.

Each client (an *explorer*) starts from its own copy of the broadcast model and uses only its own
data. The report is a score of the weights, not a step for the server: the loss depends most on the
weights that moved far.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjaxprune import masks as masks_lib
from fedjaxprune import metrics
from fedjaxprune.federated import _optax, _steps
from fedjaxprune.federated.local_training import Local, LossFn
from fedjaxprune.types import Batcher, Client, Masks, Message, Metrics, Params


class _Progress(NamedTuple):
    """State of an explorer between two epochs."""

    local: Local
    metrics: Metrics
    epoch: jax.Array
    best: jax.Array  # lowest loss so far
    num_stale: jax.Array  # epochs since


def until_no_improvement(
    loss: LossFn,
    *,
    epoch: Batcher,
    optimizer: optax.GradientTransformation,
    max_epochs: int,
    patience: int,
    watch: Literal["epoch", "last_step"] = "epoch",
    validation: Client | None = None,
) -> Client:
    """Train for at most `max_epochs`, or until the loss has not improved for `patience` epochs.

    A loss improves if it falls strictly below the lowest loss so far. The result is the weights of
    the last epoch, not those of the lowest loss. All epochs share one optimizer state.

    Args:
      loss: as in a `Model`; its metrics have the accumulator ``loss``.
      epoch: one pass over the client's examples; each pass has a key of its own.
      optimizer: any optax transformation, as in `local_sgd`.
      max_epochs: at least 1 (AutoFLIP's code: 150).
      patience: at least 1 (AutoFLIP's code: 40).
      watch: the loss that must improve: the mean over the batches of an epoch, or the loss of its
        last batch, as in AutoFLIP's code.
      validation: if given, the loss is the field `losses` of this client's message for the model
        after each epoch (`batch_norm.losses` on examples that are not in `epoch`); `watch` is
        ignored.

    Returns:
      A `Client` without state of its own. Its message has the fields `delta`, `model_state` (a
      delta too) and `metrics`: the training losses of all epochs, and ``epochs``, the number of
      epochs. Its weight is the number of examples. A client without examples to train on takes no
      step and has weight 0.

    Raises:
      ValueError: if a number or a name is out of range.

    References:
      Internò et al., `AutoFLIP <https://arxiv.org/abs/2405.10271>`_, 2024.
    """
    if max_epochs < 1:
        raise ValueError(f"max_epochs must be at least 1, got {max_epochs}.")
    if patience < 1:
        raise ValueError(f"patience must be at least 1, got {patience}.")
    if watch not in ("epoch", "last_step"):
        raise ValueError(f"watch must be 'epoch' or 'last_step', got {watch!r}.")

    def update_fn(key, broadcast, state, data):
        batch_key, step_key, look_key = jax.random.split(key, 3)
        start = masks_lib.apply(broadcast.masks, broadcast.params)
        num_steps = epoch.num_steps(data)
        first = jax.eval_shape(lambda: epoch.batch(batch_key, data, jnp.int32(0)))
        nothing = _steps.zero_metrics(step_key, loss, broadcast, first)

        def epoch_fn(progress):
            keys = tuple(jax.random.fold_in(k, progress.epoch) for k in (batch_key, step_key))
            local, seen, latest = jax.lax.fori_loop(
                jnp.int32(0),
                num_steps,
                _step_fn(loss, epoch, optimizer, keys, broadcast, data),
                (progress.local, nothing, nothing),
            )
            value = metrics.value((seen if watch == "epoch" else latest)["loss"])
            if validation is not None:
                now = broadcast._replace(params=local.params, model_state=local.model_state)
                message = validation.update(look_key, now, (), data)[0]
                # Without a label to look at there is no loss, and 0 would be the best of all.
                value = jnp.where(message.weight > 0, message.fields["losses"], value)
            is_better = value < progress.best
            return _Progress(
                local=local,
                metrics=metrics.merge(progress.metrics, seen),
                epoch=progress.epoch + 1,
                best=jnp.where(is_better, value, progress.best),
                num_stale=jnp.where(is_better, jnp.int32(0), progress.num_stale + 1),
            )

        end = _Progress(
            local=Local(start, _steps.optimizer_init(optimizer, start), broadcast.model_state),
            metrics=nothing,
            epoch=jnp.int32(0),
            best=jnp.float32(jnp.inf),
            num_stale=jnp.int32(0),
        )
        limit = jnp.where(num_steps > 0, jnp.int32(max_epochs), jnp.int32(0))
        end = jax.lax.while_loop(
            lambda p: (p.epoch < limit) & (p.num_stale < patience), epoch_fn, end
        )
        num_epochs = metrics.Mean(end.epoch.astype(jnp.float32), jnp.float32(1.0))
        after = end.local
        fields = {
            **_steps.changes(after.params, start, after.model_state, broadcast.model_state),
            "metrics": {**end.metrics, "epochs": num_epochs},
        }
        weight = jnp.where(num_steps > 0, data.size, jnp.zeros_like(data.size))
        return Message(fields=fields, weight=weight.astype(jnp.float32)), state

    return Client(init=lambda params: (), update=update_fn)


def _step_fn(loss, epoch, optimizer, keys, broadcast, data):
    """Make a local step under the masks, which also keeps its own metrics apart."""

    def step_fn(step, carry):
        (params, optimizer_state, model_state), seen, _ = carry
        batch = epoch.batch(keys[0], data, step)
        given = model_state, batch, jax.random.fold_in(keys[1], step)
        (value, (model_state, latest)), grads = jax.value_and_grad(loss, has_aux=True)(
            params, *given
        )
        grads = masks_lib.apply(broadcast.masks, grads)
        of_loss = _optax.Loss(value, lambda params: loss(params, *given)[0])
        updates, optimizer_state = _steps.optimizer_step(
            optimizer, grads, optimizer_state, params, loss=of_loss
        )
        params = masks_lib.apply(broadcast.masks, optax.apply_updates(params, updates))
        local = Local(params, optimizer_state, model_state)
        return local, metrics.merge(seen, latest), latest

    return step_fn


def deviations(delta: Params) -> Params:
    """Square how far every weight moved, in float32, where less than 1e-19 is no move."""
    return jax.tree.map(lambda leaf: jnp.square(leaf.astype(jnp.float32)), delta)


def report(
    client: Client, *, readings: Mapping[str, Callable[[Params, Masks], Any]], keep: tuple[str, ...]
) -> Client:
    """Replace a client's message by fields that are computed from its delta.

    Args:
      client: its message has a `delta`.
      readings: by name of a new field, ``(delta, masks) -> tree``.
      keep: fields of the client's own message that are kept.
    """

    def update_fn(key, broadcast, state, data):
        message, state = client.update(key, broadcast, state, data)
        read = {
            name: reading(message.fields["delta"], broadcast.masks)
            for name, reading in readings.items()
        }
        own = {name: tree for name, tree in message.fields.items() if name in keep}
        return message._replace(fields={**own, **read}), state

    return Client(init=client.init, update=update_fn)
