"""What is a weight worth? Larger is kept; how many, and where, is not asked here."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune.types import Key, Params, PrunerInputs

ScoreFn = Callable[[Key, PrunerInputs], Any]  # -> the tree of the parameters, float32


def magnitude(key: Key, inputs: PrunerInputs) -> Params:
    """Score a weight by its absolute value."""
    del key  # deterministic
    return jax.tree.map(lambda leaf: jnp.abs(leaf.astype(jnp.float32)), inputs.params)


def value(key: Key, inputs: PrunerInputs) -> Params:
    """Score a weight by what stands in its place: for what is a score already."""
    del key  # deterministic
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), inputs.params)


def random(key: Key, inputs: PrunerInputs) -> Params:
    """Score weights uniformly at random in [0, 1)."""
    leaves, structure = jax.tree.flatten(inputs.params)
    keys = jax.random.split(key, len(leaves))
    values = [
        jax.random.uniform(leaf_key, leaf.shape, jnp.float32)
        for leaf_key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, values)


def gradient(key: Key, inputs: PrunerInputs) -> Params:
    """Score a weight by the absolute value of its mean dense gradient.

    Raises:
      ValueError: while tracing, if the clients report no gradient.

    References:
      Evci et al., `RigL <https://arxiv.org/abs/1911.11134>`_, 2020 (what to grow).
    """
    del key  # deterministic
    grads = _grads("gradient", "the mean dense gradient", inputs)
    return jax.tree.map(lambda grad: jnp.abs(grad.astype(jnp.float32)), grads)


def saliency(key: Key, inputs: PrunerInputs) -> Params:
    """Score a weight by ``|weight * gradient|``, the loss that goes with it to first order.

    Raises:
      ValueError: while tracing, if the clients report no gradient.

    References:
      Lee et al., `SNIP <https://arxiv.org/abs/1810.02340>`_, 2019 (there normalized to sum 1, which
      does not change the order).
    """
    del key  # deterministic
    grads = _grads("saliency", "weight times mean dense gradient", inputs)
    return jax.tree.map(
        lambda leaf, grad: jnp.abs(leaf.astype(jnp.float32) * grad.astype(jnp.float32)),
        inputs.params,
        grads,
    )


def _grads(name: str, by: str, inputs: PrunerInputs) -> Params:
    if inputs.grads is None:
        raise ValueError(
            f"scores.{name} ranks weights by {by}, but PrunerInputs.grads is None: "
            "the clients must report their dense gradients."
        )
    return inputs.grads
