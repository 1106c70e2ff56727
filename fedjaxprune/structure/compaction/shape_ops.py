"""Rules of windows, look-ups, and of everything that is not understood: that sees all channels."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fedjaxprune.structure.compaction import dependence
from fedjaxprune.structure.compaction.dependence import Call, Facts, Kept, Known, Rule, Wish
from fedjaxprune.structure.compaction.program import Op, Program, at

WINDOWS = (
    "reduce_window_max",
    "reduce_window_min",
    "reduce_window_sum",
    "cumsum",
    "cumprod",
    "cummax",
    "cummin",
)


def _sliding(op: Op) -> set[int]:
    """List the axes along which entries meet."""
    params = op.equation.params
    if "window_dimensions" not in params:
        return {params["axis"]}
    ndim = len(params["window_dimensions"])
    trivial = {
        "window_dimensions": 1,
        "window_strides": 1,
        "padding": (0, 0),
        "base_dilation": 1,
        "window_dilation": 1,
    }
    return {
        axis
        for axis in range(ndim)
        if any(params[name][axis] != value for name, value in trivial.items())
    }


def _known_window(op: Op, operands: Sequence[Known]) -> list[Known]:
    (x,) = operands
    shape = op.equation.outvars[0].aval.shape
    varies = np.any(x.varies, axis=tuple(_sliding(op)), keepdims=True)
    varies = np.broadcast_to(varies, shape)
    if varies.all() and varies.size:
        value = np.zeros(shape, op.equation.outvars[0].aval.dtype)
    else:
        (value,) = dependence.evaluate(op, [x.value])
    return [Known(varies, value, x.static)]


def _wish_window(
    op: Op, known: Facts, outputs: Sequence[Kept], operands: Sequence[Kept | None]
) -> tuple[list[Wish], Any]:
    del operands
    kept = list(outputs[0])
    whole = dependence.everything(known, op.inputs[0])
    for axis in _sliding(op):
        kept[axis] = whole[axis]
    return [Wish(tuple(kept))], tuple(
        whole[axis] if axis in _sliding(op) else bits for axis, bits in enumerate(outputs[0])
    )


def _run_window(call: Call) -> list[Any]:
    (made,) = dependence.bind(call.op, call.arrays, call.batch)
    have = tuple(None if axis in _sliding(call.op) else bits for axis, bits in enumerate(call.plan))
    return [dependence.pick(made, have, call.outputs[0])]


WINDOW = Rule(_known_window, _wish_window, dependence.no_fold, _run_window)


# ---- looking rows up in a table


def is_lookup(op: Op, operands: Sequence[Known]) -> bool:
    """Tell whether rows of a table of parameters are looked up by something else."""
    table, places = operands
    return table.static and not places.static and bool(_offsets(op))


def _offsets(op: Op) -> dict[int, int]:
    """Say which axes of the table, taken whole, become which axes of the output."""
    numbers, sizes = op.equation.params["dimension_numbers"], op.equation.params["slice_sizes"]
    shape = op.equation.invars[0].aval.shape
    gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
    windows = [axis for axis in range(len(shape)) if axis not in gone]
    places = dict(zip(windows, numbers.offset_dims, strict=True))
    return {
        axis: place
        for axis, place in places.items()
        if sizes[axis] == shape[axis] and axis not in numbers.start_index_map
    }


def _known_lookup(op: Op, operands: Sequence[Known]) -> list[Known]:
    table = np.asarray(operands[0].value)
    offsets = _offsets(op)
    shape, dtype = op.equation.outvars[0].aval.shape, op.equation.outvars[0].aval.dtype
    rest = tuple(axis for axis in range(table.ndim) if axis not in offsets)
    first = table[
        tuple(slice(None) if axis in offsets else slice(0, 1) for axis in range(table.ndim))
    ]
    same = np.all(table == first, axis=rest, keepdims=True)
    dims = [1] * len(shape)
    for axis, place in offsets.items():
        dims[place] = table.shape[axis]
    varies = np.broadcast_to(~same.reshape(dims), shape)
    return [Known(varies, np.broadcast_to(first.reshape(dims), shape).astype(dtype), False)]


def _wish_lookup(
    op: Op, known: Facts, outputs: Sequence[Kept], operands: Sequence[Kept | None]
) -> tuple[list[Wish], Any]:
    del operands
    kept = list(dependence.everything(known, op.inputs[0]))
    for axis, place in _offsets(op).items():
        kept[axis] = outputs[0][place]
    return [Wish(tuple(kept)), Wish(dependence.everything(known, op.inputs[1]))], None


def _run_lookup(call: Call) -> list[Any]:
    params = at(call.op.params, call.batch)
    sizes = list(params["slice_sizes"])
    for axis in _offsets(call.op):
        sizes[axis] = call.arrays[0].shape[axis]
    return [
        call.op.equation.primitive.bind(*call.arrays, **{**params, "slice_sizes": tuple(sizes)})
    ]


LOOKUP = Rule(_known_lookup, _wish_lookup, dependence.no_fold, _run_lookup)


# ---- the rest


def _known_other(op: Op, operands: Sequence[Known]) -> list[Known]:
    avals = [v.aval for v in op.equation.outvars]
    if all(each.static for each in operands):
        values = dependence.evaluate(op, [each.value for each in operands])
        return [
            Known(np.zeros(aval.shape, bool), value, True)
            for aval, value in zip(avals, values, strict=True)
        ]
    return [
        Known(
            np.ones(aval.shape, bool),
            None if dependence.is_opaque(aval.dtype) else np.zeros(aval.shape, aval.dtype),
            False,
        )
        for aval in avals
    ]


def _wish_other(
    op: Op, known: Facts, outputs: Sequence[Kept], operands: Sequence[Kept | None]
) -> tuple[list[Wish], Any]:
    del outputs, operands
    return [Wish(dependence.everything(known, variable)) for variable in op.inputs], None


def _run_other(call: Call) -> list[Any]:
    made = _play(call.op, call.arrays, call.batch)
    return [
        dependence.pick(each, (None,) * len(bits), bits)
        for each, bits in zip(made, call.outputs, strict=True)
    ]


def _play(op: Op, arrays: Sequence[Any], batch: Any) -> list[Any]:
    if op.bodies:
        op = op._replace(params=_rebuilt(op, batch))
    return dependence.bind(op, arrays, batch)


def _whole(program: Program, arrays: Sequence[Any], batch: Any) -> list[Any]:
    """Play a program with nothing left out."""
    environment = dict(program.constants)
    environment.update(zip(program.inputs, arrays, strict=True))
    for op in program.ops:
        made = _play(op, [environment[v] for v in op.inputs], batch)
        environment.update(zip(op.outputs, made, strict=True))
    return [environment[v] for v in program.outputs]


def _rebuilt(op: Op, batch: Any) -> dict[str, Any]:
    """Trace the graphs that an operation holds for a batch of another size."""
    bodies = iter(op.bodies)

    def remake(old: Any) -> Any:
        body = next(bodies)
        shapes = [
            jax.ShapeDtypeStruct(at(body.shapes[v], batch), body.dtypes[v]) for v in body.inputs
        ]
        made = jax.make_jaxpr(lambda *arrays: _whole(body, arrays, batch))(*shapes)
        return made if hasattr(old, "consts") else made.jaxpr

    def walk(value: Any) -> Any:
        if hasattr(value, "eqns"):
            return remake(value)
        if isinstance(value, (tuple, list)) and any(hasattr(each, "eqns") for each in value):
            return type(value)(walk(each) for each in value)
        return value

    return {name: walk(value) for name, value in op.params.items()}


OTHER = Rule(_known_other, _wish_other, dependence.no_fold, _run_other)
