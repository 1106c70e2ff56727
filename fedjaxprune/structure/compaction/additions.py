"""Rules of operations that add channels up: what is left out of a sum goes into a constant."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune.kernels import convolution
from fedjaxprune.structure.compaction import arithmetic, dependence
from fedjaxprune.structure.compaction.dependence import Call, Facts, Kept, Known, Rule, Wish
from fedjaxprune.structure.compaction.program import Op

# ---- convolutions: images [batch, features, ...], kernel [outputs, inputs, ...]


def _axes(op: Op) -> tuple[int, int, int, int]:
    """Name the channels' axes: of the images, of the kernel in and out, of the output."""
    numbers = op.equation.params["dimension_numbers"]
    return numbers.lhs_spec[1], numbers.rhs_spec[1], numbers.rhs_spec[0], numbers.out_spec[1]


def _along(vector: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    return vector.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _reads(kernel: Known, inputs: int, outputs: int) -> np.ndarray:
    """Tell which inputs each output reads: ``[inputs, outputs]``."""
    taps = np.moveaxis(np.asarray(kernel.value) != 0, (inputs, outputs), (-2, -1))
    return taps.reshape(-1, *taps.shape[-2:]).any(axis=0)


def _known_conv(op: Op, operands: Sequence[Known]) -> list[Known]:
    x, kernel = operands
    features, inputs, outputs, place = _axes(op)
    shape, dtype = op.equation.outvars[0].aval.shape, op.equation.outvars[0].aval.dtype
    reads = _reads(kernel, inputs, outputs)
    alive = dependence.along(x.varies, features)
    varies = np.asarray((alive[:, None] & reads).any(axis=0))
    value = np.zeros(shape, dtype)
    silent = dependence.silent(x)
    contributes = dependence.along(silent != 0, features)
    if not varies.all() and contributes.any():
        made = _part(op, silent, np.asarray(kernel.value), contributes, ~varies)
        value[(slice(None),) * place + (np.flatnonzero(~varies),)] = made
    shown = np.broadcast_to(_along(varies, place, len(shape)), shape)
    return [Known(shown, value, x.static and kernel.static)]


def _part(
    op: Op, x: np.ndarray, kernel: np.ndarray, ins: np.ndarray, outs: np.ndarray
) -> np.ndarray:
    """Convolve some channels into some others."""
    features, inputs, outputs, _ = _axes(op)
    kernel = np.compress(outs, np.compress(ins, kernel, axis=inputs), axis=outputs)
    return arithmetic.conv(np.compress(ins, x, axis=features), kernel, op.equation.params)


def _wish_conv(
    op: Op, known: Facts, outputs: Sequence[Kept], operands: Sequence[Kept | None]
) -> tuple[list[Wish], Any]:
    x, kernel = op.inputs
    features, ins, outs, place = _axes(op)
    made = outputs[0][place]
    reads = _reads(known.known[kernel], ins, outs)
    read = np.asarray((reads if made is None else reads[:, made]).any(axis=1))
    images, taps = list(dependence.everything(known, x)), list(dependence.everything(known, kernel))
    images[features] = read if known.droppable[x][features] else None
    given = operands[0]
    taps[ins] = None if given is None else given[features]
    taps[outs] = made
    return [Wish(tuple(images), frozenset((features,))), Wish(tuple(taps))], None


def _fold_conv(
    op: Op, known: Facts, kept: Sequence[Kept], outputs: Sequence[Kept]
) -> np.ndarray | None:
    features, _, _, place = _axes(op)
    bits, made = kept[0][features], outputs[0][place]
    if bits is None or bits.all():
        return None
    x, kernel = (known.known[variable] for variable in op.inputs)
    silent = dependence.silent(x)
    contributes = ~bits & dependence.along(silent != 0, features)
    outs = np.ones(op.equation.outvars[0].aval.shape[place], bool) if made is None else made
    if not contributes.any() or not outs.any():
        return None
    return _part(op, silent, np.asarray(kernel.value), contributes, outs)


def _run_conv(call: Call) -> list[Any]:
    x, kernel = call.arrays
    params = dict(call.op.equation.params)
    params.pop("batch_group_count")
    if params["feature_group_count"] != 1:
        params["feature_group_count"] = x.shape[params["dimension_numbers"].lhs_spec[1]]
    # This package's form, which is fast on CPU, needs sizes that are numbers.
    is_sized = all(isinstance(n, int) for n in x.shape)
    form = convolution.conv_general_dilated if is_sized else jax.lax.conv_general_dilated
    params.pop("out_sharding", None)
    return [_plus(form(x, kernel, **params), call.constant)]


def _plus(output: Any, constant: Any) -> Any:
    if constant is None:
        return output
    return output + jnp.broadcast_to(constant, output.shape).astype(output.dtype)


CONV = Rule(_known_conv, _wish_conv, _fold_conv, _run_conv)


# ---- convolutions of each channel by itself


def is_by_channel(op: Op) -> bool:
    """Tell whether each channel of a convolution has filters of its own."""
    inputs = op.equation.params["dimension_numbers"].rhs_spec[1]
    return op.equation.invars[1].aval.shape[inputs] == 1


def _known_depthwise(op: Op, operands: Sequence[Known]) -> list[Known]:
    x, kernel = operands
    features, _, outputs, place = _axes(op)
    shape = op.equation.outvars[0].aval.shape
    alive = dependence.along(np.asarray(kernel.value) != 0, outputs)
    source = dependence.along(x.varies, features)
    varies = np.repeat(source, len(alive) // len(source)) & alive
    value = np.zeros(shape, op.equation.outvars[0].aval.dtype)
    silent = dependence.silent(x)
    if not varies.all() and np.any(silent != 0):
        (value,) = dependence.evaluate(op, [silent, kernel.value])
    shown = np.broadcast_to(_along(varies, place, len(shape)), shape)
    return [Known(shown, value, x.static and kernel.static)]


def _wish_depthwise(
    op: Op, known: Facts, outputs: Sequence[Kept], operands: Sequence[Kept | None]
) -> tuple[list[Wish], Any]:
    del operands
    x, kernel = op.inputs
    features, _, outs, place = _axes(op)
    images, taps = list(dependence.everything(known, x)), list(dependence.everything(known, kernel))
    made = outputs[0][place]
    if made is None or not known.droppable[x][features]:
        return [Wish(tuple(images)), Wish(tuple(taps))], None
    source = made.reshape(op.equation.invars[0].aval.shape[features], -1)
    source = np.asarray(source.any(axis=1))
    # All filters of a channel stay, or none: what is not wanted of them is taken away afterwards.
    images[features], taps[outs] = source, np.repeat(source, len(made) // len(source))
    return [Wish(tuple(images)), Wish(tuple(taps))], tuple(
        taps[outs] if axis == place else None for axis in range(len(outputs[0]))
    )


def _run_depthwise(call: Call) -> list[Any]:
    (made,) = _run_conv(call)
    have = (None,) * len(call.outputs[0]) if call.plan is None else call.plan
    return [dependence.pick(made, have, call.outputs[0])]


DEPTHWISE = Rule(_known_depthwise, _wish_depthwise, dependence.no_fold, _run_depthwise)


# ---- products of matrices


def _is_silent(known: Known) -> np.ndarray:
    return ~known.varies & (np.asarray(known.value) == 0)


def _known_dot(op: Op, operands: Sequence[Known]) -> list[Known]:
    numbers = op.equation.params["dimension_numbers"]
    contributes = [~_is_silent(each) for each in operands]
    varies = np.zeros(op.equation.outvars[0].aval.shape, bool)
    for side in (0, 1):
        if operands[side].varies.any():
            pair = [operands[i].varies if i == side else contributes[i] for i in (0, 1)]
            varies |= arithmetic.dot(pair[0], pair[1], numbers) > 0
    value = np.zeros(varies.shape, op.equation.outvars[0].aval.dtype)
    if not varies.all():
        silent = [dependence.silent(each) for each in operands]
        value = arithmetic.dot(silent[0], silent[1], numbers).astype(value.dtype)
    return [Known(varies, value, all(each.static for each in operands))]


def _places(op: Op) -> list[dict[int, int]]:
    """Say for both operands which of their axes becomes which axis of the output."""
    (contracted, batched) = op.equation.params["dimension_numbers"]
    places: list[dict[int, int]] = []
    offset = len(batched[0])
    for side in (0, 1):
        place = {axis: i for i, axis in enumerate(batched[side])}
        for axis in range(len(op.equation.invars[side].aval.shape)):
            if axis not in batched[side] and axis not in contracted[side]:
                place[axis] = offset
                offset += 1
        places.append(place)
    return places


def _wish_dot(
    op: Op, known: Facts, outputs: Sequence[Kept], operands: Sequence[Kept | None]
) -> tuple[list[Wish], Any]:
    contracted = op.equation.params["dimension_numbers"][0]
    kept = [list(dependence.everything(known, variable)) for variable in op.inputs]
    for side, place in enumerate(_places(op)):
        for axis, target in place.items():
            kept[side][axis] = outputs[0][target]
    static = [known.known[variable].static for variable in op.inputs]
    if all(static):
        return [Wish(tuple(each)) for each in kept], None
    silent = [_is_silent(known.known[variable]) for variable in op.inputs]
    if not any(static):  # what varies on both sides: only what is zero on one can go
        for pair in zip(*contracted, strict=True):
            contributes = [dependence.along(~silent[i], pair[i]) for i in (0, 1)]
            if all(known.droppable[op.inputs[i]][pair[i]] for i in (0, 1)):
                kept[0][pair[0]] = kept[1][pair[1]] = contributes[0] & contributes[1]
        return [Wish(tuple(each)) for each in kept], None
    moving = static.index(False)
    still = 1 - moving
    used = np.asarray(~silent[still])
    for axis, target in _places(op)[still].items():
        bits = outputs[0][target]
        used = used if bits is None else np.compress(bits, used, axis=axis)
    given = operands[moving]
    for axis, other in zip(contracted[moving], contracted[still], strict=True):
        is_free = known.droppable[op.inputs[moving]][axis]
        kept[moving][axis] = dependence.along(used, other) if is_free else None
        kept[still][other] = None if given is None else given[axis]
    wishes = [Wish(tuple(each)) for each in kept]
    wishes[moving] = wishes[moving]._replace(soft=frozenset(contracted[moving]))
    return wishes, None


def _left_out(known: Known, kept: Kept, axes: Sequence[int], filling: Any) -> np.ndarray | None:
    """Give the values of what is not kept along `axes`, and `filling` in the place of the rest."""
    if all(kept[axis] is None or kept[axis].all() for axis in axes):  # pyright: ignore[reportOptionalMemberAccess]
        return None
    own = tuple(bits if axis in axes else None for axis, bits in enumerate(kept))
    values = dependence.silent(known, filling).astype(np.float64)
    values[dependence.grid(own, values.shape)] = filling
    return values


def _fold_dot(
    op: Op, known: Facts, kept: Sequence[Kept], outputs: Sequence[Kept]
) -> np.ndarray | None:
    (contracted, _) = numbers = op.equation.params["dimension_numbers"]
    pair = [known.known[variable] for variable in op.inputs]
    if pair[0].static == pair[1].static:
        return None
    moving = 0 if pair[1].static else 1
    values = _left_out(pair[moving], kept[moving], contracted[moving], 0.0)
    if values is None or not values.any():
        return None
    sides = [values if i == moving else np.asarray(pair[i].value) for i in (0, 1)]
    total = arithmetic.dot(sides[0], sides[1], numbers)
    return total[dependence.grid(outputs[0], total.shape)]


def _run_sum(call: Call) -> list[Any]:
    return [_plus(dependence.bind(call.op, call.arrays, call.batch)[0], call.constant)]


DOT = Rule(_known_dot, _wish_dot, _fold_dot, _run_sum)


# ---- reductions

_REDUCTIONS = {
    "reduce_sum": (np.sum, 0.0, jnp.add),
    "reduce_max": (np.max, -np.inf, jnp.maximum),
    "reduce_min": (np.min, np.inf, jnp.minimum),
}
REDUCTIONS = tuple(_REDUCTIONS)


def _known_reduce(op: Op, operands: Sequence[Known]) -> list[Known]:
    (x,) = operands
    axes = tuple(op.equation.params["axes"])
    varies = np.any(x.varies, axis=axes)
    value = np.zeros(varies.shape, op.equation.outvars[0].aval.dtype)
    if not varies.all():
        (value,) = dependence.evaluate(op, [x.value])
    return [Known(varies, value, x.static)]


def _wish_reduce(
    op: Op, known: Facts, outputs: Sequence[Kept], operands: Sequence[Kept | None]
) -> tuple[list[Wish], Any]:
    del operands
    axes = set(op.equation.params["axes"])
    kept = list(dependence.everything(known, op.inputs[0]))
    targets = iter(outputs[0])
    for axis in range(len(kept)):
        if axis not in axes:
            kept[axis] = next(targets)
    return [Wish(tuple(kept), frozenset(axes))], None


def _fold_reduce(
    op: Op, known: Facts, kept: Sequence[Kept], outputs: Sequence[Kept]
) -> np.ndarray | None:
    axes = tuple(op.equation.params["axes"])
    function, filling, _ = _REDUCTIONS[op.equation.primitive.name]
    values = _left_out(known.known[op.inputs[0]], kept[0], axes, filling)
    if values is None or not (values != filling).any():
        return None
    total = np.asarray(function(values, axis=axes))
    return total[dependence.grid(outputs[0], total.shape)]


def _run_reduce(call: Call) -> list[Any]:
    (reduced,) = dependence.bind(call.op, call.arrays, call.batch)
    if call.constant is None:
        return [reduced]
    combine = _REDUCTIONS[call.op.equation.primitive.name][2]
    return [combine(reduced, jnp.broadcast_to(call.constant, reduced.shape).astype(reduced.dtype))]


REDUCE = Rule(_known_reduce, _wish_reduce, _fold_reduce, _run_reduce)
