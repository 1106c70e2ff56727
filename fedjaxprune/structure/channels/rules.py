"""The walk through a jaxpr, and which rule a primitive has; one without is noted as unknown."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedjaxprune.structure import jaxprs
from fedjaxprune.structure.channels.propagation import elementwise, products, reshapes
from fedjaxprune.structure.channels.propagation import labels as labels_lib
from fedjaxprune.structure.channels.propagation.labels import Book, Label, Value

_REDUCTIONS = elementwise.names(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin"
)
_WINDOWS = elementwise.names(
    "reduce_window_max reduce_window_min reduce_window_sum cumsum cumprod cummax cummin sort"
)
Rule = Callable[[Book, Any, Sequence[Value]], list[Value]]

_CALLS = jaxprs.CALLS | {"custom_vjp_call_jaxpr"}
_RESHAPES = frozenset(("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose"))


def walk(book: Book, graph: Any, arguments: Sequence[Value]) -> list[Value]:
    """Pass labels through a jaxpr, closed or not; writes to `book`."""
    jaxpr = getattr(graph, "jaxpr", graph)
    consts = [constant(const) for const in getattr(graph, "consts", ())]
    environment = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(atom: Any) -> Value:
        return environment[atom] if jaxprs.is_variable(atom) else constant(atom.val)

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
    graphs = jaxprs.graphs_of(equation)
    if name in _CALLS and len(graphs) == 1:  # one that has none is not understood
        return walk(book, graphs[0], values)
    rule = _RULES.get(name)
    if rule is None and name in elementwise.KEEPS_ZERO | elementwise.LOSES_ZERO:
        return [elementwise.unary(name, value, equation.params) for value in values]
    if rule is None and name in elementwise.BINARY:
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


def _scan(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Walk the body until what it carries has the labels that it leaves."""
    num_consts, num_carry = jaxprs.parts_of_scan(equation)
    consts, rest = values[:num_consts], values[num_consts:]
    carry, slices = list(rest[:num_carry]), []
    for value in rest[num_carry:]:
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
        outputs = walk(page, equation.params["jaxpr"], [*consts, *carry, *slices])
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
    stacked = zip(outputs[num_carry:], equation.outvars[num_carry:], strict=True)
    return outputs[:num_carry] + [
        labels_lib.map_labels(value, var.aval.shape, lambda x: x[None]) for value, var in stacked
    ]


def _cond(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    which, *arguments = values
    ends = [walk(book, branch, arguments) for branch in equation.params["branches"]]
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
    "transpose": reshapes.reindex(lambda params, x: x.transpose(params["permutation"])),
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
    **dict.fromkeys(_REDUCTIONS, products.reduce),
    **dict.fromkeys(_WINDOWS, products.window),
}
