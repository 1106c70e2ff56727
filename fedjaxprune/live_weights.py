"""Convolutions that normalize their live weights, and how the masks reach them.

Such a layer has no batch normalization behind it, so it does not depend on the batch. To normalize
it has to know which weights are live: a zero is not enough, as a weight that has just grown is live
and 0. So the masks are arrays in the model's state, ``state["live_weights"][...]["kernel"]`` for
the parameter of the same path, 1 where a weight is live. They are neither trained nor sent: client
and server set them from the masks that they have anyway (`rounds.stages.telling_masks`, and
`local_training` before each step). A layer of your own may ask for masks in the same way.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import trees
from fedjaxprune.types import Masks, Params, State

COLLECTION = "live_weights"  # of the state
EPSILON = 1e-6  # least squared norm, about its mean, that a filter is divided by the root of


def normalize(kernel: jax.Array, live: jax.Array) -> jax.Array:
    """Give each filter's live weights mean 0 and norm 1.

    With ``n`` live weights of mean ``m`` and standard deviation ``s`` a weight `w` becomes
    ``(w - m) / (s sqrt(n))``. So neither a factor nor a constant that is common to a filter's live
    weights changes anything, and outputs have the variance of inputs. Filters with fewer than two
    live weights, or equal ones, become 0; what is nearly equal (`EPSILON`) is divided by 0.001, so
    that weights that have all grown at 0 have gradients of a sensible size.

    A pruned weight has the gradient that it would have if it came into the convolution divided as
    the live ones are, so that methods can choose what to grow; mean and deviation ignore it. Where
    these have no spread it counts undivided, so that a filter that has died may grow again.

    Statistics are taken in float32 at least, whatever the kernel is in.

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
    """Normalize, and give the factor that does it, ``[1, ..., C_out]``, 1 without any spread."""
    axes, dtype = tuple(range(kernel.ndim - 1)), kernel.dtype
    kernel = kernel.astype(jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype)
    live = live.astype(kernel.dtype)
    count = jnp.maximum(jnp.sum(live, axis=axes, keepdims=True), 1.0)
    mean = jnp.sum(kernel * live, axis=axes, keepdims=True) / count
    centered = (kernel - mean) * live
    square = jnp.sum(jnp.square(centered), axis=axes, keepdims=True)
    factor = jax.lax.rsqrt(jnp.maximum(square, EPSILON))
    known = jnp.where(square > EPSILON, factor, jnp.ones_like(factor))
    normal = centered * factor * live
    return normal.astype(dtype), jax.lax.stop_gradient(known).astype(dtype)


def are_in(state: State) -> bool:
    """Tell from a model's state, or its shapes, whether the network normalizes live weights."""
    return isinstance(state, dict) and COLLECTION in state


def check(params: Params, state: State) -> None:
    """Refuse a state whose collection of this name is something else than masks.

    Args:
      params: tree of arrays or shapes.
      state: likewise.

    Raises:
      ValueError: an array of it is not of the path and shape of a parameter.
    """
    if not are_in(state):
        return
    shapes = {path: jnp.shape(leaf) for path, leaf in trees.items(params)}
    for path, leaf in trees.items(state[COLLECTION]):
        if shapes.get(path) != jnp.shape(leaf):
            raise ValueError(
                f"the collection {COLLECTION!r} of a network's state is for the masks of its "
                "parameters, each at its parameter's path and of its shape, but there is no "
                f"parameter {path!r} of shape {jnp.shape(leaf)}: give the collection another name."
            )


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
