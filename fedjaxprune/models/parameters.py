"""What can be learnt: real numbers, as many as an int32 counts."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fedjaxprune import live_weights, trees
from fedjaxprune.types import Params, State

_INT32_MAX = 2**31 - 1


def check(params: Params, state: State) -> None:
    """Refuse parameters that would be trained wrongly or counted wrongly, by shapes and types.

    Args:
      params: tree of arrays, of shapes or of Python's numbers.
      state: likewise, what is not trained.

    Raises:
      ValueError: a parameter is no real number, the state is complex or has masks that fit no
        parameter (`live_weights.check`), or there are more entries than an int32 counts.
    """
    for path, leaf in trees.items(params):
        dtype = _dtype(leaf)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(
                f"parameters must be real, but {path!r} is {dtype}, along whose imaginary part "
                "gradient descent climbs: make its real and imaginary parts two parameters."
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"parameters must be floating numbers, but {path!r} is {dtype}: keep what is not "
                "trained in the state."
            )
    for path, leaf in trees.items(state):
        if jnp.issubdtype(_dtype(leaf), jnp.complexfloating):
            raise ValueError(
                f"the state of a network must be real, but {path!r} is {_dtype(leaf)}: make its "
                "real and imaginary parts two arrays."
            )
    live_weights.check(params, state)
    total = sum(math.prod(np.shape(leaf)) for _, leaf in trees.items(params))
    if total > _INT32_MAX:
        path, leaf = max(trees.items(params), key=lambda item: math.prod(np.shape(item[1])))
        raise ValueError(
            f"a network may have at most {_INT32_MAX} parameters, got {total}, of which "
            f"{math.prod(np.shape(leaf))} in {path!r}."
        )


def check_values(params: Params, state: State) -> None:
    """Refuse a start from which every round would be dropped; traced arrays are left alone.

    Raises:
      ValueError: a parameter, or a value of the state, is not finite.
    """
    for what, tree in (("parameter", params), ("state", state)):
        for path, leaf in trees.items(tree):
            if isinstance(leaf, Tracer) or not jnp.issubdtype(_dtype(leaf), jnp.floating):
                continue
            bad = ~np.isfinite(np.asarray(leaf))
            if bad.any():
                raise ValueError(
                    f"a network must start from finite values, but {int(bad.sum())} of {bad.size} "
                    f"in the {what} {path!r} are not."
                )


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
