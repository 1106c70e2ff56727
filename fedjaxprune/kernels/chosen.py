"""Functions whose form is chosen where a program is lowered, and the graph of a platform's forms.

Like `bilinear`, but for any function: neither form is traced before the program is lowered. There
are derivatives by forward mode only, so a function that is trained through has a derivative of its
own (`jax.custom_vjp`), made of two such functions.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from fedjaxprune.kernels import bilinear
from fedjaxprune.structure import jaxprs

_chosen = core.Primitive("chosen")
_chosen.multiple_results = True

Form = Callable[..., Sequence[jax.Array]]


def call(cpu: Form, other: Form, like: Sequence[jax.ShapeDtypeStruct], *operands: Any) -> Any:
    """Call one of two functions of arrays, which one the platform decides; a list of arrays.

    Args:
      cpu: the form for CPUs, closed over no arrays.
      other: the form for all other platforms.
      like: what both of them return.
      *operands: arrays.
    """
    outputs = tuple((tuple(one.shape), jnp.dtype(one.dtype)) for one in like)
    return _chosen.bind(*operands, cpu=cpu, other=other, like=outputs, axes=())


def _function(cpu: Form, other: Form, like: Any, axes: Any, *, on_cpu: bool) -> Form:
    """Give the form for a platform, mapped; `axes` says of each ``vmap`` which operands it maps."""
    del like
    form = cpu if on_cpu else other
    for level in reversed(axes):
        form = jax.vmap(form, tuple(0 if has else None for has in level))
    return lambda *operands: list(form(*operands))


def opened(graph: Any, *, on_cpu: bool) -> Any:
    """Put calls of a platform's forms into a jaxpr, closed or not, in the place of the choice.

    Whoever counts what is executed, or what memory it takes, looks at this graph.
    """
    inner = getattr(graph, "jaxpr", graph)

    def one(equation: Any) -> Any:
        for primitive, function in ((_chosen, _function), bilinear.FORMS):
            if equation.primitive is primitive:
                form = function(**equation.params, on_cpu=on_cpu)
                return jaxprs.call(form, equation.invars, equation.outvars)
        body = functools.partial(opened, on_cpu=on_cpu)
        return equation.replace(params=jaxprs.map_graphs(body, equation.params))

    new = inner.replace(eqns=[one(equation) for equation in inner.eqns])
    return new if inner is graph else graph.replace(jaxpr=new)


def _abstract(*operands: Any, like: Any, axes: Any, **forms: Any) -> Any:
    del forms
    lead, places = [], [0] * len(operands)
    for level in axes:
        side = level.index(True)
        lead.append(operands[side].shape[places[side]])
        places = [place + has for place, has in zip(places, level, strict=True)]
    first = operands[0]
    return [
        first.update(shape=(*lead, *shape), dtype=dtype, weak_type=False) for shape, dtype in like
    ]


@functools.lru_cache(maxsize=128)
def _compiled(**params: Any) -> Any:
    return jax.jit(functools.partial(_chosen.bind, **params))


def _batch(values: Any, dims: Any, *, axes: Any, **params: Any) -> Any:
    moved = [v if d is None else jnp.moveaxis(v, d, 0) for v, d in zip(values, dims, strict=True)]
    level = tuple(d is not None for d in dims)
    outputs = _chosen.bind(*moved, axes=(level, *axes), **params)
    return outputs, [0] * len(outputs)


def _differentiate(primals: Any, tangents: Any, *, like: Any, axes: Any, **forms: Any) -> Any:
    """Take both forms' derivatives by forward mode."""

    def derived(form: Form) -> Form:
        def run(*operands: jax.Array) -> Any:
            half = len(operands) // 2
            values, moves = jax.jvp(lambda *x: list(form(*x)), operands[:half], operands[half:])
            return [*values, *moves]

        return run

    both = {name: derived(form) for name, form in forms.items()}
    given = [*primals, *map(ad.instantiate_zeros, tangents)]
    levels = tuple((*level, *level) for level in axes)
    outputs = _chosen.bind(*given, like=(*like, *like), axes=levels, **both)
    return outputs[: len(like)], outputs[len(like) :]


def _lowering(*, on_cpu: bool) -> Any:
    return mlir.lower_fun(lambda *operands, **params: _function(**params, on_cpu=on_cpu)(*operands))


_chosen.def_impl(lambda *operands, **params: _compiled(**params)(*operands))
_chosen.def_abstract_eval(_abstract)
batching.primitive_batchers[_chosen] = _batch
ad.primitive_jvps[_chosen] = _differentiate
mlir.register_lowering(_chosen, _lowering(on_cpu=False))
mlir.register_lowering(_chosen, _lowering(on_cpu=True), platform="cpu")
