"""Bilinear operations whose form is chosen where a program is lowered, not where it is traced.

A convolution and its gradients by either operand are a family: each is linear in both of its
operands, and its transposes are in the family again. A family is one primitive here. It knows the
forms that are fast on CPUs and those for other platforms, and runs neither while a program is
traced: the form that the platform wants is traced when the program is lowered. So one trace serves
all platforms, and there are derivatives of any order, forward and reverse.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

_bilinear = core.Primitive("bilinear")

Form = Callable[[jax.Array, jax.Array], jax.Array]
Shape = tuple[int, ...]


class Forms(NamedTuple):
    """The three operations of a family, each a function of two arrays that `jax.vmap` can map.

    Attributes:
      output: ``(first, second) -> output``.
      first: ``(cotangent of the output, second) -> cotangent of first``.
      second: ``(first, cotangent of the output) -> cotangent of second``.
    """

    output: Form
    first: Form
    second: Form


class Family(NamedTuple):
    """A bilinear operation with its transposes.

    Equal families are lowered once in a program: make them in a function that is cached.

    Attributes:
      shapes: of first, second and output.
      cpu: forms for CPUs.
      other: forms for all other platforms.
      together: the same where a ``vmap`` maps both operands; `other` if it is None.
      in_turn: whether such a ``vmap`` is a loop there, and `other` runs once for each client.
    """

    shapes: tuple[Shape, Shape, Shape]
    cpu: Forms
    other: Forms
    together: Forms | None = None
    in_turn: bool = False


def transposed(output: Form, first: jax.ShapeDtypeStruct, second: jax.ShapeDtypeStruct) -> Forms:
    """Complete a form by its transposes, as JAX makes them."""

    def by_first(cotangent: jax.Array, known: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda x: output(x, known), first)(cotangent)[0]

    def by_second(known: jax.Array, cotangent: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda x: output(known, x), second)(cotangent)[0]

    return Forms(output, by_first, by_second)


def apply(family: Family, first: jax.Array, second: jax.Array) -> jax.Array:
    """Apply a family's operation to operands of its shapes and of one floating-point type."""
    over = _varying(first), _varying(second)  # axes of a mesh, within a checked `jax.shard_map`
    first, second = (
        jax.lax.pcast(x, tuple(more), to="varying") if (more := (over[0] | over[1]) - own) else x
        for x, own in zip((first, second), over, strict=True)
    )
    precision = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009  # of this trace
    params = {"family": family, "kind": "output", "axes": (), "precision": precision}
    return _bilinear.bind(first, second, **params)


def _varying(x: jax.Array) -> frozenset[str]:
    return frozenset(getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", ()))


# Of each `vmap`, the outermost first, which of the two operands have its axis. The axes lead, in
# this order, and the output has all of them.
_Axes = tuple[tuple[bool, bool], ...]

# The transposes: by the operation and the operand whose cotangent is wanted, the operation that
# gives it, and the places of its operands among (first, second, cotangent).
_TRANSPOSES = {
    ("output", 0): ("first", (2, 1)),
    ("output", 1): ("second", (0, 2)),
    ("first", 0): ("output", (2, 1)),
    ("first", 1): ("second", (2, 0)),
    ("second", 0): ("first", (1, 2)),
    ("second", 1): ("output", (0, 2)),
}


def _function(
    family: Family, kind: str, axes: _Axes, precision: str | None, *, on_cpu: bool
) -> Form:
    """Give the form for a platform, mapped."""
    forms = family.cpu if on_cpu else family.other
    if not on_cpu and family.together is not None and any(map(all, axes)):
        forms = family.together
    form = getattr(forms, kind)
    for level in reversed(axes):
        if all(level) and family.in_turn and not on_cpu:
            form = _in_turn(form)
        else:
            form = jax.vmap(form, tuple(0 if has else None for has in level))

    def run(first: jax.Array, second: jax.Array) -> jax.Array:
        with jax.default_matmul_precision(precision):  # pyright: ignore[reportArgumentType]
            return form(first, second)

    return run


FORMS = _bilinear, _function  # for `chosen.opened`


def _in_turn(form: Form) -> Form:
    return lambda first, second: jax.lax.map(lambda pair: form(*pair), (first, second))


def _abstract(first: Any, second: Any, *, family: Family, kind: str, axes: _Axes, **_: Any) -> Any:
    lead, places = [], [0, 0]
    for level in axes:
        side = 0 if level[0] else 1
        lead.append((first, second)[side].shape[places[side]])
        places = [place + has for place, has in zip(places, level, strict=True)]
    own = family.shapes[("first", "second", "output").index(kind)]
    return first.update(shape=(*lead, *own), weak_type=False)


@functools.lru_cache(maxsize=512)
def _compiled(**params: Any) -> Any:
    return jax.jit(functools.partial(_bilinear.bind, **params))


def _batch(values: Any, dims: Any, *, axes: _Axes, **params: Any) -> Any:
    moved = [v if d is None else jnp.moveaxis(v, d, 0) for v, d in zip(values, dims, strict=True)]
    level = (dims[0] is not None, dims[1] is not None)
    return _bilinear.bind(*moved, axes=(level, *axes), **params), 0


def _transpose(
    side: int, cotangent: Any, first: Any, second: Any, *, kind: str, axes: _Axes, **params: Any
) -> Any:
    """Give the cotangent of one operand, summed over each ``vmap`` that the operand is not in."""
    kind, places = _TRANSPOSES[kind, side]
    operands = [(first, second, cotangent)[place] for place in places]
    levels = tuple(tuple((*level, True)[place] for place in places) for level in axes)
    found = _bilinear.bind(*operands, kind=kind, axes=levels, **params)
    shared = tuple(i for i, level in enumerate(axes) if not level[side])
    return jnp.sum(found, axis=shared) if shared else found


def _lowering(*, on_cpu: bool) -> Any:
    def lower(first: Any, second: Any, **params: Any) -> Any:
        return _function(**params, on_cpu=on_cpu)(first, second)

    return mlir.lower_fun(lower, multiple_results=False)


_bilinear.def_impl(lambda first, second, **params: _compiled(**params)(first, second))
_bilinear.def_abstract_eval(_abstract)
batching.primitive_batchers[_bilinear] = _batch
ad.defbilinear(_bilinear, functools.partial(_transpose, 0), functools.partial(_transpose, 1))
mlir.register_lowering(_bilinear, _lowering(on_cpu=False))
mlir.register_lowering(_bilinear, _lowering(on_cpu=True), platform="cpu")
