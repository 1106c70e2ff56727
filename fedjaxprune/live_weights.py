"""Convolutions that normalize their live weights, and how the masks reach them.

Such a layer has no batch normalization behind it, so it does not depend on the batch. To normalize
it has to know which weights are live: a zero is not enough, as a weight that has just grown is live
and 0. So the masks are arrays in the model's state, ``state["live"][...]["kernel"]`` for the
parameter of the same path, 1 where a weight is live. They are neither trained nor sent: client and
server set them from the masks that they have anyway (`following`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import trees
from fedjaxprune.types import Algorithm, Masks, RoundState, Stage, State

COLLECTION = "live"  # of the state
EPSILON = 1e-10  # added to the squared norm of a filter


def normalize(kernel: jax.Array, live: jax.Array) -> jax.Array:
    """Give each filter's live weights mean 0 and norm 1.

    With ``n`` live weights of mean ``m`` and standard deviation ``s`` a weight `w` becomes
    ``(w - m) / (s sqrt(n))``. So neither a factor nor a constant that is common to a filter's live
    weights changes anything, and outputs have the variance of inputs. Filters with fewer than two
    live weights, or equal ones, become 0.

    A pruned weight has the gradient that it would have if it came into the convolution divided as
    the live ones are, so that methods can choose what to grow; mean and deviation ignore it.

    Args:
      kernel: ``[..., C_out]``; values of pruned weights do not matter.
      live: the same shape, 1 or True where a weight is live.

    Returns:
      The same shape; 0 where a weight is pruned.

    References:
      Huang et al., `FedMef <https://arxiv.org/abs/2403.14737>`_, 2024 (normalized sparse
      convolution); Qiao et al., `Weight standardization <https://arxiv.org/abs/1903.10520>`_, 2019.
    """
    return _normalize(kernel, live)


@jax.custom_jvp
def _normalize(kernel: jax.Array, live: jax.Array) -> jax.Array:
    return _of_live(kernel, live)[0]


@_normalize.defjvp
def _normalize_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (kernel, live), (moved, _) = primals, tangents
    normal, tangent, factor = jax.jvp(
        lambda kernel: _of_live(kernel, live), (kernel,), (moved,), has_aux=True
    )
    return normal, tangent + jnp.where(
        live.astype(jnp.bool_), jnp.zeros_like(moved), factor * moved
    )


def _of_live(kernel: jax.Array, live: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Normalize, and give the factor that does it, ``[1, ..., C_out]``, 0 without any spread."""
    axes = tuple(range(kernel.ndim - 1))
    live = live.astype(kernel.dtype)
    count = jnp.maximum(jnp.sum(live, axis=axes, keepdims=True), 1.0)
    mean = jnp.sum(live * kernel, axis=axes, keepdims=True) / count
    centered = live * (kernel - mean)
    square = jnp.sum(jnp.square(centered), axis=axes, keepdims=True)
    factor = jax.lax.rsqrt(square + EPSILON)
    known = jnp.where(square > EPSILON, factor, jnp.zeros_like(factor))
    return live * (centered * factor), jax.lax.stop_gradient(known)


def are_in(state: State) -> bool:
    """Tell from a model's state, or its shapes, whether the network normalizes live weights."""
    return isinstance(state, dict) and COLLECTION in state


def is_of_client(path: str, leaf: Any) -> bool:
    """Tell, by path in the model's state, what a client may change: all but the masks."""
    del leaf  # its path says it
    return not path.startswith(f"{COLLECTION}/")


def without(state: State) -> State:
    """Leave the masks out of a model's state, as they are not sent with it."""
    if not are_in(state):
        return state
    return {name: value for name, value in state.items() if name != COLLECTION}


def with_masks(state: State, masks: Masks) -> State:
    """Tell a network which of its weights are live.

    Args:
      state: of the model; without masks in it, it is given back as it is.
      masks: like the parameters.
    """
    if not are_in(state):
        return state
    bits = dict(zip(trees.paths(masks), jax.tree.leaves(masks), strict=True))
    live = trees.map_with_path(lambda path, leaf: bits[path].astype(leaf.dtype), state[COLLECTION])
    return {**state, COLLECTION: live}


def following(algorithm: Algorithm) -> Algorithm:
    """Let the network of a method know the masks in force, before and after each round.

    Clients that train under masks of their own normalize as if those of the server were theirs.
    """

    def told(state: RoundState) -> RoundState:
        return state._replace(model_state=with_masks(state.model_state, state.masks))

    def follow(stage: Stage) -> Stage:
        def round_fn(key, state, cohort, population):
            state, rows, metrics = stage.round(key, told(state), cohort, population)
            return told(state), rows, metrics

        return stage._replace(round=round_fn)

    return algorithm._replace(stages=tuple(map(follow, algorithm.stages)))
