"""What weights are worth to second order in the loss, with a diagonal curvature from moments.

The moments are sums over all rows of a batch at which a weight is used (example, pixel, token), as
`structure.moments.of_loss` computes them, of the gradient of the batch-mean loss.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from fedjaxprune.structure.moments.losses import Moments
from fedjaxprune.types import Params

Form = Literal["factored", "joint"]
Scale = Literal["fisher", "code"]


def fisher(
    moments: Moments, num_examples: jax.Array, *, form: Form = "factored", scale: Scale = "fisher"
) -> Params:
    """Estimate the diagonal of the empirical Fisher information of a batch.

    Args:
      moments: trees `inputs`, `outputs` and `rows`, or for the joint form `joint` and `rows`.
      num_examples: ``[]``, `B`, those that count.
      form: ``"factored"`` takes ``sum(a**2) * sum(g**2) / S`` with ``S = rows / B``, which holds if
        inputs and output gradients are independent and rows uncorrelated; ``"joint"`` takes
        ``B * sum(a**2 * g**2)``, exact where an example is one row.
      scale: ``"fisher"``, or ``"code"``: times ``S * rows**2``, as a public code has it.

    Returns:
      The tree of the parameters, float32; 0 where no product uses a weight.

    References:
      Martens and Grosse, `K-FAC <https://arxiv.org/abs/1503.05671>`_, 2015.
    """
    size = jnp.maximum(num_examples.astype(jnp.float32), 1.0)

    def leaf(rows: jax.Array, *sums: jax.Array) -> jax.Array:
        per_example = rows / size
        if form == "joint":
            value = sums[0] * size
        else:
            safe = jnp.where(rows > 0, per_example, jnp.ones_like(rows))
            value = sums[0] * (sums[1] / safe)
        return value if scale == "fisher" else value * (per_example * jnp.square(rows))

    if form == "joint":
        return jax.tree.map(leaf, moments.rows, moments.joint)
    return jax.tree.map(leaf, moments.rows, moments.inputs, moments.outputs)


def removal(params: Params, grads: Params, curvature: Params) -> Params:
    """Estimate how much the loss rises if a weight becomes zero: ``-g * w + c * w**2 / 2``.

    It may be negative. A weight that is zero has 0.
    """

    def leaf(weight: jax.Array, grad: jax.Array, curved: jax.Array) -> jax.Array:
        weight, grad = weight.astype(jnp.float32), grad.astype(jnp.float32)
        return 0.5 * jnp.square(weight) * curved - grad * weight

    return jax.tree.map(leaf, params, grads, curvature)


def gain(grads: Params, curvature: Params) -> Params:
    """Estimate how much the loss falls if a weight makes its best step: ``g**2 / (2 * c)``.

    It does not depend on the scale of the loss where `curvature` is `fisher`, and is then at most
    half the rows of an example. It is 0 where the curvature is 0.
    """

    def leaf(grad: jax.Array, curved: jax.Array) -> jax.Array:
        grad = grad.astype(jnp.float32)
        safe = jnp.where(curved > 0, curved, jnp.ones_like(curved))
        return jnp.where(curved > 0, 0.5 * grad * (grad / safe), jnp.zeros_like(curved))

    return jax.tree.map(leaf, grads, curvature)
