"""The analysis: what varies, what is needed, and hence what is left of every variable.

The forward pass finds what depends on the network's inputs; other values are known numbers. The
backward pass finds what is read. An index of an axis of channels is removed if no operation reads
it, or if it is known and all that read it add up: then what it contributes is a constant. Where
arrays meet entry by entry, all of them keep what one of them needs.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjaxprune.structure.channels import rules as label_rules
from fedjaxprune.structure.channels.propagation import labels as labels_lib
from fedjaxprune.structure.compaction import additions, dependence, execute, rules, shape_ops
from fedjaxprune.structure.compaction.dependence import Facts, Kept, Known, Rule, Site, Wishes
from fedjaxprune.structure.compaction.execute import Fused, Plan, Step
from fedjaxprune.structure.compaction.program import Linear, Program


class Shrunken(NamedTuple):
    """A smaller network."""

    plan: Plan  # how it is executed
    kept: tuple[Kept, ...]  # of each leaf of params and state
    constants: dict[str, np.ndarray]  # what the channels that are gone contribute, by name
    # For each leaf the operations, by name, that see all of the channels it makes; None if nothing
    # reads the leaf any more.
    whole: tuple[tuple[str, ...] | None, ...]
    is_constant: bool  # whether the outputs do not depend on the inputs


def shrink(
    program: Program, params: Sequence[Any], state: Sequence[Any], paths: Sequence[str]
) -> Shrunken:
    """Find the smaller network in a program whose first inputs are these leaves.

    Pruned entries are exact zeros; constants are named after the paths of the parameters.
    """
    leaves = [
        leaf if dependence.is_opaque(leaf.dtype) else np.asarray(leaf)
        for leaf in jax.device_get([*params, *state])
    ]
    known, chosen, frozen = _look(program, leaves)
    seen = Facts(program, known, _droppable(program, len(params), len(leaves)))
    kept, wishes = _decide(seen, chosen, frozen)
    steps: dict[int, Step] = {}
    constants: dict[str, np.ndarray] = {}
    places: dict[str, execute.Places] = {}
    origins = _origins(program, paths)

    def store(values: np.ndarray, variable: int, inputs: Sequence[int], name: str, end: str) -> str:
        """Keep a constant: named by the parameter that it comes from, without repetitions."""
        found = [origins[each] for each in inputs if each in origins]
        base = f"{found[-1]}{end}" if found else name
        names = itertools.chain([base], (f"{base}_{number}" for number in itertools.count(2)))
        name = next(each for each in names if each not in constants)
        dtype, shape = program.dtypes[variable], program.shapes[variable]
        if np.issubdtype(dtype, np.integer):
            values = np.clip(values, np.iinfo(dtype).min, np.iinfo(dtype).max)
        repeats = [isinstance(n, Linear) for n in shape]
        constants[name], places[name] = execute.fold(values.astype(dtype), repeats)
        return name

    for number, (op, rule) in enumerate(zip(program.ops, chosen, strict=True)):
        if number not in wishes:
            continue
        read, plan = wishes[number]
        operands = tuple(
            tuple(
                kept[variable][axis] if axis in wish.soft else bits
                for axis, bits in enumerate(wish.kept)
            )
            for variable, wish in zip(op.inputs, read, strict=True)
        )
        outputs = tuple(kept[variable] for variable in op.outputs)
        folded, name = rule.fold(Site(op, seen, operands, outputs)), None
        if folded is not None:
            name = store(folded, op.outputs[0], op.inputs, f"operation_{number}", "")
        steps[number] = Step(op, rule, plan, operands, outputs, name)
    names = {}
    read = {v for step in steps.values() for v in step.op.inputs} | set(program.outputs)
    for variable in sorted(frozen & read):
        value = dependence.part(np.asarray(known[variable].value), kept[variable])
        names[variable] = store(value, variable, [variable], f"value_{variable}", "/output")
    inputs = program.inputs[: len(leaves)]
    return Shrunken(
        Plan(program, _fused(program, steps, kept, constants), kept, places, names),
        tuple(kept[variable] for variable in inputs),
        constants,
        tuple(_whole(program, chosen, v) if v in read else None for v in inputs),
        all(known[variable].static for variable in program.outputs),
    )


def _origins(program: Program, paths: Sequence[str]) -> dict[int, str]:
    """Say which parameter each variable comes from; of several, the one that is read last."""
    origins = dict(zip(program.inputs, paths, strict=False))
    for op in program.ops:
        found = [origins[variable] for variable in op.inputs if variable in origins]
        if found:
            origins |= dict.fromkeys(op.outputs, found[-1])
    return origins


def _whole(program: Program, chosen: Sequence[Rule], leaf: int) -> tuple[str, ...]:
    """Name what reads all channels that a leaf makes, before they are added up."""
    reached, names = {leaf}, []
    for op, rule in zip(program.ops, chosen, strict=True):
        is_sum = rule in (additions.CONV, additions.DOT)
        if is_sum and op.inputs[0] in reached and op.inputs[0] != leaf:
            continue
        if reached & set(op.inputs):
            if rule is shape_ops.OTHER:
                names.append(op.equation.primitive.name)
            reached |= set(op.outputs)
    return tuple(dict.fromkeys(names))


def _fused(
    program: Program, steps: dict[int, Step], kept: dict[int, Kept], constants: dict[str, Any]
) -> tuple[Step | Fused, ...]:
    """Put steps together again that a fast form does at once."""
    left: dict[int, Step | Fused] = dict(steps)
    for block in program.blocks:
        own = [steps[number] for number in block.ops if number in steps]
        if len(own) != len(block.ops) or not own:
            continue
        wanted: dict[int, Kept] = {}
        for step in own:
            wanted.update(zip(step.op.inputs, step.operands, strict=True))
        first = own[0]
        if set(first.op.inputs) != set(block.inputs[:2]) or block.inputs[2] not in wanted:
            continue
        shape = (1,) if first.constant is None else constants[first.constant].shape
        is_by_pixel = np.prod(shape) != shape[-1]  # it differs from pixel to pixel
        if is_by_pixel or any(step.constant for step in own[1:]):
            continue
        operands = tuple(wanted[variable] for variable in block.inputs)
        if all(_same(made[-1], kept[block.output][-1]) for made in operands[1:]):
            for number in block.ops:
                del left[number]
            left[block.ops[0]] = Fused(block, tuple(own), operands)
    return tuple(left[number] for number in sorted(left))


def _same(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    """Tell whether two keep the same of an axis."""
    if first is None or second is None:
        return dependence.is_whole((first, second))
    return bool((first == second).all())


def _look(program: Program, leaves: Sequence[Any]) -> tuple[dict[int, Known], list[Rule], set[int]]:
    """Go forwards: facts of all variables, rules, and what turns out to be constant altogether."""
    known: dict[int, Known] = {}
    frozen: set[int] = set()
    given = dict(zip(program.inputs, leaves, strict=False)) | program.constants
    for variable in (*program.inputs, *program.constants):
        shape = dependence.full_size(program.shapes[variable])
        is_given = variable in given
        value = given[variable] if is_given else np.zeros(shape, program.dtypes[variable])
        known[variable] = Known(np.full(shape, not is_given), value, is_given)
    chosen = []
    for op in program.ops:
        operands = [known[variable] for variable in op.inputs]
        rule = rules.choose(op, operands)
        chosen.append(rule)
        for variable, found in zip(op.outputs, rule.known(op, operands), strict=True):
            found = _alike(found, program.shapes[variable])
            is_known = not found.static and not found.varies.any()
            if is_known or (found.static and frozen & set(op.inputs)):
                found = found._replace(static=True)
                frozen.add(variable)
            known[variable] = found
    return known, chosen, frozen


def _alike(found: Known, shape: Sequence[int | Linear]) -> Known:
    """Call what differs between the examples of a batch varying, whatever it is made of."""
    if found.static or found.varies.all():
        return found
    varies = found.varies
    for axis, size in enumerate(shape):
        if isinstance(size, Linear):
            values = np.where(varies, 0, found.value)
            first = np.take(values, [0], axis=axis)
            if not (values == first).all():
                varies = np.ones_like(varies)
    return found._replace(varies=varies)


def _droppable(program: Program, num_params: int, num_leaves: int) -> dict[int, tuple[bool, ...]]:
    """Tell which axes count channels: those along which entries belong to indices of leaves."""
    book = labels_lib.new_book()
    values: dict[int, labels_lib.Value] = {}
    for i, variable in enumerate(program.inputs):
        shape = dependence.full_size(program.shapes[variable])
        values[variable] = (
            labels_lib.new_value(book, i, shape, is_param=i < num_params)
            if i < num_leaves
            else labels_lib.Value(shape, varies=True)
        )
    for variable, value in program.constants.items():
        values[variable] = label_rules.constant(value)
    for op in program.ops:
        outputs = label_rules.apply(book, op.equation, [values[v] for v in op.inputs])
        values.update(zip(op.outputs, outputs, strict=True))
    axes = {
        variable: set[int]().union(*map(labels_lib.varying, value.labels))
        for variable, value in values.items()
    }
    return {
        variable: tuple(
            axis in axes.get(variable, ()) and not isinstance(size, Linear)
            for axis, size in enumerate(shape)
        )
        for variable, shape in program.shapes.items()
    }


def _decide(
    seen: Facts, chosen: Sequence[Rule], frozen: set[int]
) -> tuple[dict[int, Kept], dict[int, Wishes]]:
    """Go backwards, first over what varies, then over what parameters alone decide."""
    program = seen.program
    hard, soft = ({v: _nothing(seen, v) for v in seen.known} for _ in range(2))
    hard |= {variable: dependence.everything(seen, variable) for variable in program.outputs}
    read = set(program.outputs)
    never_read = set(program.inputs).difference(*(op.inputs for op in program.ops))
    kept: dict[int, Kept] = {}
    wishes: dict[int, Wishes] = {}

    def settle(variable: int) -> Kept:
        if variable not in kept and variable in never_read:  # by the network, not only here
            kept[variable] = dependence.everything(seen, variable)
        elif variable not in kept:
            is_read = variable in read or variable in program.inputs
            known = seen.known[variable]
            kept[variable] = _settle(known, hard[variable], soft[variable], is_read)
        return kept[variable]

    for is_static in (False, True):
        for number, op in reversed(list(enumerate(program.ops))):
            if all(seen.known[v].static for v in op.outputs) and not is_static:
                continue
            if all(v in frozen or v not in read for v in op.outputs):
                continue
            outputs = [settle(v) for v in op.outputs]
            site = Site(op, seen, [kept.get(v) for v in op.inputs], outputs)
            wishes[number] = chosen[number].wish(site)
            for variable, wish in zip(op.inputs, wishes[number][0], strict=True):
                if seen.known[variable].static == is_static:
                    read.add(variable)
                    for part, is_soft in ((hard, False), (soft, True)):
                        part[variable] = tuple(
                            _united(bits, wish.kept[axis] if (axis in wish.soft) == is_soft else 0)
                            for axis, bits in enumerate(part[variable])
                        )
        for variable in seen.known:  # what no operation makes, and what is not read
            if seen.known[variable].static == is_static:
                settle(variable)
    return kept, wishes


def _nothing(seen: Facts, variable: int) -> Kept:
    whole = dependence.everything(seen, variable)
    return tuple(None if bits is None else np.zeros_like(bits) for bits in whole)


def _united(bits: np.ndarray | None, more: Any) -> np.ndarray | None:
    """Add to what is kept; None means all."""
    if bits is None:
        return None
    return np.ones_like(bits) if more is None else bits | np.asarray(more, bool)


def _settle(known: Known, hard: Kept, soft: Kept, is_read: bool) -> Kept:
    """Keep what must be kept, and what varies of what may go."""
    kept = []
    for axis, (must, may) in enumerate(zip(hard, soft, strict=True)):
        if must is None or may is None:
            kept.append(None)
            continue
        varying = True if known.static else dependence.along(known.varies, axis)
        bits = must | (may & varying)
        if is_read and not bits.any():  # one channel has to stay, or there is no array
            bits = np.arange(len(bits)) == 0
        kept.append(bits)
    return tuple(kept)
