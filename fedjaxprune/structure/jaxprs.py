"""Read programs: what a fast form computes, which equations are needed, in which order layers are.

A convolution written as a product with a kernel spread out among zeros does more arithmetic than
the convolution. `equivalent_to` ties its output to the plain form: the compiled program does not
contain it and the plain form is not even traced, but a walk of the graph (`costs.flops`) finds
it, and `plain` swaps the one for the other. So a kernel that no walker can look into (Pallas, a
foreign call) is counted too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from fedjaxprune import trees
from fedjaxprune.types import Model

_stands_for = core.Primitive("stands_for")
NAME = _stands_for.name


def equivalent_to(
    output: Any,
    plain: Callable[..., jax.Array],
    *operands: jax.Array,
    again: Callable[..., jax.Array] | None = None,
    tapped: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Return `output` unchanged, and note that it is what ``plain(*operands)`` would be.

    Derivatives go through `output`, however it was made; `plain` is never run in a program.

    Args:
      output: ``[...]``, from the fast form.
      plain: a pure function of the operands, in operations that XLA knows; it closes over no
        arrays.
      operands: what both forms take.
      again: the fast form as a function of ``(x, kernel, bias)``, if those are the operands, for
        other sizes; adding to every output of the convolution in it must be the same as adding to
        the bias. So a smaller network may take it.
      tapped: ``(backward, operands, rest, dummies) -> output``, if the fast form multiplies rows
        ``[B * r, K]``, `r` of each example, with a matrix ``[K, N]`` made of the second operand,
        ``[..., O]``, where the plain form convolves the first one with it. It is the fast form,
        whose derivative gives ``backward(operands, rest, (rows, errors, place))`` as the gradient
        of `dummies`: errors ``[B * r, N]`` are the gradient of the outputs (one channel's are every
        `O` columns; 0 for what is no output of the convolution), and `place` adds up a gradient of
        the matrix to one of the operand.
    """
    return _stands_for.bind(output, *operands, plain=plain, again=again, tapped=tapped)


def _batch(
    values: Any, axes: Any, *, plain: Callable[..., jax.Array], again: Any, tapped: Any
) -> Any:
    del again, tapped  # they know no further axis
    if axes[0] is None or all(axis is None for axis in axes[1:]):
        return values[0], axes[0]  # the output depends on other things: the mark is lost
    mapped = jax.vmap(plain, in_axes=tuple(axes[1:]), out_axes=axes[0])
    return _stands_for.bind(*values, plain=mapped, again=None, tapped=None), axes[0]


def _differentiate(primals: Any, tangents: Any, **params: Any) -> Any:
    return _stands_for.bind(*primals, **params), tangents[0]


_stands_for.def_impl(lambda output, *operands, **forms: output)
_stands_for.def_abstract_eval(lambda output, *operands, **forms: output)
mlir.register_lowering(_stands_for, lambda context, output, *operands, **forms: [output])
batching.primitive_batchers[_stands_for] = _batch
ad.primitive_jvps[_stands_for] = _differentiate


# fmt: off
# Operations that run the one graph that they hold, once, on their operands.
CALLS = frozenset((
    "jit", "pjit", "closed_call", "core_call", "call", "remat", "remat2", "checkpoint",
    "custom_jvp_call", "custom_vjp_call", "custom_vmap_call", "composite",
))
# fmt: on


def live_equations(graph: Any, live_outputs: Any = None, *, as_plain: bool) -> list[Any]:
    """List the equations that the outputs need, in order, each with what is needed of its outputs.

    Args:
      graph: a jaxpr, closed or not.
      live_outputs: for each output whether it is needed; by default all are.
      as_plain: whether the operands of the plain form are needed in the place of the fast one.
    """
    return _live(graph, live_outputs, as_plain)[0]


def _live(graph: Any, live_outputs: Any, as_plain: bool) -> tuple[list[Any], list[bool]]:
    """List the needed equations and their needed outputs, and tell which inputs are needed."""
    graph = getattr(graph, "jaxpr", graph)
    flags = [True] * len(graph.outvars) if live_outputs is None else live_outputs
    needed = {v for v, flag in zip(graph.outvars, flags, strict=True) if flag and is_variable(v)}
    kept = []
    for equation in reversed(graph.eqns):
        wanted = [v in needed for v in equation.outvars]
        if not equation.effects and not any(wanted):
            continue
        kept.append((equation, wanted))
        uses = [True] * len(equation.invars)
        if equation.primitive is _stands_for:
            uses = [not as_plain] + [as_plain] * (len(uses) - 1)
        elif equation.primitive.name in CALLS and not equation.effects:
            (body,) = graphs_of(equation)
            uses = _live(body, wanted, as_plain)[1]
        pairs = zip(equation.invars, uses, strict=True)
        needed.update(v for v, use in pairs if use and is_variable(v))
    return kept[::-1], [v in needed for v in graph.invars]


