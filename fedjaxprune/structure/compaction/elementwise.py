"""Rules of operations that work entry by entry, or only move entries about."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjaxprune.structure.channels.propagation import elementwise
from fedjaxprune.structure.compaction import arithmetic, dependence
from fedjaxprune.structure.compaction.dependence import Call, Facts, Kept, Known, Rule, Wish
from fedjaxprune.structure.compaction.program import FEW, Op, at

_NAMES = (
    elementwise.KEEPS_ZERO | elementwise.LOSES_ZERO | elementwise.BINARY | {"select_n", "clamp"}
) - {"optimization_barrier"}


def is_pointwise(op: Op) -> bool:
    """Tell whether each entry of the one output is made of the operands' entries at its place."""
    if op.equation.primitive.name not in _NAMES or len(op.outputs) != 1:
        return False
    shape = op.equation.outvars[0].aval.shape
    return all(
        not v.aval.shape
        or (
            len(v.aval.shape) == len(shape)
            and all(n in (1, full) for n, full in zip(v.aval.shape, shape, strict=True))
        )
        for v in op.equation.invars
    )


def _known(op: Op, operands: Sequence[Known]) -> list[Known]:
    name, shape = op.equation.primitive.name, op.equation.outvars[0].aval.shape
    if name == "select_n":
        which, *cases = operands
        chosen = np.asarray(which.value).astype(np.int32)
        varies = which.varies | np.any([case.varies for case in cases], axis=0)
        for i, case in enumerate(cases):
            varies = np.where(~which.varies & (chosen == i), case.varies, varies)
    else:
        varies = operands[0].varies
        for each in operands[1:]:
            varies = varies | each.varies
        if name == "mul":  # whatever is finite, times zero
            for each in operands:
                varies = varies & ~(~each.varies & (np.asarray(each.value) == 0))
    static = all(each.static for each in operands)
    varies = np.broadcast_to(varies, shape)
    if varies.all() and varies.size:
        value = np.broadcast_to(np.zeros((), op.equation.outvars[0].aval.dtype), shape)
    else:
        (value,) = dependence.evaluate(op, [each.value for each in operands])
        if name == "mul":
            zeros = np.any(
                [~each.varies & (np.asarray(each.value) == 0) for each in _spread(operands, shape)],
                axis=0,
            )
            value = np.where(zeros, np.zeros((), value.dtype), value)
    return [Known(varies, value, static)]


def _spread(operands: Sequence[Known], shape: Any) -> list[Known]:
    return [
        Known(np.broadcast_to(each.varies, shape), np.broadcast_to(each.value, shape), each.static)
        for each in operands
    ]


def _wish(
    op: Op, known: Facts, outputs: Sequence[Kept], operands: Sequence[Kept | None]
) -> tuple[list[Wish], Any]:
    del known, operands
    full = op.equation.outvars[0].aval.shape
    return [
        Wish(
            tuple(
                bits if n == whole else None
                for n, whole, bits in zip(shape, full, outputs[0], strict=bool(shape))
            )
        )
        for shape in dependence.operand_shapes(op)
    ], None


def _run(call: Call) -> list[Any]:
    return dependence.bind(call.op, call.arrays, call.batch)


POINTWISE = Rule(_known, _wish, dependence.no_fold, _run)


def _known_move(op: Op, operands: Sequence[Known]) -> list[Known]:
    name, params = op.equation.primitive.name, op.equation.params
    varies = arithmetic.move(name, params, [each.varies for each in operands])
    values = arithmetic.move(name, params, [np.asarray(each.value) for each in operands])
    static = all(each.static for each in operands)
    return [Known(a, b, static) for a, b in zip(varies, values, strict=True)]


