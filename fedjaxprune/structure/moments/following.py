"""Play a traced loss equation by equation, and follow the leaves to the products that use them.

Each followed leaf is accompanied by dummies of its shape. What moves the leaf's entries moves the
dummies; what changes entries one by one (a mask, a straight-through function) leaves them as they
are. At a product with a value they go into `products.tap`, so their gradients are the sums, which
JAX brings back into the leaf's own layout. All other equations are executed as they were traced.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjaxprune.structure import jaxprs
from fedjaxprune.structure.moments import products, shadows
from fedjaxprune.structure.moments import rows as rows_lib
from fedjaxprune.structure.moments.products import Marks, Site
from fedjaxprune.structure.moments.rows import ANY, UNCLEAR, Rows, Sizes
from fedjaxprune.structure.moments.shadows import Value

_OPENED = frozenset(("jit", "pjit", "closed_call", "core_call", "call"))
_REMAT = frozenset(("remat", "remat2", "checkpoint"))
_CUSTOM = frozenset(("custom_jvp_call", "custom_vjp_call", "custom_vmap_call"))
_ENDS = frozenset(("stop_gradient", "argmax", "argmin", "reduce"))  # and reduce_...


class Context(NamedTuple):
    """What is the same for all equations."""

    sizes: Sizes
    marks: Marks
    kinds: tuple[str, ...]
    # inside of the plain form of a fast one, whose outputs are not the loss's
    is_plain: bool = False
    notes: list[tuple[str, Any, products.Use]] | None = None  # (leaf, path, use), if asked for


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
            outputs = shadows.bound(
                equation, given, [rows_lib.of_constant(v.aval) for v in equation.outvars]
            )
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in one.outvars]


def _step(
    context: Context, equation: Any, twin: Any, wanted: Any, operands: Sequence[Value]
) -> list[Value]:
    """Play one equation."""
    name = equation.primitive.name
    rows = rows_lib.step(equation, twin, [v.rows for v in operands], context.sizes, wanted)
    if name == jaxprs.NAME and any(value.shadows for value in operands[1:]):
        return _fast_form(context, equation, twin, operands, rows)
    if name == jaxprs.NAME or not any(value.shadows for value in operands):
        return shadows.bound(equation, operands, rows)
    if name in _OPENED:
        (body,), (other,) = rows_lib.bodies(equation), rows_lib.bodies(twin)
        return play(context, body, other, operands, wanted)
    if name in _RULES:
        return _RULES[name](context, equation, twin, operands, rows)
    if name in products.PRODUCTS:
        return [_product(context, equation, operands, rows[0])]
    outputs = shadows.bound(equation, operands, rows)
    if name in _ENDS or (name.startswith("reduce_") and name != "reduce_precision"):
        return outputs
    if any(map(_is_fed, outputs)):
        shadows.refuse(operands, f"{name!r} combines it with the examples outside of a product")
    if name in shadows.MOVES:
        return shadows.move(equation, operands, outputs)
    if name == "optimization_barrier":
        return [out._replace(shadows=v.shadows) for v, out in zip(operands, outputs, strict=True)]
    if name in _CUSTOM and any(map(_has_products, jaxprs.graphs_of(equation))):
        shadows.refuse(operands, f"a product lies inside a {name!r}, whose derivative is its own")
    if name in shadows.BY_ENTRY or name in _CUSTOM:
        return [shadows.by_entry(name, operands, out) for out in outputs]
    shadows.refuse(operands, f"its entries cannot be followed through {name!r}")


def _is_fed(value: Value) -> bool:
    """Tell whether the examples enter a floating-point value."""
    return value.rows.is_fed and jnp.issubdtype(value.array.dtype, jnp.inexact)


def _has_products(graph: Any) -> bool:
    return any(
        equation.primitive.name in products.PRODUCTS
        or any(map(_has_products, jaxprs.graphs_of(equation)))
        for equation in getattr(graph, "jaxpr", graph).eqns
    )


# ---- products


def _product(context: Context, equation: Any, operands: Sequence[Value], rows: Rows) -> Value:
    name, params = equation.primitive.name, equation.params
    if all(value.shadows for value in operands):
        shadows.refuse(operands, "it is multiplied with another weight")
    side = 0 if operands[0].shadows else 1
    weight, value = operands[side], operands[1 - side]
    if name == "conv_general_dilated" and (side == 0 or params["batch_group_count"] != 1):
        shadows.refuse(operands, "a convolution does not use it as its kernel")
    site = _site(context, equation, weight, value, side)

    def backward(array: Any, marks: Marks, cotangent: jax.Array) -> Any:
        found = products.sums(site, array, marks, cotangent)
        return dict.fromkeys(weight.shadows, found)

    arrays = [v.array for v in operands]
    if context.is_plain:
        output = products.multiply(name, arrays, params)
    else:
        (output,) = shadows.bind(equation, arrays)
    dummies = {leaf: dict(shadow.dummies) for leaf, shadow in weight.shadows.items()}
    return Value(products.tap(backward)(output, value.array, context.marks, dummies), rows)


def _site(context: Context, equation: Any, weight: Value, value: Value, side: int) -> Site:
    """Describe a product, whose weight is the operand `side`."""
    name, params = equation.primitive.name, equation.params
    axis = _axis_of_examples(weight, value, context.sizes)
    if name == "conv_general_dilated" and axis not in (
        None,
        params["dimension_numbers"].lhs_spec[0],
    ):
        shadows.refuse([weight], "a convolution uses it along the examples")
    site = Site(
        name=name,
        params=params,
        side=side,
        shape=tuple(weight.array.shape),
        axis=axis,
        inner=0 if axis is None else value.rows.inners[axis] or 1,
        kinds=context.kinds,
    )
    if context.notes is not None:
        use = products.use_of(site, value.array.ndim)
        context.notes.extend((leaf, one.path, use) for leaf, one in weight.shadows.items())
    return site


def _axis_of_examples(weight: Value, value: Value, sizes: Sizes) -> int | None:
    """Find the axis of a value along which the examples lie."""
    growing = [axis for axis, inner in enumerate(value.rows.inners) if inner is not None]
    if not growing:
        return None
    (axis, *more), inners = growing, value.rows.inners
    is_long = value.array.shape[axis] != sizes.batch
    if more or inners[axis] == UNCLEAR or (inners[axis] == ANY and is_long):
        shadows.refuse([weight], "which rows of what it meets belong to which example is unclear")
    return axis


def _fast_form(
    context: Context, equation: Any, twin: Any, operands: Sequence[Value], rows: Sequence[Rows]
) -> list[Value]:
    """Keep a fast form and its gradients, and compute the sums from its plain form."""
    (graph,), (other,) = rows_lib.bodies(equation), rows_lib.bodies(twin)
    given = operands[1:]
    backward_of_product = _of_own_product(context, equation, graph, given)
    if backward_of_product is not None:
        tapped = equation.params["tapped"](
            backward_of_product,
            tuple(v.array for v in given),
            context.marks,
            shadows.dummies_of(given),
        )
        return [Value(tapped, rows[0])]

    def backward(arrays: Any, marks: Marks, cotangent: jax.Array) -> Any:
        def plain(dummies: Any) -> jax.Array:
            inner = context._replace(marks=marks, is_plain=True)
            shown = shadows.with_dummies(given, arrays, dummies)
            (output,) = play(inner, graph, other, shown)
            return output.array

        _, pull_back = jax.vjp(plain, shadows.dummies_of(given))
        return pull_back(cotangent)[0]

    (output,) = shadows.bind(equation, [v.array for v in operands])
    arrays = [v.array for v in given]
    tapped = products.tap(backward)(output, arrays, context.marks, shadows.dummies_of(given))
    return [Value(tapped, rows[0])]


def _of_own_product(
    context: Context, equation: Any, graph: Any, given: Sequence[Value]
) -> Callable[..., Any] | None:
    """Take the sums of a fast form from its own product, if it has one: no plain form is run."""
    followed = [bool(value.shadows) for value in given]
    if equation.params["tapped"] is None or followed != [False, True, *[False] * len(followed[2:])]:
        return None
    inner = getattr(graph, "jaxpr", graph)
    (convolution,) = (one for one in inner.eqns if one.primitive.name in products.PRODUCTS)
    value, weight, *_ = given
    site = _site(context, convolution, weight, value, 1)
    if site.axis != 0 or site.inner != 1:
        return None

    def backward(arrays: Any, marks: Marks, form: products.Form) -> Any:
        output = convolution.outvars[0].aval.shape
        found = products.sums_of_rows(site, arrays[0], marks, output, form)
        nothing: list[Any] = [{} for _ in given]
        nothing[1] = dict.fromkeys(weight.shadows, found)
        return nothing

    return backward


# ---- operations that hold a graph


def _remat(
    context: Context, equation: Any, twin: Any, operands: Sequence[Value], rows: Sequence[Rows]
) -> list[Value]:
    del rows
    (body,), (other,) = rows_lib.bodies(equation), rows_lib.bodies(twin)
    run = _function(context, body, other, operands, ends := [])
    options = {name: equation.params[name] for name in ("policy", "prevent_cse")}
    arrays, dummies = jax.checkpoint(run, **options)(
        [v.array for v in operands], shadows.dummies_of(operands), context.marks
    )
    return shadows.with_dummies(ends[0], arrays, dummies)


def _function(
    context: Context, graph: Any, twin: Any, operands: Sequence[Value], ends: list[list[Value]]
) -> Callable[..., Any]:
    """Make ``(arrays, dummies, marks) -> (arrays, dummies)``; what comes out is noted in `ends`."""

    def run(arrays: Any, dummies: Any, marks: Marks) -> Any:
        shown = shadows.with_dummies(operands, arrays, dummies)
        outputs = play(context._replace(marks=marks), graph, twin, shown)
        ends.append(outputs)
        return [v.array for v in outputs], shadows.dummies_of(outputs)

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
            index.array, branches, arrays, shadows.dummies_of(given), context.marks, index.array
        )
    except TypeError:  # the branches' shadows differ in number
        shadows.refuse(given, "the branches of a condition lay it out differently")
    if any(paths(end) != paths(ends[0]) for end in ends):
        shadows.refuse(given, "the branches of a condition lay it out differently")
    made = shadows.with_dummies(ends[0], outputs, dummies)
    return [value._replace(rows=known) for value, known in zip(made, rows, strict=True)]


def _scan(
    context: Context, equation: Any, twin: Any, operands: Sequence[Value], rows: Sequence[Rows]
) -> list[Value]:
    """Play a loop; a leaf may be a constant of it, be carried unchanged, or be sliced by it."""
    (body,), (other,) = rows_lib.bodies(equation), rows_lib.bodies(twin)
    params, inner = equation.params, getattr(body, "jaxpr", body)
    if params["length"] != twin.params["length"]:
        shadows.refuse(operands, "it is used in a loop over the examples")
    num_consts, num_carried = jaxprs.parts_of_scan(equation)
    num_fixed = num_consts + num_carried
    shown = rows_lib.inside_scan(equation, twin, [v.rows for v in operands], context.sizes)
    inside = [value._replace(rows=known) for value, known in zip(operands, shown, strict=True)]
    for i, value in enumerate(operands[num_consts:num_fixed]):
        if value.shadows and inner.outvars[i] is not inner.invars[num_consts + i]:
            shadows.refuse([value], "a loop changes it")
    sliced = operands[num_fixed:]

    def step(carried: Any, slices: Any) -> Any:
        arrays, dummies = slices
        now = [
            *inside[:num_consts],
            *(
                v._replace(array=a)
                for v, a in zip(inside[num_consts:num_fixed], carried, strict=True)
            ),
            *shadows.with_dummies(inside[num_fixed:], arrays, dummies),
        ]
        outputs = play(context, body, other, now)
        stacked = outputs[num_carried:]
        if any(value.shadows for value in stacked):
            shadows.refuse(stacked, "a loop stacks it")
        return [v.array for v in outputs[:num_carried]], [v.array for v in stacked]

    carried, stacked = lax.scan(
        step,
        [v.array for v in operands[num_consts:num_fixed]],
        ([v.array for v in sliced], shadows.dummies_of(sliced)),
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
