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


def statistic(name: str) -> ScoreFn:
    """Score a weight by what clients or the method say of it.

    Args:
      name: of the tree in ``inputs.statistics``.

    Returns:
      A score that raises a ValueError while tracing if there is no such tree.
    """

    def score(key: Key, inputs: PrunerInputs) -> Params:
        del key  # deterministic
        found = dict(inputs.statistics).get(name)
        if found is None:
            raise ValueError(
                f"scores.statistic ranks weights by the statistic {name!r}, but "
                "PrunerInputs.statistics has none of this name."
            )
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found)

    return score


def input_norm(name: str) -> ScoreFn:
    """Score a weight by its absolute value times the norm of the input that it reads.

    Args:
      name: of the tree in ``inputs.statistics`` with the sums of squares of these inputs.

    Returns:
      A score that raises a ValueError while tracing if there is no such tree.

    References:
      Sun et al., `Wanda <https://arxiv.org/abs/2306.11695>`_, 2024.
    """
    squares = statistic(name)

    def score(key: Key, inputs: PrunerInputs) -> Params:
        norms = jax.tree.map(jnp.sqrt, squares(key, inputs))
        return jax.tree.map(jnp.multiply, magnitude(key, inputs), norms)

    return score


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


def gradient_flow(key: Key, inputs: PrunerInputs) -> Params:
    """Score a weight by weight times (Hessian times gradient), with its sign.

    To first order, removing a weight of score `s` changes half the squared norm of the gradient by
    ``-s``: what is removed first harms the gradient least. The sign is part of the score.

    Raises:
      ValueError: while tracing, if ``inputs.statistics`` has no tree ``"curvature"``, the Hessian
        times the gradient.

    References:
      Wang et al., `GraSP <https://arxiv.org/abs/2002.07376>`_, 2020.
    """
    del key  # deterministic
    if "curvature" not in dict(inputs.statistics):
        raise ValueError(
            "scores.gradient_flow ranks weights by weight times (Hessian times gradient): "
            "PrunerInputs.statistics must have a tree named 'curvature'."
        )
    return jax.tree.map(
        lambda leaf, product: leaf.astype(jnp.float32) * product.astype(jnp.float32),
        inputs.params,
        inputs.statistics["curvature"],
    )


def lamp(key: Key, inputs: PrunerInputs) -> Params:
    """Score a weight by its square over the sum of its own and all larger squares of its leaf.

    The largest weight of every leaf scores exactly 1, so that one pool empties no leaf while it
    keeps as many weights as there are leaves. The scale of a leaf does not matter. Of equal weights
    the lower flat index counts as the larger.

    References:
      Lee et al., `Layer-adaptive sparsity for the magnitude-based pruning
      <https://arxiv.org/abs/2010.07611>`_, 2021.
    """
    del key  # deterministic

    def leaf(values: jax.Array) -> jax.Array:
        sizes = jnp.abs(values.astype(jnp.float32)).ravel()
        largest = jnp.max(sizes, initial=0.0)
        scaled = sizes / jnp.where(largest > 0, largest, jnp.ones_like(largest))
        order = jnp.argsort(-scaled, stable=True)
        squares = jnp.square(scaled[order])
        shares = squares / jnp.maximum(jnp.cumsum(squares), jnp.finfo(jnp.float32).tiny)
        return jnp.zeros_like(sizes).at[order].set(shares).reshape(values.shape)

    return jax.tree.map(leaf, inputs.params)


def _grads(name: str, by: str, inputs: PrunerInputs) -> Params:
    if inputs.grads is None:
        raise ValueError(
            f"scores.{name} ranks weights by {by}, but PrunerInputs.grads is None: "
            "the clients must report their dense gradients."
        )
    return inputs.grads