def _wish_move(
    op: Op, known: Facts, outputs: Sequence[Kept], operands: Sequence[Kept | None]
) -> tuple[list[Wish], Any]:
    """Follow every entry to its source; then see whether the same move serves what is left."""
    del operands
    name, params = op.equation.primitive.name, op.equation.params
    shapes = dependence.operand_shapes(op)
    numbers, first = [], 0
    for shape in shapes:
        count = int(np.prod(shape, dtype=np.int64))
        numbers.append(np.arange(first, first + count).reshape(shape))
        first += count
    moved = arithmetic.move(name, params, numbers)
    wanted = [
        each[dependence.grid(kept, each.shape)] for each, kept in zip(moved, outputs, strict=True)
    ]
    read = np.zeros(first, bool)
    for each in wanted:
        read[each] = True
    wishes = []
    for variable, number in zip(op.inputs, numbers, strict=True):
        used = read[number]
        kept = tuple(
            dependence.along(used, axis) if flag else None
            for axis, flag in enumerate(known.droppable[variable])
        )
        wishes.append(Wish(kept))
    if all(_is_whole(kept) for kept in outputs):
        return [Wish(dependence.everything(known, v)) for v in op.inputs], False
    parts = [
        number[dependence.grid(wish.kept, number.shape)]
        for number, wish in zip(numbers, wishes, strict=True)
    ]
    try:
        adapted = _adapt(op, [wish.kept for wish in wishes], outputs, FEW)
        again = arithmetic.move(name, adapted, parts)
        if all(np.array_equal(a, b) for a, b in zip(again, wanted, strict=True)):
            return wishes, True
    except ValueError:
        pass
    return [Wish(dependence.everything(known, v)) for v in op.inputs], False


def _is_whole(kept: Kept) -> bool:
    return all(bits is None or bits.all() for bits in kept)


def _adapt(op: Op, kept: Sequence[Kept], outputs: Sequence[Kept], batch: Any) -> dict[str, Any]:
    """Write sizes of what is kept into the parameters of a move."""
    name, params = op.equation.primitive.name, dict(at(op.params, batch))
    if name in ("reshape", "broadcast_in_dim"):
        entry = "new_sizes" if name == "reshape" else "shape"
        params[entry] = tuple(
            dependence.size(bits, full)
            for bits, full in zip(outputs[0], params[entry], strict=True)
        )
    elif name == "slice":
        ndim = len(outputs[0])
        strides = list(params["strides"] or (1,) * ndim)
        starts, limits = list(params["start_indices"]), list(params["limit_indices"])
        for axis, bits in enumerate(kept[0]):
            if bits is not None:
                starts[axis], limits[axis], strides[axis] = 0, dependence.size(bits, None), 1
        params["strides"] = tuple(strides)
        params["start_indices"], params["limit_indices"] = tuple(starts), tuple(limits)
    elif name == "split":
        axis = params["axis"]
        params["sizes"] = tuple(
            dependence.size(bits[axis], full)
            for bits, full in zip(outputs, params["sizes"], strict=True)
        )
    elif name == "pad":
        config = list(params["padding_config"])
        shape = op.equation.invars[0].aval.shape
        for axis, bits in enumerate(outputs[0]):
            if bits is not None:
                low = max(config[axis][0], 0)
                before = int(np.count_nonzero(bits[:low]))
                after = int(np.count_nonzero(bits[low + shape[axis] + min(config[axis][0], 0) :]))
                config[axis] = (before, after, 0)
        params["padding_config"] = tuple(config)
    return params


def _run_move(call: Call) -> list[Any]:
    if not call.plan:
        whole = dependence.bind(call.op, call.arrays, call.batch)
        return [
            dependence.pick(each, (None,) * len(bits), bits)
            for each, bits in zip(whole, call.outputs, strict=True)
        ]
    params = _adapt(call.op, call.kept, call.outputs, call.batch)
    moved = call.op.equation.primitive.bind(*call.arrays, **params)
    return list(moved) if call.op.equation.primitive.multiple_results else [moved]


MOVE = Rule(_known_move, _wish_move, dependence.no_fold, _run_move)
