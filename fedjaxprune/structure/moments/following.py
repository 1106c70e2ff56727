"""Play a traced loss equation by equation, and follow the leaves to the products that use them.

Each followed leaf is accompanied by dummies of its shape. What moves the leaf's entries moves the
dummies; what changes entries one by one (a mask, a straight-through function) leaves them as they
are. At a product with a value they go into `products.tap`, so their gradients are the sums, which
JAX brings back into the leaf's own layout. All other equations are executed as they were traced.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjaxprune.structure import jaxprs, moves
from fedjaxprune.structure.channels.propagation import elementwise
from fedjaxprune.structure.moments import products
from fedjaxprune.structure.moments import rows as rows_lib
from fedjaxprune.structure.moments.products import Marks, Site
from fedjaxprune.structure.moments.rows import ANY, UNCLEAR, Rows, Sizes

_OPENED = frozenset(("jit", "pjit", "closed_call", "core_call", "call"))
_REMAT = frozenset(("remat", "remat2", "checkpoint"))
_CUSTOM = frozenset(("custom_jvp_call", "custom_vjp_call", "custom_vmap_call"))
# The operands whose entries these move; the others say where to.
_MOVED = {"pad": 1, "dynamic_slice": 1, "gather": 1}
_MOVES = frozenset(moves.MOVES) | _MOVED.keys()
_BY_ENTRY = (
    elementwise.KEEPS_ZERO
    | elementwise.LOSES_ZERO
    | elementwise.BINARY
    | {"select_n", "clamp", "name", "sharding_constraint"}
) - {"stop_gradient", "optimization_barrier"}
_ENDS = frozenset(("stop_gradient", "argmax", "argmin", "reduce"))  # and reduce_...


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


class Context(NamedTuple):
    """What is the same for all equations."""

    sizes: Sizes
    marks: Marks
    kinds: tuple[str, ...]


def play(
    context: Context, graph: Any, twin: Any, operands: Sequence[Value], live: Any = None
) -> list[Value]:
    """Play a graph, closed or not.

    Args:
      context: sizes, marks and kinds.
      graph: as traced for the batch.
      twin: the same, traced for another number of examples.
      operands: of the graph.
      live: for each output whether it is needed; None: all.

    Raises:
      ValueError: a leaf's use cannot be followed; it names the leaf.
    """
    one = getattr(graph, "jaxpr", graph)
    known = dict(zip(one.invars, operands, strict=True))
    for variable, const in zip(one.constvars, getattr(graph, "consts", ()), strict=True):
        known[variable] = Value(const, rows_lib.of_constant(const))

    def read(atom: Any) -> Value:
        if jaxprs.is_variable(atom):
            return known[atom]
        return Value(np.asarray(atom.val, atom.aval.dtype), rows_lib.of_constant(atom.aval))

    followed = {id(e): (other, wanted) for e, other, wanted in rows_lib.pairs(graph, twin, live)}
    for equation in one.eqns:
        given = [read(v) for v in equation.invars]
        if id(equation) in followed:
            outputs = _step(context, equation, *followed[id(equation)], given)
        else:  # inside of a fast form, whose plain form is followed
            outputs = _bound(
                equation, given, [rows_lib.of_constant(v.aval) for v in equation.outvars]
            )
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in one.outvars]


def _bind(equation: Any, arrays: Sequence[Any]) -> list[Any]:
    """Execute an equation as it was traced."""
    primitive, functions = equation.primitive, ()
    params = primitive.get_bind_params(equation.params)
    if isinstance(params, tuple):  # functions apart, in some versions of JAX
        functions, params = params
    with equation.ctx.manager:
        outputs = primitive.bind(*functions, *arrays, **params)
    return list(outputs) if primitive.multiple_results else [outputs]


def _bound(equation: Any, operands: Sequence[Value], rows: Sequence[Rows]) -> list[Value]:
    outputs = _bind(equation, [value.array for value in operands])
    return [Value(*pair) for pair in zip(outputs, rows, strict=True)]


def _refuse(values: Sequence[Value], why: str) -> NoReturn:
    name = next(name for value in values for name in value.shadows)
    raise ValueError(f"there are no moments of {name!r}: {why}; leave it out of `prunable`.")


def _step(
    context: Context, equation: Any, twin: Any, wanted: Any, operands: Sequence[Value]
) -> list[Value]:
    """Play one equation."""
    name = equation.primitive.name
    rows = rows_lib.step(equation, twin, [v.rows for v in operands], context.sizes, wanted)
    if name == jaxprs.NAME and any(value.shadows for value in operands[1:]):
        return _fast_form(context, equation, twin, operands, rows)
    if name == jaxprs.NAME or not any(value.shadows for value in operands):
        return _bound(equation, operands, rows)
    if name in _OPENED:
        (body,), (other,) = rows_lib.bodies(equation), rows_lib.bodies(twin)
        return play(context, body, other, operands, wanted)
    if name in _RULES:
        return _RULES[name](context, equation, twin, operands, rows)
    if name in products.PRODUCTS:
        return [_product(context, equation, operands, rows[0])]
    outputs = _bound(equation, operands, rows)
    if name in _ENDS or (name.startswith("reduce_") and name != "reduce_precision"):
        return outputs
    if any(map(_is_fed, outputs)):
        _refuse(operands, f"{name!r} combines it with the examples outside of a product")
    if name in _MOVES:
        return _move(equation, operands, outputs)
    if name == "optimization_barrier":
        return [out._replace(shadows=v.shadows) for v, out in zip(operands, outputs, strict=True)]
    if name in _CUSTOM and any(map(_has_products, jaxprs.graphs_of(equation))):
        _refuse(operands, f"a product lies inside a {name!r}, whose derivative is its own")
    if name in _BY_ENTRY or name in _CUSTOM:
        return [_by_entry(name, operands, out) for out in outputs]
    _refuse(operands, f"its entries cannot be followed through {name!r}")


def _is_fed(value: Value) -> bool:
    """Tell whether the examples enter a floating-point value."""
    return value.rows.is_fed and jnp.issubdtype(value.array.dtype, jnp.inexact)


def _has_products(graph: Any) -> bool:
    return any(
        equation.primitive.name in products.PRODUCTS
        or any(map(_has_products, jaxprs.graphs_of(equation)))
        for equation in getattr(graph, "jaxpr", graph).eqns
    )


# ---- operations that move or change entries


def _by_entry(name: str, operands: Sequence[Value], output: Value) -> Value:
    """Let the shadows pass what works entry by entry."""
    if not jnp.issubdtype(output.array.dtype, jnp.inexact):
        return output
    passed: dict[str, Shadow] = {}
    for value in operands:
        if value.array.shape != output.array.shape:
            if name in _BY_ENTRY and value.shadows:
                _refuse([value], f"{name!r} spreads one entry over many")
            continue
        for leaf, shadow in value.shadows.items():
            if passed.setdefault(leaf, shadow).path != shadow.path:
                _refuse([value], f"{name!r} combines its entries with one another")
    return output._replace(shadows=passed)


def _move(equation: Any, operands: Sequence[Value], outputs: list[Value]) -> list[Value]:
    """Move the dummies as the entries."""
    name = equation.primitive.name
    moved = operands[: _MOVED.get(name, len(operands))]
    places = operands[len(moved) :]
    if any(value.shadows for value in places):
        _refuse(places, f"it says to {name!r} where or with what")
    kinds = next(shadow.dummies for value in moved for shadow in value.shadows.values())
    result: list[dict[str, Shadow]] = [{} for _ in outputs]
    for leaf in dict.fromkeys(leaf for value in moved for leaf in value.shadows):
        own = [value.shadows.get(leaf) for value in moved]
        arrays = [[_dummy(v, s, kind) for v, s in zip(moved, own, strict=True)] for kind in kinds]
        fixed = [_as_filling(value.array, name) for value in places]
        made = [_bind(equation, [*each, *fixed]) for each in arrays]
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


# ---- products


def _product(context: Context, equation: Any, operands: Sequence[Value], rows: Rows) -> Value:
    name, params = equation.primitive.name, equation.params
    if all(value.shadows for value in operands):
        _refuse(operands, "it is multiplied with another weight")
    side = 0 if operands[0].shadows else 1
    weight, value = operands[side], operands[1 - side]
    if name == "conv_general_dilated" and (side == 0 or params["batch_group_count"] != 1):
        _refuse(operands, "a convolution does not use it as its kernel")
    axis = _axis_of_examples(weight, value, context.sizes)
    if name == "conv_general_dilated" and axis not in (
        None,
        params["dimension_numbers"].lhs_spec[0],
    ):
        _refuse(operands, "a convolution uses it along the examples")
    site = Site(
        name=name,
        params=params,
        side=side,
        shape=tuple(weight.array.shape),
        axis=axis,
        inner=0 if axis is None else value.rows.inners[axis] or 1,
        kinds=context.kinds,
    )

    def backward(array: Any, marks: Marks, cotangent: jax.Array) -> Any:
        found = products.sums(site, array, marks, cotangent)
        return dict.fromkeys(weight.shadows, found)

    (output,) = _bind(equation, [v.array for v in operands])
    dummies = {leaf: dict(shadow.dummies) for leaf, shadow in weight.shadows.items()}
    return Value(products.tap(backward)(output, value.array, context.marks, dummies), rows)


def _axis_of_examples(weight: Value, value: Value, sizes: Sizes) -> int | None:
    """Find the axis of a value along which the examples lie."""
    growing = [axis for axis, inner in enumerate(value.rows.inners) if inner is not None]
    if not growing:
        return None
    (axis, *more), inners = growing, value.rows.inners
    is_long = value.array.shape[axis] != sizes.batch
    if more or inners[axis] == UNCLEAR or (inners[axis] == ANY and is_long):
        _refuse([weight], "which rows of what it meets belong to which example is unclear")
    return axis


def _fast_form(
    context: Context, equation: Any, twin: Any, operands: Sequence[Value], rows: Sequence[Rows]
) -> list[Value]:
    """Keep a fast form and its gradients, and compute the sums from its plain form."""
    (graph,), (other,) = rows_lib.bodies(equation), rows_lib.bodies(twin)
    given = operands[1:]

    def backward(arrays: Any, marks: Marks, cotangent: jax.Array) -> Any:
        def plain(dummies: Any) -> jax.Array:
            inner = context._replace(marks=marks)
            shown = _with_dummies(given, arrays, dummies)
            (output,) = play(inner, graph, other, shown)
            return output.array

        _, pull_back = jax.vjp(plain, _dummies(given))
        return pull_back(cotangent)[0]

    (output,) = _bind(equation, [v.array for v in operands])
    arrays = [v.array for v in given]
    tapped = products.tap(backward)(output, arrays, context.marks, _dummies(given))
    return [Value(tapped, rows[0])]


def _dummies(values: Sequence[Value]) -> Any:
    """List all dummies, for a function that is to take them as arguments."""
    return [{leaf: dict(s.dummies) for leaf, s in value.shadows.items()} for value in values]


def _with_dummies(values: Sequence[Value], arrays: Any, dummies: Any) -> list[Value]:
    """Put arrays and dummies in the place of those of `values`."""
    return [
        Value(
            array,
            value.rows,
            {leaf: Shadow(s.path, own[leaf]) for leaf, s in value.shadows.items()},
        )
        for value, array, own in zip(values, arrays, dummies, strict=True)
    ]


# ---- operations that hold a graph


def _remat(
    context: Context, equation: Any, twin: Any, operands: Sequence[Value], rows: Sequence[Rows]
) -> list[Value]:
    del rows
    (body,), (other,) = rows_lib.bodies(equation), rows_lib.bodies(twin)
    run = _function(context, body, other, operands, ends := [])
    options = {name: equation.params[name] for name in ("policy", "prevent_cse")}
    arrays, dummies = jax.checkpoint(run, **options)(
        [v.array for v in operands], _dummies(operands), context.marks
    )
    return _with_dummies(ends[0], arrays, dummies)


def _function(
    context: Context, graph: Any, twin: Any, operands: Sequence[Value], ends: list[list[Value]]
) -> Callable[..., Any]:
    """Make ``(arrays, dummies, marks) -> (arrays, dummies)``; what comes out is noted in `ends`."""

    def run(arrays: Any, dummies: Any, marks: Marks) -> Any:
        shown = _with_dummies(operands, arrays, dummies)
        outputs = play(context._replace(marks=marks), graph, twin, shown)
        ends.append(outputs)
        return [v.array for v in outputs], _dummies(outputs)

    return run


def _cond(
    context: Context, equation: Any, twin: Any, operands: Sequence[Value], rows: Sequence[Rows]
) -> list[Value]:
    """Play the branch that is chosen; under ``vmap`` all run, and only its sums count."""
    index, *given = operands
    ends: list[list[Value]] = []

    def branch(number: int, graph: Any, other: Any) -> Callable[..., Any]:
        run = _function(context, graph, other, given, ends)

        def chosen(arrays: Any, dummies: Any, marks: Marks, index: jax.Array) -> Any:
            runs = index == jnp.asarray(number, index.dtype)
            runs = runs if marks.branch is None else runs & marks.branch
            return run(arrays, dummies, marks._replace(branch=runs))

        return chosen

    graphs = zip(equation.params["branches"], twin.params["branches"], strict=True)
    branches = [branch(i, *pair) for i, pair in enumerate(graphs)]

    def paths(values: Sequence[Value]) -> Any:
        return [{leaf: shadow.path for leaf, shadow in v.shadows.items()} for v in values]

    arrays = [v.array for v in given]
    try:
        outputs, dummies = lax.switch(
            index.array, branches, arrays, _dummies(given), context.marks, index.array
        )
    except TypeError:  # the branches' shadows differ in number
        _refuse(given, "the branches of a condition lay it out differently")
    if any(paths(end) != paths(ends[0]) for end in ends):
        _refuse(given, "the branches of a condition lay it out differently")
    made = _with_dummies(ends[0], outputs, dummies)
    return [value._replace(rows=known) for value, known in zip(made, rows, strict=True)]


def _scan(
    context: Context, equation: Any, twin: Any, operands: Sequence[Value], rows: Sequence[Rows]
) -> list[Value]:
    """Play a loop; a leaf may be a constant of it, be carried unchanged, or be sliced by it."""
    (body,), (other,) = rows_lib.bodies(equation), rows_lib.bodies(twin)
    params, inner = equation.params, getattr(body, "jaxpr", body)
    if params["length"] != twin.params["length"]:
        _refuse(operands, "it is used in a loop over the examples")
    num_consts, num_carried = jaxprs.parts_of_scan(equation)
    num_fixed = num_consts + num_carried
    shown = rows_lib.inside_scan(equation, twin, [v.rows for v in operands], context.sizes)
    inside = [value._replace(rows=known) for value, known in zip(operands, shown, strict=True)]
    for i, value in enumerate(operands[num_consts:num_fixed]):
        if value.shadows and inner.outvars[i] is not inner.invars[num_consts + i]:
            _refuse([value], "a loop changes it")
    sliced = operands[num_fixed:]

    def step(carried: Any, slices: Any) -> Any:
        arrays, dummies = slices
        now = [
            *inside[:num_consts],
            *(
                v._replace(array=a)
                for v, a in zip(inside[num_consts:num_fixed], carried, strict=True)
            ),
            *_with_dummies(inside[num_fixed:], arrays, dummies),
        ]
        outputs = play(context, body, other, now)
        stacked = outputs[num_carried:]
        if any(value.shadows for value in stacked):
            _refuse(stacked, "a loop stacks it")
        return [v.array for v in outputs[:num_carried]], [v.array for v in stacked]

    carried, stacked = lax.scan(
        step,
        [v.array for v in operands[num_consts:num_fixed]],
        ([v.array for v in sliced], _dummies(sliced)),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    kept = [v.shadows for v in operands[num_consts:num_fixed]] + [{}] * len(stacked)
    return [Value(*each) for each in zip([*carried, *stacked], rows, kept, strict=True)]


_RULES: dict[str, Callable[..., list[Value]]] = {
    "scan": _scan,
    "cond": _cond,
    **dict.fromkeys(_REMAT, _remat),
}
