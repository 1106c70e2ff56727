"""Rules of operations that add channels up: what is left out of a sum goes into a constant."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune.kernels import convolution
from fedjaxprune.structure import moves
from fedjaxprune.structure.compaction import arithmetic, dependence
from fedjaxprune.structure.compaction.dependence import Call, Kept, Known, Rule, Site, Wish, Wishes
from fedjaxprune.structure.compaction.program import Op

# ---- convolutions: images [batch, features, ...], kernel [outputs, inputs, ...]


def _axes(op: Op) -> tuple[int, int, int, int]:
    """Name the channels' axes: of the images, of the kernel in and out, of the output."""
    numbers = op.equation.params["dimension_numbers"]
    return numbers.lhs_spec[1], numbers.rhs_spec[1], numbers.rhs_spec[0], numbers.out_spec[1]


def _shown(varies: np.ndarray, axis: int, shape: tuple[int, ...]) -> np.ndarray:
    """Spread out what varies among the channels of an axis."""
    dims = [-1 if i == axis else 1 for i in range(len(shape))]
    return np.broadcast_to(varies.reshape(dims), shape)


def _reads(kernel: Known, inputs: int, outputs: int) -> np.ndarray:
    """Tell which inputs each output reads: ``[inputs, outputs]``."""
    taps = np.moveaxis(np.asarray(kernel.value) != 0, (inputs, outputs), (-2, -1))
    return taps.reshape(-1, *taps.shape[-2:]).any(axis=0)


def _known_conv(op: Op, operands: Sequence[Known]) -> list[Known]:
    x, kernel = operands
    features, inputs, outputs, place = _axes(op)
    reads = _reads(kernel, inputs, outputs)
    alive = dependence.along(x.varies, features)
    varies = np.asarray((alive[:, None] & reads).any(axis=0))
    made = dependence.output(op)
    value = np.zeros(made.shape, made.dtype)
    silent = dependence.silent(x)
    contributes = dependence.along(silent != 0, features)
    if not varies.all() and contributes.any():
        part = _part(op, silent, kernel, contributes, ~varies)
        value[(slice(None),) * place + (np.flatnonzero(~varies),)] = part
    return [Known(_shown(varies, place, made.shape), value, x.static and kernel.static)]


def _part(op: Op, x: np.ndarray, kernel: Known, ins: np.ndarray, outs: np.ndarray) -> np.ndarray:
    """Convolve some channels into some others."""
    features, inputs, outputs, _ = _axes(op)
    taps = np.compress(outs, np.compress(ins, np.asarray(kernel.value), axis=inputs), axis=outputs)
    return arithmetic.conv(np.compress(ins, x, axis=features), taps, op.equation.params)


def _wish_conv(site: Site) -> Wishes:
    x, kernel = site.op.inputs
    features, ins, outs, place = _axes(site.op)
    made, given = site.outputs[0][place], site.operands[0]
    reads = _reads(site.facts.known[kernel], ins, outs)
    read = np.asarray((reads if made is None else reads[:, made]).any(axis=1))
    images, taps = dependence.whole(site)
    images[features] = read if site.facts.droppable[x][features] else None
    taps[ins] = None if given is None else given[features]
    taps[outs] = made
    return [Wish(tuple(images), frozenset((features,))), Wish(tuple(taps))], None


def _fold_conv(site: Site) -> np.ndarray | None:
    features, _, _, place = _axes(site.op)
    bits, made = site.operands[0][features], site.outputs[0][place]
    if bits is None or bits.all():
        return None
    x, kernel = (site.facts.known[variable] for variable in site.op.inputs)
    silent = dependence.silent(x)
    contributes = ~bits & dependence.along(silent != 0, features)
    outs = np.ones(dependence.output(site.op).shape[place], bool) if made is None else made
    if not contributes.any() or not outs.any():
        return None
    return _part(site.op, silent, kernel, contributes, outs)


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
    return [_with_constant(jnp.add, form(x, kernel, **params), call.constant)]


def _with_constant(combine: Any, output: Any, constant: Any) -> Any:
    if constant is None:
        return output
    return combine(output, jnp.broadcast_to(constant, output.shape).astype(output.dtype))


CONV = Rule(_known_conv, _wish_conv, _run_conv, _fold_conv)


# ---- convolutions of each channel by itself


def is_by_channel(op: Op) -> bool:
    """Tell whether each channel of a convolution has filters of its own."""
    inputs = op.equation.params["dimension_numbers"].rhs_spec[1]
    return op.equation.invars[1].aval.shape[inputs] == 1


