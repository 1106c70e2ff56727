"""Clients that report the squares of what enters each layer, and train nothing."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import metrics, trees
from fedjaxprune.federated import _steps
from fedjaxprune.structure.moments import losses, products
from fedjaxprune.types import Batch, Batcher, Client, Message, Model, Params

Uses = Mapping[str, products.Use]  # by the paths of the layers' kernels


def of_network(model: Model) -> losses.LossFn:
    """Make of a network's outputs in inference mode something whose products can be followed."""

    def loss(params: Params, state: Any, batch: Batch, key: Any) -> Any:
        del key  # nothing is drawn in inference
        outputs = model.predict(params, state, batch.inputs)
        total = trees.tree_sum(jax.tree.map(jnp.sum, outputs), dtype=jnp.float32)
        return total, (state, {})

    return loss


def report(model: Model, *, batcher: Batcher, uses: Uses, name: str) -> Client:
    """Report, for each input of each layer, the sum of its squares over a client's examples.

    The sums of several clients add up to those of all their examples.

    Args:
      model: the network, which is looked at in inference mode, at the broadcast weights.
      batcher: the batches.
      uses: how products use the kernels (`moments.uses`).
      name: of the message's field.

    Returns:
      A `Client` without state. Its message has the fields `name`, as `compact` gives it, and
      `metrics`, those of the loss at these weights, for the record.
    """

    def is_used(path: str, leaf: Any) -> bool:
        del leaf
        return path in uses

    look = losses.of_loss(of_network(model), prunable=is_used, kinds=("channels",))

    draw = jax.jit(batcher.batch, inline=True)  # traced once, for the shapes and for the steps

    def update_fn(key, broadcast, state, data):
        batch_key, step_key = jax.random.split(key)
        params = masks_lib.apply(broadcast.masks, broadcast.params)

        def step_fn(step, carry):
            sums, reports = carry
            batch = draw(batch_key, data, step)
            given = params, broadcast.model_state, batch, jax.random.fold_in(step_key, step)
            sums = jax.tree.map(jnp.add, sums, compact(look(*given)[2].channels, uses))
            return sums, metrics.merge(reports, model.loss(*given)[1][1])

        shapes = jax.eval_shape(lambda: compact(params, uses))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
        first = jax.eval_shape(draw, batch_key, data, jnp.int32(0))
        start = (zeros, _steps.zero_metrics(step_key, model.loss, broadcast, first))
        sums, reports = jax.lax.fori_loop(jnp.int32(0), batcher.num_steps(data), step_fn, start)
        weight = data.size.astype(jnp.float32)
        return Message(fields={name: sums, "metrics": reports}, weight=weight), state

    return Client(init=lambda params: (), update=update_fn)


def compact(squares: Params, uses: Uses) -> Any:
    """Keep one number for each input of a layer, and None in the place of other leaves."""

    def leaf(path: str, values: jax.Array) -> jax.Array | None:
        if path not in uses:
            return None
        use = uses[path]
        steps = [
            size // (use.groups if axis in use.outputs else 1)
            if axis in (*use.outputs, *use.taps)
            else 1
            for axis, size in enumerate(values.shape)
        ]
        return values[tuple(slice(None, None, step) for step in steps)]

    return trees.map_with_path(leaf, squares)


def spread(sums: Any, params: Params, uses: Uses) -> Params:
    """Undo `compact`: give each weight the number of the input that it reads, others 0."""
    found = dict(trees.items(sums))

    def leaf(path: str, weight: jax.Array) -> jax.Array:
        if path not in uses:
            return jnp.zeros(weight.shape, jnp.float32)
        values = found[path]
        for axis, size in enumerate(weight.shape):
            values = jnp.repeat(values, size // values.shape[axis], axis=axis)
        return values

    return trees.map_with_path(leaf, params)
