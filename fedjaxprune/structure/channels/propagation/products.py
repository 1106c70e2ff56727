"""Rules of primitives in which entries of an array meet: products, sums, windows, look-ups."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjaxprune.structure import moves
from fedjaxprune.structure.channels.propagation import labels as labels_lib
from fedjaxprune.structure.channels.propagation.labels import Book, Label, Value


def dot_general(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Contract axes of two arrays: what is contracted is one channel, what is free is kept."""
    (contracted, _) = numbers = equation.params["dimension_numbers"]
    contract(book, "dot_general", values, list(zip(*contracted, strict=True)))
    shape = tuple(equation.outvars[0].aval.shape)
    kept = [
        [each for each in value.labels if not labels_lib.varying(each) & set(gone)]
        for value, gone in zip(values, contracted, strict=True)
    ]
    places = moves.places_of_dot(numbers, [len(value.shape) for value in values])
    moved = [
        Value(shape, tuple(labels_lib.placed(label, place, len(shape)) for label in labels))
        for labels, place in zip(kept, places, strict=True)
    ]
    joined = labels_lib.join(book, moved, shape, needs_all=False)
    first, second = values
    sources = _made(book, first, second, kept[0]) | _made(book, second, first, kept[1])
    varies = first.varies or second.varies
    sources = sources if varies else labels_lib.sources_of(values)
    return [Value(shape, tuple(joined), varies, sources=sources)]


def conv(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Convolve: channels in are contracted, channels out come from the kernel."""
    numbers = equation.params["dimension_numbers"]
    lhs, rhs = values
    shape = tuple(equation.outvars[0].aval.shape)
    features, inputs = numbers.lhs_spec[1], numbers.rhs_spec[1]
    outputs, place = numbers.rhs_spec[0], numbers.out_spec[1]
    groups = equation.params["feature_group_count"]
    if equation.params["batch_group_count"] != 1 or (groups != 1 and rhs.shape[inputs] != 1):
        for value in values:
            labels_lib.give_up(book, value.labels, "a convolution in groups is not understood")
        return [Value(shape, varies=True)]
    for value, spec in ((lhs, numbers.lhs_spec), (rhs, numbers.rhs_spec)):
        for label in value.labels:
            if labels_lib.varying(label) & set(spec[2:]):
                labels_lib.note(book.fixed, label.ids, "a tap of a convolution")
    made = [each for each in rhs.labels if labels_lib.varying(each) == {outputs}]
    read = [each for each in lhs.labels if labels_lib.varying(each) == {features}]
    if groups == 1:
        contract(book, "conv_general_dilated", values, [(features, inputs)])
    else:  # each channel by itself: its filter is an affine map of it
        repeat = rhs.shape[outputs] // groups
        for label in read:
            for filters in made:
                labels_lib.unify(book, np.repeat(label.ids.ravel(), repeat), filters.ids.ravel())
    labels = tuple(labels_lib.placed(each, {outputs: place}, len(shape)) for each in made)
    sources = lhs.sources if groups != 1 else _made(book, rhs, lhs, made)
    return [Value(shape, labels, True, sources=sources)]


def contract(
    book: Book, name: str, sides: Sequence[Value], pairs: Sequence[tuple[int, int]]
) -> None:
    """Merge what is contracted, and tell filters from inputs."""
    for this, other, axes in (
        (sides[0], sides[1], list(pairs)),
        (sides[1], sides[0], [(b, a) for a, b in pairs]),
    ):
        mine = {a for a, _ in axes}
        for label in this.labels:
            if not labels_lib.varying(label) & mine:
                continue
            match = labels_lib.partner(label, other.labels, axes)
            if match is None:
                if this.varies:
                    _note_mix(book, label, name)
                else:
                    why = "reads the network's input" if other.varies else f"{name} with a constant"
                    labels_lib.note(book.fixed, label.ids, why)
                continue
            if label.ids.size != match.ids.size:
                labels_lib.give_up(
                    book, (label, match), f"{name} over several axes is not understood"
                )
                continue
            labels_lib.unify(book, label.ids.ravel(), match.ids.ravel())
            if this.varies and not (label.zero.ravel() | (match.zero.ravel() & other.varies)).all():
                why = f"a pruned channel is not zero where {name} reads it"
                labels_lib.note(book.leaks, label.ids, why)
            if this.varies and other.varies:
                _note_mix(book, label, name)
            if not this.varies and other.varies:
                labels_lib.set_role(book, label, "input")


def _made(book: Book, operand: Value, other: Value, kept: Sequence[Label]) -> frozenset:
    """Mark the free axes of a parameter as filters, and give what they are."""
    if operand.varies or not other.varies:
        return frozenset()
    places = set()
    for label in kept:
        labels_lib.set_role(book, label, "filter")
        places |= {book.owners[int(atom)][:2] for atom in np.unique(label.ids) if atom >= 0}
    return frozenset(places)


def _note_mix(book: Book, label: Label, name: str) -> None:
    """Write down that channels enter one result, and whether pruned ones do so as zeros."""
    adds = name in ("reduce_sum", "dot_general", "conv_general_dilated") and label.zero.all()
    harmless = ", to which a pruned one adds zero" if adds else ""
    labels_lib.note(book.mixes, label.ids, f"{name} mixes channels{harmless}")


def reduce(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Sum, or take the extreme of, axes; along channels this mixes them."""
    name = equation.primitive.name
    axes = set(equation.params["axes"])
    (value,) = values
    labels = []
    for label in value.labels:
        if labels_lib.varying(label) & axes:
            _note_mix(book, label, name)
            if not value.varies:
                labels_lib.note(book.fixed, label.ids, f"{name} of a parameter")
        else:
            zero = label.zero if not name.startswith("arg") else np.zeros_like(label.zero)
            labels.append(Label(*(np.squeeze(x, tuple(axes)) for x in (label.ids, zero))))
    shape = tuple(equation.outvars[0].aval.shape)
    return [value._replace(shape=shape, labels=tuple(labels), const=None)]


def window(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Pass through what slides or accumulates along axes that have no channels."""
    name = equation.primitive.name
    value, params = values[0], equation.params
    if "window_dimensions" in params:
        axes = {axis for axis, size in enumerate(params["window_dimensions"]) if size != 1}
    else:
        axes = {params["axis"] if "axis" in params else params["dimension"]}
    lost = [each for each in value.labels if labels_lib.varying(each) & axes]
    labels = [each for each in value.labels if not labels_lib.varying(each) & axes]
    labels_lib.give_up(book, lost, f"{name} mixes channels")
    varies = any(each.varies for each in values)
    return [
        Value(tuple(var.aval.shape), tuple(labels), varies, sources=value.sources)
        for var in equation.outvars
    ]


def gather(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Look rows up: axes that are taken whole keep their channels."""
    operand, indices = values
    sizes, places = equation.params["slice_sizes"], moves.places_of_gather(equation)
    shape = tuple(equation.outvars[0].aval.shape)
    labels = []
    for label in operand.labels:
        axes = labels_lib.varying(label)
        if all(axis in places and sizes[axis] == operand.shape[axis] for axis in axes):
            labels.append(labels_lib.placed(label, places, len(shape)))
            if not operand.varies and indices.varies:
                labels_lib.set_role(book, label, "filter")
        else:
            labels_lib.note(book.fixed, label.ids, "looked up by index")
            if operand.varies:
                labels_lib.give_up(book, (label,), "a look-up among channels is not understood")
    varies = operand.varies or indices.varies
    return [Value(shape, tuple(labels), varies, sources=operand.sources)]
