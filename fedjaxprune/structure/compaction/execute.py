"""Play a program: as it is, or with what is kept of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fedjaxprune.structure.compaction import dependence
from fedjaxprune.structure.compaction.dependence import Call, Kept, Rule
from fedjaxprune.structure.compaction.program import Block, Op, Program, at


class Step(NamedTuple):
    """An operation as the smaller network does it."""

    op: Op
    rule: Rule
    plan: Any  # of the rule
    operands: tuple[Kept, ...]  # what it reads of each operand
    outputs: tuple[Kept, ...]  # what is kept of each output
    constant: str | None  # name of what the channels that are gone contribute


class Fused(NamedTuple):
    """Steps that a fast form does at once, where the number of examples is known."""

    block: Block
    steps: tuple[Step, ...]  # the same in plain steps, the convolution first
    operands: tuple[Kept, ...]  # what it reads of images, kernel and bias


Places = tuple[np.ndarray | None, ...]  # for each axis which stored entry stands where, or None


class Folded(NamedTuple):
    """A constant without its repetitions."""

    values: np.ndarray  # of size 1 along axes where it repeats itself everywhere
    places: Places


class Plan(NamedTuple):
    """The smaller network."""

    program: Program  # of the whole network
    steps: tuple[Step | Fused, ...]  # what is done of it, in order
    kept: dict[int, Kept]  # of each variable
    places: dict[str, Places]  # of the constants
    frozen: dict[int, str]  # variables that are constant as a whole: the constants' names


def smaller(plan: Plan, constants: dict[str, Any], arrays: Sequence[Any], batch: Any) -> list[Any]:
    """Play what is left of a network.

    Constants go by name, as `fold` compressed them, arrays are the program's inputs that are kept;
    the number of examples may be symbolic.
    """
    program = plan.program
    environment: dict[int, Any] = {
        variable: dependence.pick(
            value if dependence.is_opaque(value.dtype) else jnp.asarray(value), plan.kept[variable]
        )
        for variable, value in program.constants.items()
        if variable in plan.kept
    }
    environment.update(zip(program.inputs, arrays, strict=True))

    def unfolded(name: str) -> Any:
        return unfold(constants[name], plan.places[name])

    for variable, name in plan.frozen.items():
        shape = map(dependence.size, plan.kept[variable], at(program.shapes[variable], batch))
        environment[variable] = jnp.broadcast_to(unfolded(name), tuple(shape))

    def look(variable: int, wanted: Kept) -> Any:
        return dependence.pick(environment[variable], wanted, plan.kept[variable])

    for step in plan.steps:
        if isinstance(step, Fused) and isinstance(batch, int):
            x, kernel, bias = map(look, step.block.inputs, step.operands)
            name = step.steps[0].constant
            if name is not None:
                bias = bias + unfolded(name).reshape(-1)
            environment[step.block.output] = step.block.again(x, kernel, bias)
            continue
        for each in step.steps if isinstance(step, Fused) else (step,):
            read = list(map(look, each.op.inputs, each.operands))
            constant = None if each.constant is None else unfolded(each.constant)
            call = Call(each.op, each.plan, each.operands, each.outputs, read, constant, batch)
            environment.update(zip(each.op.outputs, each.rule.run(call), strict=True))
    return [environment[variable] for variable in program.outputs]


def fold(values: np.ndarray, repeats: Sequence[bool]) -> Folded:
    """Store every row that repeats itself once; of axes that are said to repeat, one."""
    places: list[np.ndarray | None] = [None] * values.ndim
    for axis in range(values.ndim):
        if repeats[axis]:
            values = np.take(values, [0], axis=axis)
        rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        if len(first) > 1 and len(first) > values.shape[axis] // 2:
            continue
        values = np.take(values, first, axis=axis)
        if len(first) > 1:
            places[axis] = inverse.reshape(-1).astype(np.int32)
    return Folded(values, tuple(places))


def unfold(values: Any, places: Sequence[np.ndarray | None]) -> Any:
    """Undo `fold`, but for axes of size 1."""
    for axis, where in enumerate(places):
        if where is not None:
            values = jnp.take(values, where, axis=axis, mode="clip")
    return values
