"""Rules of primitives that work entry by entry."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedjaxprune.structure.channels.propagation import labels as labels_lib
from fedjaxprune.structure.channels.propagation.labels import Book, Label, Value


def names(text: str) -> frozenset[str]:
    """List words."""
    return frozenset(text.split())


# Zero at zero; of one argument.
KEEPS_ZERO = names(
    """neg tanh sin tan asin atan sinh asinh atanh abs sign sqrt cbrt square erf expm1 log1p floor
    ceil round convert_element_type copy copy_p reduce_precision real imag stop_gradient
    optimization_barrier integer_pow conj stored"""
)
LOSES_ZERO = names(
    """exp exp2 log logistic rsqrt cos cosh acos acosh erfc erf_inv is_finite not lgamma digamma
    population_count"""
)
SUMS = names("add sub add_any max min or xor")  # zero where all arguments are
PRODUCTS = names("mul and")  # zero where one argument is
FIRST = names("div rem pow shift_left")  # zero where the first argument is
COMPARES = names(  # may be anything else at zero
    "eq ne lt le gt ge nextafter atan2 shift_right_logical shift_right_arithmetic"
)
BINARY = SUMS | PRODUCTS | FIRST | COMPARES


def unary(name: str, value: Value, params: Mapping[str, Any]) -> Value:
    """Apply a function of one argument to each entry."""
    if name in KEEPS_ZERO and params.get("y", 1) > 0:  # integer_pow of 0 or less is not zero
        const = value.const if name in ("convert_element_type", "copy") else None
        return value._replace(const=const)
    labels = tuple(Label(each.ids, np.zeros_like(each.zero)) for each in value.labels)
    return value._replace(labels=labels, const=None)


def elementwise(book: Book, name: str, values: Sequence[Value], shape: tuple[int, ...]) -> Value:
    """Let arrays meet entry by entry: their channels are the same ones."""
    clipped = list(values)
    if name in ("max", "min"):  # max(x, c) is zero at zero for every c <= 0, min for every c >= 0
        for i, value in enumerate(clipped):
            c = value.const
            if c is not None and (c <= 0 if name == "max" else c >= 0):
                clipped[i] = value._replace(const=0.0)
    labels = labels_lib.join(book, clipped, shape, needs_all=name not in PRODUCTS)
    if name in FIRST:
        labels = as_in(labels, values[0], shape)
    exponent = values[1].const if name == "pow" else 1.0
    if name in COMPARES or exponent is None or exponent <= 0.0:  # x ** 0 is 1 at zero
        labels = [Label(each.ids, np.zeros_like(each.zero)) for each in labels]
    _attach(book, values)
    varies = any(value.varies for value in values)
    return Value(shape, tuple(labels), varies, sources=labels_lib.sources_of(values))


def as_in(labels: Sequence[Label], value: Value, shape: tuple[int, ...]) -> list[Label]:
    """Say zero where `value` is, whatever the others are."""
    result = []
    same = [(axis, axis) for axis in range(len(shape))]
    own = value.labels if len(value.shape) == len(shape) else ()
    for label in labels:
        match = labels_lib.partner(label, own, same)
        zero = np.zeros_like(label.zero) if match is None else match.zero
        result.append(Label(label.ids, np.broadcast_to(zero, label.ids.shape)))
    return result


def _attach(book: Book, values: Sequence[Value]) -> None:
    """Write down parameters that act on the output of a single filter."""
    makers = frozenset().union(*(value.sources for value in values if value.varies))
    own = frozenset().union(*(value.sources for value in values if not value.varies))
    if len(makers) == 1 and own:
        (maker,) = makers
        book.attached.setdefault(maker, set()).update(own)


def select(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Choose entry by entry; the choice itself makes nothing zero."""
    shape = tuple(equation.outvars[0].aval.shape)
    which, *cases = values
    labels = labels_lib.join(book, cases, shape, needs_all=True)
    chosen = Value(shape, tuple(labels))
    both = labels_lib.join(book, [chosen, which], shape, needs_all=True)
    varies = any(value.varies for value in values)
    labels = as_in(both, chosen, shape)
    return [Value(shape, tuple(labels), varies, sources=labels_lib.sources_of(cases))]


def clamp(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Bound entries from below and above."""
    low, value, high = values
    shape = tuple(equation.outvars[0].aval.shape)
    once = elementwise(book, "max", [value, low], shape)
    return [elementwise(book, "min", [once, high], shape)]
