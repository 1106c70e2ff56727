"""Rules of windows, look-ups, and of everything that is not understood: that sees all channels."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fedjaxprune.structure import jaxprs, moves
from fedjaxprune.structure.compaction import dependence
from fedjaxprune.structure.compaction.dependence import Call, Known, Rule, Site, Wishes
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
_TRIVIAL = {
    "window_dimensions": 1,
    "window_strides": 1,
    "padding": (0, 0),
    "base_dilation": 1,
    "window_dilation": 1,
}


def _sliding(op: Op) -> set[int]:
    """List the axes along which entries meet."""
    params = op.equation.params
    if "window_dimensions" not in params:
        return {params["axis"]}
    axes = range(len(params["window_dimensions"]))
    return {axis for axis in axes if any(params[n][axis] != v for n, v in _TRIVIAL.items())}


def _known_window(op: Op, operands: Sequence[Known]) -> list[Known]:
    varies = np.any(operands[0].varies, axis=tuple(_sliding(op)), keepdims=True)
    return [dependence.known_where(op, operands, varies)]


def _wish_window(site: Site) -> Wishes:
    (whole,), kept = dependence.whole(site), site.outputs[0]
    sliding = _sliding(site.op)
    read = [whole[axis] if axis in sliding else bits for axis, bits in enumerate(kept)]
    made = [None if axis in sliding else bits for axis, bits in enumerate(read)]
    return dependence.wishes([read], tuple(made))


def _run_window(call: Call) -> list[Any]:
    (made,) = dependence.play(call)
    return [dependence.pick(made, call.outputs[0], call.plan)]


WINDOW = Rule(_known_window, _wish_window, _run_window)


# ---- looking rows up in a table


def is_lookup(op: Op, operands: Sequence[Known]) -> bool:
    """Tell whether rows of a table of parameters are looked up by something else."""
    table, places = operands
    return table.static and not places.static and bool(_offsets(op))


def _offsets(op: Op) -> dict[int, int]:
    """Say which axes of the table, taken whole, become which axes of the output."""
    numbers, sizes = op.equation.params["dimension_numbers"], op.equation.params["slice_sizes"]
    shape = op.equation.invars[0].aval.shape
    return {
        axis: place
        for axis, place in moves.places_of_gather(op.equation).items()
        if sizes[axis] == shape[axis] and axis not in numbers.start_index_map
    }


def _known_lookup(op: Op, operands: Sequence[Known]) -> list[Known]:
    table = np.asarray(operands[0].value)
    offsets, made = _offsets(op), dependence.output(op)
    rest = tuple(axis for axis in range(table.ndim) if axis not in offsets)
    first = table[tuple(slice(0, 1) if axis in rest else slice(None) for axis in range(table.ndim))]
    same = np.all(table == first, axis=rest, keepdims=True)
    dims = [1] * len(made.shape)
    for axis, place in offsets.items():
        dims[place] = table.shape[axis]
    varies, value = (np.broadcast_to(x.reshape(dims), made.shape) for x in (~same, first))
    return [Known(varies, value.astype(made.dtype), False)]


def _wish_lookup(site: Site) -> Wishes:
    kept = dependence.whole(site)
    for axis, place in _offsets(site.op).items():
        kept[0][axis] = site.outputs[0][place]
    return dependence.wishes(kept)


def _run_lookup(call: Call) -> list[Any]:
    params = at(call.op.params, call.batch)
    sizes = list(params["slice_sizes"])
    for axis in _offsets(call.op):
        sizes[axis] = call.arrays[0].shape[axis]
    return dependence.bind(call.op, call.arrays, {**params, "slice_sizes": tuple(sizes)})


LOOKUP = Rule(_known_lookup, _wish_lookup, _run_lookup)


# ---- the rest


def _known_other(op: Op, operands: Sequence[Known]) -> list[Known]:
    avals = [v.aval for v in op.equation.outvars]
    static = all(each.static for each in operands)
    if static:
        values = dependence.evaluate(op, [each.value for each in operands])
    else:
        values = [
            None if dependence.is_opaque(aval.dtype) else np.zeros(aval.shape, aval.dtype)
            for aval in avals
        ]
    return [
        Known(np.full(aval.shape, not static), value, static)
        for aval, value in zip(avals, values, strict=True)
    ]


def _wish_other(site: Site) -> Wishes:
    return dependence.wishes(dependence.whole(site))


def _run_other(call: Call) -> list[Any]:
    made = _play(call.op, call.arrays, call.batch)
    return [dependence.pick(*pair) for pair in zip(made, call.outputs, strict=True)]


def _play(op: Op, arrays: Sequence[Any], batch: Any) -> list[Any]:
    params = _rebuilt(op, batch) if op.bodies else op.params
    return dependence.bind(op, arrays, at(params, batch))


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

    return jaxprs.map_graphs(remake, op.params)


OTHER = Rule(_known_other, _wish_other, _run_other)
