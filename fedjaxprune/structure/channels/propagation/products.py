"""Rules of primitives in which entries of an array meet: products, sums, windows, look-ups."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjaxprune.structure.channels.propagation import labels as labels_lib
from fedjaxprune.structure.channels.propagation.labels import Book, Label, Value


def dot_general(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Contract axes of two arrays: what is contracted is one channel, what is free is kept."""
    (contracted, batch) = equation.params["dimension_numbers"]
    contract(book, "dot_general", values, list(zip(*contracted, strict=True)))
    shape = tuple(equation.outvars[0].aval.shape)
    free, kept = [], []
    for side, value in enumerate(values):
        drop = set(contracted[side]) | set(batch[side])
        free.append([axis for axis in range(len(value.shape)) if axis not in drop])
        gone = set(contracted[side])
        kept.append([each for each in value.labels if not labels_lib.varying(each) & gone])
    moved = []
    for side in (0, 1):
        before = 0 if side == 0 else len(free[0])
        order = [*batch[side], *contracted[side], *free[side]]
        labels = []
        for label in kept[side]:
            dims = [label.ids.shape[axis] for axis in batch[side]] + [1] * before
            dims += [label.ids.shape[axis] for axis in free[side]]
            dims += [1] * (len(shape) - len(dims))
            labels.append(Label(*(x.transpose(order).reshape(dims) for x in label)))
        moved.append(Value(shape, tuple(labels)))
    return [_product(book, values, kept, moved, shape)]


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
    spatial = [
        each
        for value, axes in ((lhs, numbers.lhs_spec[2:]), (rhs, numbers.rhs_spec[2:]))
        for each in value.labels
        if labels_lib.varying(each) & set(axes)
    ]
    for label in spatial:
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
    dims = [shape[place] if axis == place else 1 for axis in range(len(shape))]
    labels = tuple(
        Label(*(np.broadcast_to(x.ravel(), (shape[place],)).reshape(dims) for x in each))
        for each in made
    )
    if groups != 1:
        return [Value(shape, labels, True, sources=lhs.sources)]
    return [Value(shape, labels, True, sources=_made(book, rhs, lhs, made))]


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
                elif other.varies and not this.varies:
                    labels_lib.note(book.fixed, label.ids, "reads the network's input")
                elif not this.varies:
                    labels_lib.note(book.fixed, label.ids, f"{name} with a constant")
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


def _product(book: Book, values: Any, kept: Any, moved: Any, shape: tuple[int, ...]) -> Value:
    joined = labels_lib.join(book, moved, shape, needs_all=False)
    sources = _made(book, values[0], values[1], kept[0]) | _made(
        book, values[1], values[0], kept[1]
    )
    varies = values[0].varies or values[1].varies
    return Value(
        shape, tuple(joined), varies, sources=sources if varies else labels_lib.sources_of(values)
    )


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
    labels = [each for each in value.labels if not labels_lib.varying(each) & axes]
    lost = [each for each in value.labels if labels_lib.varying(each) & axes]
    labels_lib.give_up(book, lost, f"{name} mixes channels")
    varies = any(each.varies for each in values)
    return [
        Value(tuple(var.aval.shape), tuple(labels), varies, sources=value.sources)
        for var in equation.outvars
    ]


def gather(book: Book, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Look rows up: axes that are taken whole keep their channels."""
    operand, indices = values
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    shape = tuple(equation.outvars[0].aval.shape)
    removed = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
    windows = [axis for axis in range(len(operand.shape)) if axis not in removed]
    labels = []
    for label in operand.labels:
        axes = labels_lib.varying(label)
        if all(axis in windows and sizes[axis] == operand.shape[axis] for axis in axes):
            dims = [1] * len(shape)
            for axis, place in zip(windows, numbers.offset_dims, strict=True):
                dims[place] = label.ids.shape[axis]
            labels.append(Label(*(x.reshape(dims) for x in label)))
            if not operand.varies and indices.varies:
                labels_lib.set_role(book, label, "filter")
        else:
            labels_lib.note(book.fixed, label.ids, "looked up by index")
            if operand.varies:
                labels_lib.give_up(book, (label,), "a look-up among channels is not understood")
    varies = operand.varies or indices.varies
    return [Value(shape, tuple(labels), varies, sources=operand.sources)]
