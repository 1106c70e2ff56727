"""What of a network's variables is state: kept from step to step, of one shape and type."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import trees
from fedjaxprune.types import State

# Collections of a linen module that are made anew by each call, whatever it is.
SOWN = ("intermediates", "losses", "aux_loss", "aux_losses", "summaries", "perturbations")


def check(state: State) -> State:
    """Refuse a state that cannot be averaged over clients.

    Raises:
      TypeError: a leaf is a key, complex, or no array of numbers.
    """
    for path, leaf in trees.items(state):
        kinds = (jnp.floating, jnp.integer, jnp.bool_)
        if not any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds):
            raise TypeError(
                f"the network's state {path!r} is {leaf.dtype}, and must be real numbers or "
                "booleans, as it is averaged over clients; a key is an argument of the call or a "
                "random stream."
            )
    return state


def keep_like(before: State, after: State) -> State:
    """Take from a state after a step what there was before it, in the same types.

    What else there is was sown, and the next call makes it anew.

    Raises:
      ValueError: a leaf is gone, or is no longer of its shape or kind of numbers.
    """
    found = dict(trees.items(after))
    kept = []
    for path, old in trees.items(before):
        if path not in found:
            raise ValueError(f"the network's state {path!r} is gone after a step of training.")
        new = jnp.asarray(found[path])
        is_float = all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in (old, new))
        if old.shape != new.shape or not (is_float or old.dtype == new.dtype):
            raise ValueError(
                f"the network's state {path!r} is {_kind(old)} before a step of training and "
                f"{_kind(new)} after it, and must keep its shape and type."
            )
        kept.append(new.astype(old.dtype))
    return jax.tree.unflatten(jax.tree.structure(before), kept)


def without_sown(before: State, after: State) -> State:
    """Leave out of nested dictionaries the tuples that one more call makes longer."""
    kept = {}
    for name, value in before.items():
        if isinstance(value, dict):
            inside = without_sown(value, after.get(name, {}))
            kept |= {name: inside} if inside or not value else {}
        elif not isinstance(value, tuple) or len(after.get(name, ())) == len(value):
            kept[name] = value
    return kept


def has_tuples(state: State) -> bool:
    """Tell whether a state has entries that may have been sown."""
    if isinstance(state, dict):
        return any(map(has_tuples, state.values()))
    return isinstance(state, tuple)


def _kind(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
