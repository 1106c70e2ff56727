"""The walk through a jaxpr, and which rule a primitive has; one without is noted as unknown."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedjaxprune.structure.channels.propagation import elementwise, products, reshapes
from fedjaxprune.structure.channels.propagation import labels as labels_lib
from fedjaxprune.structure.channels.propagation.labels import Book, Label, Value

Rule = Callable[[Book, Any, Sequence[Value]], list[Value]]

_CALLS = frozenset(
    (
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "remat",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "custom_vmap_call",
    )
)
_RESHAPES = frozenset(("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose"))


def walk(
    book: Book, jaxpr: Any, consts: Sequence[Value], arguments: Sequence[Value]
) -> list[Value]:
    """Pass labels through a jaxpr; writes to `book`."""
    environment: dict[Any, Value] = {}
    environment.update(zip(jaxpr.constvars, consts, strict=True))
    environment.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Value:
        if hasattr(atom, "val"):
            return constant(atom.val)
        return environment[atom]

    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        environment.update(zip(equation.outvars, apply(book, equation, values), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def apply(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Pass labels through one equation; writes to `book`."""
    return [
        value._replace(labels=tuple(labels_lib.shrink(each) for each in value.labels))
        for value in _apply(book, equation, values)
    ]


def constant(array: Any) -> Value:
    """Describe a constant of the network."""
    shape = tuple(np.shape(array))
    if getattr(array, "dtype", None) is not None and not _is_number(array.dtype):
        return Value(shape)
    array = np.asarray(array)
    uniform = array.size > 0 and bool(np.all(array == array.flat[0]))
    return Value(shape, const=float(array.flat[0]) if uniform else None)


def _is_number(dtype: Any) -> bool:
    try:
        return np.dtype(dtype).kind in "biuf"
    except TypeError:  # a key, for instance
        return False


def _apply(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    name = equation.primitive.name
    shapes = [tuple(getattr(var.aval, "shape", ())) for var in equation.outvars]
    if name in _CALLS and (inner := _inner(equation)) is not None:
        return _closed(book, inner, values)
    rule = _RULES.get(name)
    if rule is None and name in elementwise.KEEPS_ZERO | elementwise.LOSES_ZERO:
        return [elementwise.unary(name, value) for value in values]
    if (
        rule is None
        and name
        in elementwise.SUMS | elementwise.PRODUCTS | elementwise.FIRST | elementwise.COMPARES
    ):
        return [elementwise.elementwise(book, name, values, shapes[0])]
    varies = any(value.varies for value in values)
    if rule is None or not any(value.labels for value in values):
        for value in values:
            labels_lib.give_up(book, value.labels, f"{name} is not understood")
        if name in _RESHAPES:
            return [Value(shapes[0], varies=varies, const=values[0].const)]
        return [
            Value(shape, varies=varies, sources=labels_lib.sources_of(values)) for shape in shapes
        ]
    return rule(book, equation, values)


def _inner(equation: Any) -> Any:
    """Find the jaxpr that an equation calls; one that has none is not understood."""
    names = ("jaxpr", "call_jaxpr", "call", "fun_jaxpr")
    found = (equation.params.get(name) for name in names)
    return next((inner for inner in found if inner is not None), None)


def _closed(book: Book, inner: Any, values: Sequence[Value]) -> list[Value]:
    if hasattr(inner, "consts"):
        return walk(book, inner.jaxpr, [constant(const) for const in inner.consts], values)
    return walk(book, inner, [], values)


def _scan(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Walk the body until what it carries has the labels that it leaves."""
    params = equation.params
    # By shapes, since the parameters that count are not the same in every JAX: what is stacked has
    # an axis more outside than inside, what is carried has not.
    inner = getattr(params["jaxpr"], "jaxpr", params["jaxpr"])
    num_slices = _num_stacked(equation.invars, inner.invars)
    num_carry = len(equation.outvars) - _num_stacked(equation.outvars, inner.outvars)
    num_consts = len(values) - num_carry - num_slices
    consts = list(values[:num_consts])
    carry = list(values[num_consts : num_consts + num_carry])
    slices = []
    for value in values[num_consts + num_carry :]:
        for label in value.labels:
            if 0 in labels_lib.varying(label):
                labels_lib.note(book.fixed, label.ids, "steps of a loop")
        labels = [x for x in value.labels if 0 not in labels_lib.varying(x)]
        labels = tuple(Label(*(x[0] for x in each)) for each in labels)
        slices.append(value._replace(shape=value.shape[1:], labels=labels))
    starts, outputs = carry, []
    varies = any(value.varies for value in values)
    # Labels go in, come back, and bring others about; what is written down on the way is not final.
    trial = book._replace(leaks=set(), mixes=set(), fixed=set())
    for page in (trial, trial, trial, book):
        carry = [value._replace(varies=varies) for value in carry]
        outputs = _closed(page, params["jaxpr"], [*consts, *carry, *slices])
        carry = [
            # A state of zeros to begin with is zero as long as the body leaves it so.
            end._replace(const=None)
            if start.const == 0.0
            else Value(
                start.shape,
                tuple(labels_lib.join(page, [start, end], start.shape, needs_all=True)),
                sources=labels_lib.sources_of([start, end]),
            )
            for start, end in zip(starts, outputs[:num_carry], strict=True)
        ]
    stacked = []
    for value, var in zip(outputs[num_carry:], equation.outvars[num_carry:], strict=True):
        stacked.append(labels_lib.map_labels(value, var.aval.shape, lambda x: x[None]))
    return [*outputs[:num_carry], *stacked]


def _num_stacked(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    pairs = zip(outside, inside, strict=True)
    return sum(1 for a, b in pairs if len(a.aval.shape) != len(b.aval.shape))


def _cond(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    which, *arguments = values
    ends = [_closed(book, branch, arguments) for branch in equation.params["branches"]]
    return [
        Value(
            cases[0].shape,
            tuple(labels_lib.join(book, cases, cases[0].shape, needs_all=True)),
            which.varies or any(case.varies for case in cases),
            sources=labels_lib.sources_of(cases),
        )
        for cases in zip(*ends, strict=True)
    ]


_RULES: dict[str, Rule] = {
    "dot_general": products.dot_general,
    "conv_general_dilated": products.conv,
    "broadcast_in_dim": reshapes.broadcast,
    "reshape": reshapes.reshape,
    "squeeze": reshapes.reshape,
    "expand_dims": reshapes.reshape,
    "transpose": reshapes.reindex(lambda params, x, value: x.transpose(params["permutation"])),
    "slice": reshapes.reindex(reshapes.cut),
    "rev": reshapes.reindex(reshapes.reverse),
    "tile": reshapes.reindex(reshapes.tile),
    "pad": reshapes.pad,
    "concatenate": reshapes.concatenate,
    "split": reshapes.split,
    "select_n": elementwise.select,
    "clamp": elementwise.clamp,
    "gather": products.gather,
    "scan": _scan,
    "cond": _cond,
    "reduce_sum": products.reduce,
    "reduce_max": products.reduce,
    "reduce_min": products.reduce,
    "reduce_prod": products.reduce,
    "reduce_and": products.reduce,
    "reduce_or": products.reduce,
    "argmax": products.reduce,
    "argmin": products.reduce,
    "reduce_window_max": products.window,
    "reduce_window_min": products.window,
    "reduce_window_sum": products.window,
    "cumsum": products.window,
    "cumprod": products.window,
    "cummax": products.window,
    "cummin": products.window,
    "sort": products.window,
}
