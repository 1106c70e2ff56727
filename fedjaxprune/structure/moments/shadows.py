"""What accompanies a followed leaf from operation to operation: dummies in the same places."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from fedjaxprune.structure import moves
from fedjaxprune.structure.channels.propagation import elementwise
from fedjaxprune.structure.moments.rows import Rows

# The operands whose entries these move; the others say where to.
_MOVED = {"pad": 1, "dynamic_slice": 1, "gather": 1}
MOVES = frozenset(moves.MOVES) | _MOVED.keys()
BY_ENTRY = (
    elementwise.KEEPS_ZERO
    | elementwise.LOSES_ZERO
    | elementwise.BINARY
    | {"select_n", "clamp", "name", "sharding_constraint"}
) - {"stop_gradient", "optimization_barrier"}


class Shadow(NamedTuple):
    """What follows a leaf.

    Attributes:
      path: how the leaf came here, the same for the same layout of its entries.
      dummies: by kind, float32 arrays of the value's shape.
    """

    path: Any
    dummies: Mapping[str, jax.Array]


class Value(NamedTuple):
    """A value of the traced loss.

    Attributes:
      array: itself.
      rows: which of its rows belong to which example.
      shadows: by the names of the leaves of whose entries it is made, one by one.
    """

    array: Any
    rows: Rows
    shadows: Mapping[str, Shadow] = {}


def bind(equation: Any, arrays: Sequence[Any]) -> list[Any]:
    """Execute an equation as it was traced."""
    primitive, functions = equation.primitive, ()
    params = primitive.get_bind_params(equation.params)
    if isinstance(params, tuple):  # functions apart, in some versions of JAX
        functions, params = params
    with equation.ctx.manager:
        outputs = primitive.bind(*functions, *arrays, **params)
    return list(outputs) if primitive.multiple_results else [outputs]


def bound(equation: Any, operands: Sequence[Value], rows: Sequence[Rows]) -> list[Value]:
    """Execute an equation on values; what comes out has no shadows."""
    outputs = bind(equation, [value.array for value in operands])
    return [Value(*pair) for pair in zip(outputs, rows, strict=True)]


def refuse(values: Sequence[Value], why: str) -> NoReturn:
    """Raise an error that names the first leaf among the values.

    Raises:
      ValueError: always.
    """
    name = next(name for value in values for name in value.shadows)
    raise ValueError(f"there are no moments of {name!r}: {why}; leave it out of `prunable`.")


def by_entry(name: str, operands: Sequence[Value], output: Value) -> Value:
    """Let the shadows pass what works entry by entry."""
    if not jnp.issubdtype(output.array.dtype, jnp.inexact):
        return output
    passed: dict[str, Shadow] = {}
    for value in operands:
        if value.array.shape != output.array.shape:
            if name in BY_ENTRY and value.shadows:
                refuse([value], f"{name!r} spreads one entry over many")
            continue
        for leaf, shadow in value.shadows.items():
            if passed.setdefault(leaf, shadow).path != shadow.path:
                refuse([value], f"{name!r} combines its entries with one another")
    return output._replace(shadows=passed)


def move(equation: Any, operands: Sequence[Value], outputs: list[Value]) -> list[Value]:
    """Move the dummies as the entries."""
    name = equation.primitive.name
    moved = operands[: _MOVED.get(name, len(operands))]
    places = operands[len(moved) :]
    if any(value.shadows for value in places):
        refuse(places, f"it says to {name!r} where or with what")
    kinds = next(shadow.dummies for value in moved for shadow in value.shadows.values())
    result: list[dict[str, Shadow]] = [{} for _ in outputs]
    for leaf in dict.fromkeys(leaf for value in moved for leaf in value.shadows):
        own = [value.shadows.get(leaf) for value in moved]
        arrays = [[_dummy(v, s, kind) for v, s in zip(moved, own, strict=True)] for kind in kinds]
        fixed = [_as_filling(value.array, name) for value in places]
        made = [bind(equation, [*each, *fixed]) for each in arrays]
        path = (
            name,
            str(equation.params),
            tuple(None if shadow is None else shadow.path for shadow in own),
            tuple(id(value.array) for value in places),
        )
        for i, shadows in enumerate(result):
            dummies = {kind: each[i] for kind, each in zip(kinds, made, strict=True)}
            shadows[leaf] = Shadow((path, i), dummies)
    return [out._replace(shadows=each) for out, each in zip(outputs, result, strict=True)]


def _dummy(value: Value, shadow: Shadow | None, kind: str) -> jax.Array:
    if shadow is None:
        return jnp.zeros(value.array.shape, jnp.float32)
    return shadow.dummies[kind]


def _as_filling(array: Any, name: str) -> Any:
    """Fill up with zeros; indices stay."""
    return jnp.zeros((), jnp.float32) if name == "pad" else array


def dummies_of(values: Sequence[Value]) -> Any:
    """List all dummies, for a function that is to take them as arguments."""
    return [{leaf: dict(s.dummies) for leaf, s in value.shadows.items()} for value in values]


def with_dummies(values: Sequence[Value], arrays: Any, dummies: Any) -> list[Value]:
    """Put arrays and dummies in the place of those of `values`."""
    return [
        Value(
            array,
            value.rows,
            {leaf: Shadow(s.path, own[leaf]) for leaf, s in value.shadows.items()},
        )
        for value, array, own in zip(values, arrays, dummies, strict=True)
    ]
