"""Rules of operations that work entry by entry, or only move entries about."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjaxprune.structure import moves
from fedjaxprune.structure.channels.propagation import elementwise
from fedjaxprune.structure.compaction import dependence
from fedjaxprune.structure.compaction.dependence import Call, Kept, Known, Rule, Site, Wishes
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
    name = op.equation.primitive.name
    varies, zero = np.zeros((), bool), np.zeros((), bool)
    if name == "select_n":
        which, *cases = operands
        chosen = np.asarray(which.value).astype(np.int32)
        varies = which.varies | np.any([case.varies for case in cases], axis=0)
        for i, case in enumerate(cases):
            varies = np.where(~which.varies & (chosen == i), case.varies, varies)
    else:
        for each in operands:
            varies = varies | each.varies
            if name == "mul":  # whatever is finite, times zero
                zero = zero | dependence.is_zero(each)
        varies = varies & ~zero
    found = dependence.known_where(op, operands, varies)
    if name == "mul":
        found = found._replace(value=np.where(zero, np.zeros_like(found.value), found.value))
    return [found]


def _wish(site: Site) -> Wishes:
    full = dependence.output(site.op).shape

    def read(shape: tuple[int, ...]) -> list[Any]:  # a number has no axes
        axes = zip(shape, full, site.outputs[0], strict=bool(shape))
        return [bits if n == whole else None for n, whole, bits in axes]

    return dependence.wishes([read(v.aval.shape) for v in site.op.equation.invars])


POINTWISE = Rule(_known, _wish, dependence.play)


def _known_move(op: Op, operands: Sequence[Known]) -> list[Known]:
    name, params = op.equation.primitive.name, op.equation.params
    varies = moves.move(name, params, [each.varies for each in operands])
    values = moves.move(name, params, [np.asarray(each.value) for each in operands])
    static = all(each.static for each in operands)
    return [Known(a, b, static) for a, b in zip(varies, values, strict=True)]


def _wish_move(site: Site) -> Wishes:
    """Follow every entry to its source; then see whether the same move serves what is left."""
    op, outputs = site.op, site.outputs
    if all(map(dependence.is_whole, outputs)):
        return dependence.wishes(dependence.whole(site), False)
    name = op.equation.primitive.name
    numbers, count = [], 0
    for v in op.equation.invars:
        numbers.append(count + np.arange(v.aval.size).reshape(v.aval.shape))
        count += v.aval.size
    moved = moves.move(name, op.equation.params, numbers)
    wanted = [dependence.part(*pair) for pair in zip(moved, outputs, strict=True)]
    read = np.zeros(count, bool)
    for each in wanted:
        read[each] = True
    kept = [
        tuple(
            dependence.along(read[number], axis) if flag else None
            for axis, flag in enumerate(site.facts.droppable[variable])
        )
        for variable, number in zip(op.inputs, numbers, strict=True)
    ]
    try:
        parts = [dependence.part(*pair) for pair in zip(numbers, kept, strict=True)]
        again = moves.move(name, _adapt(op, kept, outputs, FEW), parts)
        if all(map(np.array_equal, again, wanted)):
            return dependence.wishes(kept, True)
    except ValueError:
        pass
    return dependence.wishes(dependence.whole(site), False)


def _adapt(op: Op, kept: Sequence[Kept], outputs: Sequence[Kept], batch: Any) -> dict[str, Any]:
    """Write sizes of what is kept into the parameters of a move."""
    name, params = op.equation.primitive.name, dict(at(op.params, batch))
    if name in ("reshape", "broadcast_in_dim"):
        entry = "new_sizes" if name == "reshape" else "shape"
        params[entry] = tuple(map(dependence.size, outputs[0], params[entry]))
    elif name == "slice":
        starts, limits = list(params["start_indices"]), list(params["limit_indices"])
        strides = list(params["strides"] or (1,) * len(starts))
        for axis, bits in enumerate(kept[0]):
            if bits is not None:
                starts[axis], limits[axis], strides[axis] = 0, dependence.size(bits, None), 1
        params |= {"start_indices": tuple(starts), "limit_indices": tuple(limits)}
        params["strides"] = tuple(strides)
    elif name == "split":
        along = [bits[params["axis"]] for bits in outputs]
        params["sizes"] = tuple(map(dependence.size, along, params["sizes"]))
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
        return list(map(dependence.pick, dependence.play(call), call.outputs))
    params = _adapt(call.op, call.kept, call.outputs, call.batch)
    return dependence.bind(call.op, call.arrays, params)


MOVE = Rule(_known_move, _wish_move, _run_move)
