"""Clients that report the loss or derivatives of it over their examples, and train nothing."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import metrics
from fedjaxprune.federated import _steps
from fedjaxprune.federated.local_training import LossFn
from fedjaxprune.traffic import DENSE_GRADIENT
from fedjaxprune.types import Batcher, Broadcast, Client, Masks, Message, Params

ObjectiveFn = Callable[[Params], tuple[jax.Array, Any]]  # params -> (loss of a batch, metrics)


class Given(NamedTuple):
    """What a client differentiates.

    Attributes:
      broadcast: the model; derivatives are taken at the weights under its masks.
      direction: tree of the parameters that a product is taken with, or ``()``.
    """

    broadcast: Broadcast
    direction: Params = ()

    @property
    def masks(self) -> Masks:
        """The masks of the broadcast."""
        return self.broadcast.masks


class Derivative(NamedTuple):
    """What is computed of a batch.

    Attributes:
      compute: ``(objective, params, direction) -> (tree of the parameters, metrics)``.
      num_gradients: what it costs, in gradients, for the record of arithmetic.
    """

    compute: Callable[[ObjectiveFn, Params, Params], tuple[Params, Any]]
    num_gradients: int = 1


def gradient() -> Derivative:
    """Take the gradient of the loss."""
    return Derivative(lambda objective, params, _: jax.grad(objective, has_aux=True)(params))


def sensitivity() -> Derivative:
    """Take ``|weight * gradient|``: by batch, so that signs of other batches cannot cancel it."""

    def compute(objective, params, direction):
        del direction
        grads, report = jax.grad(objective, has_aux=True)(params)
        return jax.tree.map(lambda leaf, grad: jnp.abs(leaf * grad), params, grads), report

    return Derivative(compute)


def curvature() -> Derivative:
    """Take the Hessian of the loss times the direction, forward over reverse.

    Only this order works on every network here: some layers have derivatives of their own, which
    have no second reverse rule.
    """

    def compute(objective, params, direction):
        grad = jax.grad(objective, has_aux=True)
        _, product, report = jax.jvp(grad, (params,), (direction,), has_aux=True)
        return product, report

    return Derivative(compute, num_gradients=2)


def report(loss: LossFn, *, batcher: Batcher, name: str, derivative: Derivative) -> Client:
    """Report the mean of a derivative over a client's examples, at the broadcast weights.

    Args:
      loss: as in a `Model`, so in training mode.
      batcher: the batches; the mean is over their examples.
      name: of the message's field.
      derivative: of a batch.

    Returns:
      A `Client` without state that takes `Given` for its broadcast. Its message has the fields
      `name` and `metrics`; its weight is the number of its examples.
    """
    draw = jax.jit(batcher.batch, inline=True)  # traced once, for the shapes and for the steps

    def update_fn(key, given, state, data):
        broadcast, direction = given
        params = masks_lib.apply(broadcast.masks, broadcast.params)
        batch_key, step_key = jax.random.split(key)

        def objective(params, batch, own_key):
            value, (_, found) = loss(params, broadcast.model_state, batch, own_key)
            return value, found

        def step_fn(step, carry):
            sums, total, seen = carry
            batch = draw(batch_key, data, step)
            given = {"batch": batch, "own_key": jax.random.fold_in(step_key, step)}
            tree, found = derivative.compute(
                functools.partial(objective, **given), params, direction
            )
            weight = jnp.sum(batch.weights)
            sums = jax.tree.map(lambda old, new: old + weight.astype(new.dtype) * new, sums, tree)
            return sums, total + weight, metrics.merge(seen, found)

        first = jax.eval_shape(draw, batch_key, data, jnp.int32(0))
        nothing = _steps.zero_metrics(step_key, loss, broadcast, first)
        start = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0.0), nothing)
        sums, total, seen = jax.lax.fori_loop(jnp.int32(0), batcher.num_steps(data), step_fn, start)
        number = jnp.where(total > 0, total, jnp.ones_like(total))
        mean = jax.tree.map(lambda leaf: leaf / number.astype(leaf.dtype), sums)
        seen = {**seen, DENSE_GRADIENT: metrics.Mean(total=total, weight=total)}
        costs = jax.tree.map(lambda leaf: leaf * derivative.num_gradients, seen)
        weight = data.size.astype(jnp.float32)
        return Message(fields={name: mean, "metrics": costs}, weight=weight), state

    return Client(init=lambda params: (), update=update_fn)


def mean_loss(loss: LossFn, *, batcher: Batcher) -> Client:
    """Report the mean loss over a client's examples, at the broadcast weights, in training mode.

    Args:
      loss: as in a `Model`; its metrics have the accumulator ``loss``.
      batcher: the batches; the mean is over their examples.

    Returns:
      A `Client` without state. Its message has the fields `loss`, ``[]``, and `metrics`; its weight
      is the number of its examples.
    """
    draw = jax.jit(batcher.batch, inline=True)  # traced once, for the shapes and for the steps

    def update_fn(key, broadcast, state, data):
        params = masks_lib.apply(broadcast.masks, broadcast.params)
        batch_key, step_key = jax.random.split(key)

        def step_fn(step, seen):
            batch, own_key = draw(batch_key, data, step), jax.random.fold_in(step_key, step)
            _, (_, found) = loss(params, broadcast.model_state, batch, own_key)
            return metrics.merge(seen, found)

        first = jax.eval_shape(draw, batch_key, data, jnp.int32(0))
        nothing = _steps.zero_metrics(step_key, loss, broadcast, first)
        seen = jax.lax.fori_loop(jnp.int32(0), batcher.num_steps(data), step_fn, nothing)
        weight = jnp.where(seen["loss"].weight > 0, seen["loss"].weight, jnp.float32(1.0))
        fields = {"loss": seen["loss"].total / weight, "metrics": seen}
        return Message(fields=fields, weight=data.size.astype(jnp.float32)), state

    return Client(init=lambda params: (), update=update_fn)


def first_batches(batcher: Batcher, num_batches: int | None) -> Batcher:
    """Take at most so many batches of a client; None takes all."""
    if num_batches is None:
        return batcher
    return batcher._replace(
        num_steps=lambda data: jnp.minimum(batcher.num_steps(data), num_batches)
    )