def _known_depthwise(op: Op, operands: Sequence[Known]) -> list[Known]:
    x, kernel = operands
    features, _, outputs, place = _axes(op)
    alive = dependence.along(np.asarray(kernel.value) != 0, outputs)
    source = dependence.along(x.varies, features)
    varies = np.repeat(source, len(alive) // len(source)) & alive
    made = dependence.output(op)
    value = np.zeros(made.shape, made.dtype)
    silent = dependence.silent(x)
    if not varies.all() and np.any(silent != 0):
        (value,) = dependence.evaluate(op, [silent, kernel.value])
    return [Known(_shown(varies, place, made.shape), value, x.static and kernel.static)]


def _wish_depthwise(site: Site) -> Wishes:
    features, _, outs, place = _axes(site.op)
    images, taps = dependence.whole(site)
    made = site.outputs[0][place]
    if made is None or not site.facts.droppable[site.op.inputs[0]][features]:
        return dependence.wishes([images, taps])
    source = made.reshape(site.op.equation.invars[0].aval.shape[features], -1)
    source = np.asarray(source.any(axis=1))
    # All filters of a channel stay, or none: what is not wanted of them is taken away afterwards.
    images[features], taps[outs] = source, np.repeat(source, len(made) // len(source))
    axes = range(len(site.outputs[0]))
    plan = tuple(taps[outs] if axis == place else None for axis in axes)
    return dependence.wishes([images, taps], plan)


def _run_depthwise(call: Call) -> list[Any]:
    return [dependence.pick(_run_conv(call)[0], call.outputs[0], call.plan)]


DEPTHWISE = Rule(_known_depthwise, _wish_depthwise, _run_depthwise)


# ---- products of matrices


def _known_dot(op: Op, operands: Sequence[Known]) -> list[Known]:
    numbers, made = op.equation.params["dimension_numbers"], dependence.output(op)
    contributes = [~dependence.is_zero(each) for each in operands]
    varies = np.zeros(made.shape, bool)
    for side in (0, 1):
        if operands[side].varies.any():
            pair = [operands[i].varies if i == side else contributes[i] for i in (0, 1)]
            varies |= arithmetic.dot(pair[0], pair[1], numbers) > 0
    value = np.zeros(made.shape, made.dtype)
    if not varies.all():
        silent = [dependence.silent(each) for each in operands]
        value = arithmetic.dot(silent[0], silent[1], numbers).astype(made.dtype)
    return [Known(varies, value, all(each.static for each in operands))]


def _wish_dot(site: Site) -> Wishes:
    (contracted, _) = numbers = site.op.equation.params["dimension_numbers"]
    kept = dependence.whole(site)
    places = moves.places_of_dot(numbers, list(map(len, kept)))
    for side, place in enumerate(places):
        for axis, target in place.items():
            kept[side][axis] = site.outputs[0][target]
    operands = [site.facts.known[variable] for variable in site.op.inputs]
    droppable = [site.facts.droppable[variable] for variable in site.op.inputs]
    static = [each.static for each in operands]
    contributes = [~dependence.is_zero(each) for each in operands]
    if not any(static):  # what varies on both sides: only what is zero on one can go
        for a, b in zip(*contracted, strict=True):
            if droppable[0][a] and droppable[1][b]:
                live = dependence.along(contributes[0], a) & dependence.along(contributes[1], b)
                kept[0][a] = kept[1][b] = live
    if all(static) or not any(static):
        return dependence.wishes(kept)
    moving = static.index(False)
    still = 1 - moving
    used, given = np.asarray(contributes[still]), site.operands[moving]
    for axis, target in places[still].items():
        bits = site.outputs[0][target]
        used = used if bits is None else np.compress(bits, used, axis=axis)
    for axis, other in zip(contracted[moving], contracted[still], strict=True):
        kept[moving][axis] = dependence.along(used, other) if droppable[moving][axis] else None
        kept[still][other] = None if given is None else given[axis]
    found, plan = dependence.wishes(kept)
    found[moving] = found[moving]._replace(soft=frozenset(contracted[moving]))
    return found, plan


def _left_out(known: Known, kept: Kept, axes: Sequence[int], filling: Any) -> np.ndarray | None:
    """Give the values of what is not kept along `axes`, and `filling` in the place of the rest."""
    own = tuple(bits if axis in axes else None for axis, bits in enumerate(kept))
    if dependence.is_whole(own):
        return None
    values = dependence.silent(known, filling).astype(np.float64)
    values[dependence.grid(own, values.shape)] = filling
    return values if (values != filling).any() else None


def _fold_dot(site: Site) -> np.ndarray | None:
    (contracted, _) = numbers = site.op.equation.params["dimension_numbers"]
    pair = [site.facts.known[variable] for variable in site.op.inputs]
    if pair[0].static == pair[1].static:
        return None
    moving = 0 if pair[1].static else 1
    values = _left_out(pair[moving], site.operands[moving], contracted[moving], 0.0)
    if values is None:
        return None
    sides = [values if i == moving else np.asarray(pair[i].value) for i in (0, 1)]
    return dependence.part(arithmetic.dot(sides[0], sides[1], numbers), site.outputs[0])


def _run_sum(call: Call) -> list[Any]:
    return [_with_constant(jnp.add, dependence.play(call)[0], call.constant)]


DOT = Rule(_known_dot, _wish_dot, _run_sum, _fold_dot)


# ---- reductions

_REDUCTIONS = {
    "reduce_sum": (np.sum, 0.0, jnp.add),
    "reduce_max": (np.max, -np.inf, jnp.maximum),
    "reduce_min": (np.min, np.inf, jnp.minimum),
}
REDUCTIONS = tuple(_REDUCTIONS)


def _known_reduce(op: Op, operands: Sequence[Known]) -> list[Known]:
    varies = np.any(operands[0].varies, axis=tuple(op.equation.params["axes"]))
    return [dependence.known_where(op, operands, varies)]


def _wish_reduce(site: Site) -> Wishes:
    axes = frozenset(site.op.equation.params["axes"])
    (whole,), targets = dependence.whole(site), iter(site.outputs[0])
    kept = [bits if axis in axes else next(targets) for axis, bits in enumerate(whole)]
    return [Wish(tuple(kept), axes)], None


def _fold_reduce(site: Site) -> np.ndarray | None:
    axes = tuple(site.op.equation.params["axes"])
    function, filling, _ = _REDUCTIONS[site.op.equation.primitive.name]
    known = site.facts.known[site.op.inputs[0]]
    values = _left_out(known, site.operands[0], axes, filling)
    if values is None:
        return None
    return dependence.part(np.asarray(function(values, axis=axes)), site.outputs[0])


def _run_reduce(call: Call) -> list[Any]:
    combine = _REDUCTIONS[call.op.equation.primitive.name][2]
    return [_with_constant(combine, dependence.play(call)[0], call.constant)]


REDUCE = Rule(_known_reduce, _wish_reduce, _run_reduce, _fold_reduce)
