"""Synaptic flow: how much of a network's output passes through each weight, without data."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import trees
from fedjaxprune.types import Params, State

PredictFn = Callable[[Params, State, Any], jax.Array]  # as in a `Model`

# Powers of 2 of the input that are tried in turn until the flow is neither 0 nor infinite.
_EXPONENTS = (0.0, -60.0, -120.0, 60.0, 120.0)


def absolute(params: Params) -> Params:
    """Take absolute values, and zero in the place of biases, through which the flow would leak.

    A bias is a leaf whose last name is ``bias`` or ``b``.
    """

    def leaf(path, values):
        is_bias = path.rsplit("/", 1)[-1] in ("bias", "b")
        return jnp.zeros_like(values) if is_bias else jnp.abs(values)

    return trees.map_with_path(leaf, params)


def gradients(
    predict: PredictFn, params: Params, model_state: State, inputs: Any
) -> tuple[Params, jax.Array]:
    """Differentiate the flow: the sum of the outputs for an input of ones.

    Input and output are scaled by powers of 2 that take the network's growth back, so that deep
    networks neither overflow nor underflow in float32, as long as the output is 2⁻²⁴⁰ to 2²⁴⁰ times
    the input. This is exact for a network whose output is proportional to its input
    (`is_proportional`).

    Args:
      predict: in inference mode.
      params: absolute values (`absolute`), those of pruned weights zero.
      model_state: what is not trained, at its initial values.
      inputs: tree of shapes of one example as a batch, ``[1, ...]``.

    Returns:
      The gradient, and the scaled flow ``[]`` float32. In a chain of layers weight times gradient
      adds up to the flow over each layer. Both are in an unknown unit, the same for all layers.
    """

    def flow(params, exponent):
        scale = jnp.exp2(exponent)
        ones = jax.tree.map(lambda x: jnp.full(x.shape, scale, x.dtype), inputs)
        return jnp.sum(predict(params, model_state, ones), dtype=jnp.float32)

    exponents = jnp.asarray(_EXPONENTS, jnp.float32)

    def is_lost(carry):
        number, found = carry
        return ~(jnp.isfinite(found) & (found > 0)) & (number < len(_EXPONENTS) - 1)

    def next_one(carry):
        number = carry[0] + 1
        return number, flow(params, exponents[number])

    number, found = jax.lax.while_loop(
        is_lost, next_one, (jnp.int32(0), flow(params, exponents[0]))
    )
    is_found = jnp.isfinite(found) & (found > 0)
    growth = jnp.log2(jnp.where(is_found, found, 1.0)) - exponents[number]
    half = jnp.where(is_found, jnp.round(growth / 2), 0.0)
    scaled, grads = jax.value_and_grad(lambda params: jnp.exp2(-half) * flow(params, -half))(params)
    return grads, scaled


def is_proportional(predict: PredictFn, params: Any, model_state: Any, inputs: Any) -> jax.Array:
    """Tell whether a network's output is proportional to its input, at positive weights: ``[]``.

    Then the flow is conserved. Sigmoids, gates, attention and normalization by the input's own
    statistics (GroupNorm, LayerNorm) are not proportional. Some weights are made up for the test,
    such that nothing overflows.

    Args:
      predict: in inference mode.
      params: tree of shapes.
      model_state: tree of shapes of what is not trained; means are taken as 0, variances as 1.
      inputs: tree of shapes of one example as a batch, ``[1, ...]``.
    """

    def spread(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.linspace(0.5, 1.5, math.prod(shape), dtype=dtype).reshape(shape)

    def weight(leaf: Any) -> jax.Array:
        num_inputs = math.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 1
        return spread(leaf.shape, leaf.dtype) / max(num_inputs, 1)

    def initial(path: str, leaf: Any) -> jax.Array:
        value = 1 if path.rsplit("/", 1)[-1] == "var" else 0
        return jnp.full(leaf.shape, value, leaf.dtype)

    made = absolute(jax.tree.map(weight, params))
    state = trees.map_with_path(initial, model_state)
    some = jax.tree.map(lambda x: spread(x.shape, x.dtype), inputs)
    once = predict(made, state, some)
    twice = predict(made, state, jax.tree.map(lambda x: x * 2, some))
    return jnp.all(jnp.abs(twice - 2 * once) <= 1e-3 * jnp.max(jnp.abs(twice)))
