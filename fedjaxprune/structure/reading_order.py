"""In which order does a network read its layers? For methods that go from input to output."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune import trees
from fedjaxprune.types import Model


def reading_order(model: Model, *, input_shape: Sequence[int]) -> list[str]:
    """List the parameters' paths in the order in which inference first uses them.

    The order is read off the traced network, so names do not matter; nothing is computed.
    Parameters that inference does not use are left out.

    Args:
      model: the network.
      input_shape: of one example, as the network takes it.
    """
    params, state = jax.eval_shape(model.init, jax.random.key(0))
    inputs = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    traced = jax.make_jaxpr(model.predict)(params, state, inputs).jaxpr
    names = dict(zip(traced.invars, trees.paths(params), strict=False))
    found: dict[str, None] = {}
    _walk(traced, names, found)
    return list(found)


def _walk(traced: Any, names: dict[Any, str], found: dict[str, None]) -> None:
    """Note the named variables that equations read, in turn, inner functions included."""
    for equation in traced.eqns:
        read = [(i, names[v]) for i, v in enumerate(equation.invars) if _is_named(v, names)]
        inner = _inner(equation)
        if inner is None:
            found.update(dict.fromkeys(name for _, name in read))
        else:
            _walk(inner, {inner.invars[i]: name for i, name in read}, found)


def _is_named(variable: Any, names: dict[Any, str]) -> bool:
    return not hasattr(variable, "val") and variable in names  # literals have a value


def _inner(equation: Any) -> Any:
    """Find the function that an equation calls, if it takes the equation's own arguments."""
    for value in equation.params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns") and len(inner.invars) == len(equation.invars):
            return inner
    return None
