"""Predict what a program needs in memory, before it is compiled, from what its graph keeps alive.

Compilers do not make every value of a graph: what is computed entry by entry is fused into its only
reader, a reshape is the same memory, and a loop writes its new values over the old ones. With these
three rules and the graph's own order the largest sum of values alive at a time is a prediction, not
a bound: `used` asks the compiler what it came to.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from fedjaxprune.kernels import chosen
from fedjaxprune.structure import jaxprs

# fmt: off
_SAME_MEMORY = frozenset((
    "reshape", "squeeze", "expand_dims", "stop_gradient", "copy", "name", "stands_for", "stored",
    "optimization_barrier", "sharding_constraint",
))
# Computed where they are read, unless a product, a loop or the outside reads them.
_FUSED = frozenset((
    "abs", "acos", "add", "add_any", "and", "asin", "atan", "atan2", "bitcast_convert_type",
    "broadcast_in_dim", "cbrt", "ceil", "clamp", "convert_element_type", "cos", "cosh", "div", "eq",
    "erf", "erf_inv", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "iota",
    "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg",
    "nextafter", "not", "or", "pad", "pow", "population_count", "random_bits", "random_wrap",
    "random_unwrap", "reduce_precision", "rem", "rev", "round", "rsqrt", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "slice", "split",
    "sqrt", "square", "sub", "tan", "tanh", "xor",
))
# Computed again for every reader; others are fused only into a single one.
_CHEAP = frozenset(("broadcast_in_dim", "convert_element_type", "iota", "pad", "slice", "split"))
_READS_FUSED = _FUSED | frozenset((
    "reduce_sum", "reduce_max", "reduce_min", "reduce_or", "reduce_and", "reduce_prod", "argmax",
    "argmin", "concatenate", "dynamic_slice", "dynamic_update_slice", "gather", "transpose",
))
# fmt: on


class ProgramMemory(NamedTuple):
    """What a program holds, in bytes.

    Attributes:
      arguments: of its inputs.
      outputs: of its outputs.
      temporaries: of what it needs besides, at the worst time.
    """

    arguments: int
    outputs: int
    temporaries: int


class _Operation(NamedTuple):
    name: str
    inputs: list[int]
    outputs: list[int]
    inner: int  # bytes that the graphs inside need


def predict(function: Callable[..., Any], *args: Any) -> ProgramMemory:
    """Predict the memory of the compiled ``function(*args)``.

    Args:
      function: what will be compiled.
      *args: trees of arrays or of their shapes.
    """
    graph = chosen.opened(jax.make_jaxpr(function)(*args), on_cpu=True).jaxpr
    return ProgramMemory(
        arguments=sum(_size(v) for v in graph.invars),
        outputs=sum(_size(v) for v in graph.outvars),
        temporaries=_temporaries(graph),
    )


def used(function: Callable[..., Any], *args: Any) -> ProgramMemory:
    """Compile ``function(*args)`` and ask XLA what it holds; a jitted function keeps its options.

    Of donated arguments the memory is counted on both sides.
    """
    return of_compiled(getattr(function, "lower", jax.jit(function).lower)(*args).compile())


def of_compiled(compiled: jax.stages.Compiled) -> ProgramMemory:
    """Ask XLA what a compiled program holds.

    Raises:
      ValueError: if XLA does not tell.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError(f"XLA does not tell the memory of programs on {jax.default_backend()!r}.")
    return ProgramMemory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
    )


def size(tree: Any) -> int:
    """Add up the bytes of a tree of arrays or of their shapes."""
    return sum(_size_of(leaf) for leaf in jax.tree.leaves(tree))


def _size(atom: Any) -> int:
    return _size_of(atom.aval)


def _size_of(leaf: Any) -> int:
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return math.prod(leaf.shape) * 8  # threefry: two words
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _temporaries(graph: Any) -> int:
    """Find the most bytes alive at a time, but for the graph's inputs and outputs."""
    sizes: list[int] = []
    operations: list[_Operation] = []
    inputs = [_new(sizes, v) for v in graph.invars]
    outputs = _flatten(graph, inputs, sizes, operations)
    return _peak(sizes, operations, set(inputs), outputs)


def _new(sizes: list[int], atom: Any) -> int:
    sizes.append(_size(atom))
    return len(sizes) - 1


def _flatten(graph: Any, inputs: Sequence[int], sizes: list[int], operations: list) -> list[int]:
    """List a graph's operations with those of the functions that it calls in their places."""
    graph = getattr(graph, "jaxpr", graph)
    nodes = dict(zip(graph.invars, inputs, strict=True))
    nodes |= {v: _new(sizes, v) for v in graph.constvars}

    def read(atom: Any) -> int:
        return nodes[atom] if jaxprs.is_variable(atom) else _new(sizes, atom)

    for equation, _ in jaxprs.live_equations(graph, as_plain=False):
        name = equation.primitive.name
        operands = [read(v) for v in equation.invars]
        if name in jaxprs.CALLS:
            (body,) = jaxprs.graphs_of(equation)
            nodes.update(
                zip(equation.outvars, _flatten(body, operands, sizes, operations), strict=True)
            )
            continue
        inner = max(map(_inside, jaxprs.graphs_of(equation)), default=0)
        results = [_new(sizes, v) for v in equation.outvars]
        operations.append(_Operation(name, operands, results, inner))
        nodes.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in graph.outvars]


def _inside(graph: Any) -> int:
    return _temporaries(getattr(graph, "jaxpr", graph))


def _peak(
    sizes: Sequence[int], operations: Sequence[_Operation], inputs: set[int], outputs: list[int]
) -> int:
    readers: dict[int, list[str]] = {}
    for operation in operations:
        for node in operation.inputs:
            readers.setdefault(node, []).append(operation.name)

    # What each value is made from that lies in memory: itself, or through what is fused into it.
    held: dict[int, frozenset[int]] = {}
    made: set[int] = set()
    for operation in operations:
        behind = frozenset().union(*(held.get(node, {node}) for node in operation.inputs))
        for node in operation.outputs:
            reading = readers.get(node, [])
            is_read_in_place = all(name in _READS_FUSED for name in reading) and (
                len(reading) <= 1 or operation.name in _CHEAP
            )
            if operation.name in _SAME_MEMORY:
                held[node] = held.get(operation.inputs[0], frozenset({operation.inputs[0]}))
            elif operation.name in _FUSED and is_read_in_place and node not in outputs:
                held[node] = behind
            else:
                held[node] = frozenset({node})
                made.add(node)

    last: dict[int, int] = {}
    for time, operation in enumerate(operations):
        for node in operation.inputs:
            last.update(dict.fromkeys(held.get(node, {node}), time))
    kept = inputs.union(*(held.get(node, {node}) for node in outputs))

    alive = peak = 0
    for time, operation in enumerate(operations):
        new = sum(sizes[n] for n in operation.outputs if n in made and n not in kept)
        ending = frozenset().union(*(held.get(n, {n}) for n in operation.inputs))
        freed = sum(sizes[n] for n in ending if n in made and n not in kept and last[n] == time)
        is_in_place = operation.name in _FUSED or operation.name in ("scan", "while", "scatter")
        before = min(new, freed) if is_in_place else 0
        peak = max(peak, alive + new - before + operation.inner)
        alive += new - freed
        alive -= sum(
            sizes[n] for n in operation.outputs if n in made and n not in kept and n not in last
        )
    return peak
