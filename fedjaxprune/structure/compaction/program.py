"""A network as a flat list of operations that serves any number of examples.

`trace` lists what a network's `predict` does, once with two examples and once with three.
Sizes that differ between the two are the batch's, so the list can be executed for any batch, a
symbolic one included, without the network's own code. Calls are inlined, and fast forms
(`jaxprs.equivalent_to`) are replaced by their plain forms; if one can be made again for other
sizes, the list says which operations it is equivalent to.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune.structure import jaxprs
from fedjaxprune.types import Params, State

FEW, MORE = 2, 3  # examples of the two traces
_CALLS = jaxprs.CALLS | {"custom_vjp_call_jaxpr"}
_NOT_MADE = -1  # an output that is not needed


class Linear(NamedTuple):
    """A size that grows with the batch: ``scale * batch + offset``."""

    scale: int
    offset: int


class Op(NamedTuple):
    """One operation."""

    equation: Any  # as traced with two examples, for its primitive and for the rules of `channels`
    params: dict[str, Any]  # of the primitive, with `Linear` where the batch enters
    inputs: tuple[int, ...]  # variables
    outputs: tuple[int, ...]
    bodies: tuple["Program", ...]  # the graphs that it holds (a loop's, a branch's), in order


class Block(NamedTuple):
    """Operations that a fast form can do at once."""

    again: Callable[..., jax.Array]  # the form, ``(x, kernel, bias) -> output``
    inputs: tuple[int, ...]  # variables of images, kernel and bias
    output: int
    ops: tuple[int, ...]  # indices of the operations


class Program(NamedTuple):
    """Operations over numbered variables."""

    ops: list[Op]  # in order; what no output needs is left out
    inputs: list[int]
    outputs: list[int]
    constants: dict[int, Any]  # the network's own: variable to array
    shapes: dict[int, tuple[int | Linear, ...]]  # of each variable
    dtypes: dict[int, Any]
    blocks: list[Block]  # what fast forms can do at once


def trace(
    predict: Callable[[Params, State, Any], Any], params: Params, state: State, inputs: Any
) -> Program:
    """Write down a network's program; its inputs are the leaves of params, state and inputs.

    All are arrays or shapes; of the size of the batch nothing is read.

    Raises:
      ValueError: if the network does something else for three examples than for two.
    """

    def graph(batch: int) -> Any:
        return jax.make_jaxpr(predict)(params, state, batch_of(batch, inputs))

    return _program(graph(FEW), graph(MORE))


def batch_of(size: int, inputs: Any) -> Any:
    """Give the shapes of a batch of another size."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), inputs
    )