def is_variable(atom: Any) -> bool:
    """Tell a jaxpr's variable from a literal."""
    return not isinstance(atom, core.Literal)


def jaxpr_of_plain(equation: Any) -> Any:
    """Trace the plain form that an equation of the primitive `NAME` carries."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars[1:]]
    return jax.make_jaxpr(equation.params["plain"])(*shapes)


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make the function with the plain form in the place of every fast one.

    It is what to hand to XLA's cost analysis, or to look at the residuals of, where the layer is
    meant and not the trick. It computes the same up to rounding, and is differentiated by JAX's own
    rules.

    Raises:
      ValueError: while tracing, if a plain form closes over arrays.
    """

    def plain_fn(*args: Any) -> Any:
        graph, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        outputs = core.jaxpr_as_fun(_rewrite(graph))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return plain_fn


def _rewrite(graph: Any) -> Any:
    """Put plain forms into a jaxpr, closed or not, and drop the equations that are not needed."""
    inner = getattr(graph, "jaxpr", graph)
    new = inner.replace(
        eqns=[_rewrite_equation(e) for e, _ in live_equations(inner, as_plain=True)]
    )
    return new if inner is graph else graph.replace(jaxpr=new)


def _rewrite_equation(equation: Any) -> Any:
    if equation.primitive is _stands_for:
        return call(equation.params["plain"], equation.invars[1:], equation.outvars)
    if not any(is_marked(graph) for graph in graphs_of(equation)):
        return equation
    if equation.primitive.name in ("custom_jvp_call", "custom_vjp_call"):
        # The derivatives are those of the plain form, not the ones that were given.
        body = core.jaxpr_as_fun(_rewrite(equation.params["call_jaxpr"]))
        return call(body, equation.invars, equation.outvars)
    return equation.replace(params=map_graphs(_rewrite, equation.params))


def call(function: Callable[..., Any], inputs: Any, outputs: Any) -> Any:
    """Make the equation that calls a function of one graph's variables.

    Raises:
      ValueError: the function closes over arrays.
    """
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in inputs]
    made = jax.make_jaxpr(jax.jit(function))(*shapes).eqns[-1]
    if len(made.invars) != len(inputs):
        raise ValueError(
            "the plain form of a layer closes over arrays; hand them to jaxprs.equivalent_to as "
            "operands."
        )
    return made.replace(invars=list(inputs), outvars=list(outputs))


def graphs_of(equation: Any) -> list[Any]:
    """List the jaxprs, closed or not, that an equation holds."""
    found = []
    for value in equation.params.values():
        entries = value if isinstance(value, (tuple, list)) else (value,)
        found += [entry for entry in entries if hasattr(entry, "eqns")]
    return found


def map_graphs(function: Callable[[Any], Any], params: dict[str, Any]) -> dict[str, Any]:
    """Put ``function(graph)`` in the place of every jaxpr in an equation's parameters."""

    def walk(value: Any) -> Any:
        if isinstance(value, (tuple, list)) and any(hasattr(entry, "eqns") for entry in value):
            return type(value)(walk(entry) for entry in value)
        return function(value) if hasattr(value, "eqns") else value

    return {name: walk(value) for name, value in params.items()}


def parts_of_scan(equation: Any) -> tuple[int, int]:
    """Count a loop's constants and what it carries, of its operands; slices are the rest.

    By shapes, since the parameters that count are not the same in every JAX: what is stacked has an
    axis more outside than inside, what is carried has not.
    """
    (body,) = graphs_of(equation)
    inner = getattr(body, "jaxpr", body)

    def num_stacked(outside: Any, inside: Any) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(len(a.aval.shape) != len(b.aval.shape) for a, b in pairs)

    num_carried = len(equation.outvars) - num_stacked(equation.outvars, inner.outvars)
    num_slices = num_stacked(equation.invars, inner.invars)
    return len(equation.invars) - num_carried - num_slices, num_carried


def is_marked(graph: Any) -> bool:
    """Tell whether a fast form lies somewhere inside a jaxpr, closed or not."""
    return any(
        equation.primitive is _stands_for or any(map(is_marked, graphs_of(equation)))
        for equation in graph.eqns
    )


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
    _note_reads(traced, names, found)
    return list(found)


def _note_reads(traced: Any, names: dict[Any, str], found: dict[str, None]) -> None:
    """Note the named variables that equations read, in turn, inner functions included."""
    for equation in traced.eqns:
        read = [
            (i, names[v]) for i, v in enumerate(equation.invars) if is_variable(v) and v in names
        ]
        graphs = (getattr(graph, "jaxpr", graph) for graph in graphs_of(equation))
        inner = next((g for g in graphs if len(g.invars) == len(equation.invars)), None)
        if inner is None:
            found.update(dict.fromkeys(name for _, name in read))
        else:  # a function that takes the equation's own arguments
            _note_reads(inner, {inner.invars[i]: name for i, name in read}, found)