def at(value: Any, batch: Any) -> Any:
    """Put a batch into a size, a shape or the parameters of a primitive."""
    if isinstance(value, Linear):
        return value.scale * batch + value.offset
    if isinstance(value, tuple):
        parts = [at(part, batch) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [at(part, batch) for part in value]
    if isinstance(value, dict):
        return {name: at(part, batch) for name, part in value.items()}
    return value


def _unlike(what: str) -> ValueError:
    return ValueError(
        f"the network does something else for {MORE} examples than for {FEW}: {what}."
    )


def _program(few: Any, more: Any) -> Program:
    """Pair the graphs of the two traces, closed or not."""
    draft = Program([], [], [], {}, {}, {}, [])
    pairs = zip(_open(few).invars, _open(more).invars, strict=True)
    draft.inputs.extend(_new(draft, *pair) for pair in pairs)
    draft.outputs.extend(_walk(draft, few, more, draft.inputs, None))
    return draft


def _open(graph: Any) -> Any:
    return getattr(graph, "jaxpr", graph)


def _new(draft: Program, few: Any, more: Any) -> int:
    """Number a variable."""
    number = len(draft.shapes)
    draft.shapes[number] = _merge(tuple(few.aval.shape), tuple(more.aval.shape))
    draft.dtypes[number] = few.aval.dtype
    return number


def _constant(draft: Program, few: Any, more: Any) -> int:
    """Number a constant, which must not depend on the batch."""
    number = len(draft.shapes)
    if not (isinstance(few, jax.Array) and jnp.issubdtype(few.dtype, jax.dtypes.extended)):
        few, more = np.asarray(few), np.asarray(more)
        same = few.shape == more.shape and few.dtype == more.dtype
        if not same or few.tobytes() != more.tobytes():
            raise _unlike("a constant differs")
    draft.constants[number] = few
    draft.shapes[number] = tuple(few.shape)
    draft.dtypes[number] = few.dtype
    return number


def _walk(draft: Program, few: Any, more: Any, arguments: Sequence[int], wanted: Any) -> list[int]:
    """Write down what both graphs do for their wanted outputs, side by side."""
    one, two = _open(few), _open(more)
    environments: tuple[dict[Any, int], ...] = ({}, {})
    constants = zip(getattr(few, "consts", ()), getattr(more, "consts", ()), strict=True)
    numbers = [_constant(draft, *pair) for pair in constants]
    for graph, environment in zip((one, two), environments, strict=True):
        environment.update(zip(graph.constvars, numbers, strict=True))
        environment.update(zip(graph.invars, arguments, strict=True))

    def read(a: Any, b: Any) -> int:
        if jaxprs.is_variable(a) != jaxprs.is_variable(b):
            raise _unlike("a number is a constant in one of them")
        if not jaxprs.is_variable(a):
            return _constant(
                draft, np.asarray(a.val, a.aval.dtype), np.asarray(b.val, b.aval.dtype)
            )
        number = environments[0].get(a, _NOT_MADE)
        if environments[1].get(b, _NOT_MADE) != number:
            raise _unlike("operations have other operands")
        return number

    needed = [jaxprs.live_equations(graph, wanted, as_plain=True) for graph in (one, two)]
    names = [[equation.primitive.name for equation, _ in each] for each in needed]
    if names[0] != names[1]:
        raise _unlike("the operations differ")
    for (a, flags), (b, _) in zip(*needed, strict=True):
        inputs = [read(*pair) for pair in zip(a.invars, b.invars, strict=True)]
        graphs, twins = jaxprs.graphs_of(a), jaxprs.graphs_of(b)
        if a.primitive.name == jaxprs.NAME:
            start = len(draft.ops)
            plain, twin = (jaxprs.jaxpr_of_plain(equation) for equation in (a, b))
            outputs = _walk(draft, plain, twin, inputs[1:], None)
            if a.params["again"] is not None:
                made = tuple(range(start, len(draft.ops)))
                block = Block(a.params["again"], tuple(inputs[1:]), outputs[0], made)
                draft.blocks.append(block)
        elif a.primitive.name in _CALLS and len(graphs) == 1:
            outputs = _walk(draft, graphs[0], twins[0], inputs, flags)
        else:
            outputs = [_new(draft, *pair) for pair in zip(a.outvars, b.outvars, strict=True)]
            bodies = tuple(_program(*pair) for pair in zip(graphs, twins, strict=True))
            params = {name: _merge(a.params[name], b.params[name]) for name in a.params}
            draft.ops.append(Op(a, params, tuple(inputs), tuple(outputs), bodies))
        environments[0].update(zip(a.outvars, outputs, strict=True))
        environments[1].update(zip(b.outvars, outputs, strict=True))
    return [read(*pair) for pair in zip(one.outvars, two.outvars, strict=True)]


def _merge(few: Any, more: Any) -> Any:
    """Find out how numbers depend on the batch; what holds none is taken from the first trace."""
    if isinstance(few, (bool, str)) or hasattr(few, "eqns"):
        return few
    if isinstance(few, int):
        scale = (more - few) // (MORE - FEW)
        return Linear(scale, few - scale * FEW) if more != few else few
    if isinstance(few, (tuple, list)):
        if len(few) != len(more):
            raise _unlike("an operation's parameters differ")
        parts = [_merge(*pair) for pair in zip(few, more, strict=True)]
        return type(few)(*parts) if hasattr(few, "_fields") else type(few)(parts)  # pyright: ignore[reportCallIssue]
    if isinstance(few, dict):
        return {name: _merge(few[name], more[name]) for name in few}
    return few
