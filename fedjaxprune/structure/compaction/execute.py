"""Play a program: as it is, or with what is kept of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fedjaxprune.structure.compaction import dependence
from fedjaxprune.structure.compaction.dependence import Call, Kept, Rule
from fedjaxprune.structure.compaction.program import Block, Op, Program, at


class Step(NamedTuple):
    """An operation as the smaller network does it.

    Attributes:
      op: the operation.
      rule: that executes it.
      plan: of the rule.
      operands: what it reads of each operand.
      outputs: what is kept of each output.
      constant: name of what the channels that are gone contribute, or None.
    """

    op: Op
    rule: Rule
    plan: Any
    operands: tuple[Kept, ...]
    outputs: tuple[Kept, ...]
    constant: str | None


class Fused(NamedTuple):
    """Steps that a fast form does at once, where the number of examples is known.

    Attributes:
      block: what the form stands for.
      steps: the same in plain steps, the convolution first.
      operands: what it reads of images, kernel and bias.
    """

    block: Block
    steps: tuple[Step, ...]
    operands: tuple[Kept, ...]


class Folded(NamedTuple):
    """A constant without its repetitions.

    Attributes:
      values: ``[...]``, of size 1 along axes where it repeats itself everywhere.
      places: for each axis which entry of `values` stands where, or None.
    """

    values: np.ndarray
    places: tuple[np.ndarray | None, ...]


class Plan(NamedTuple):
    """The smaller network.

    Attributes:
      program: of the whole network.
      steps: what is done of it, in order.
      kept: of each variable.
      places: of the constants: where the entries that are stored stand.
      frozen: variables that are constant as a whole: the constants' names.
    """

    program: Program
    steps: tuple[Step | Fused, ...]
    kept: dict[int, Kept]
    places: dict[str, tuple[np.ndarray | None, ...]]
    frozen: dict[int, str]


def smaller(plan: Plan, constants: dict[str, Any], arrays: Sequence[Any], batch: Any) -> list[Any]:
    """Play what is left of a network.

    Args:
      plan: of the smaller network.
      constants: by name, as `fold` compressed them.
      arrays: the inputs of the program that are kept.
      batch: number of examples; may be symbolic.
    """
    program = plan.program
    environment: dict[int, Any] = {
        variable: dependence.pick(
            value if dependence.is_opaque(value.dtype) else jnp.asarray(value),
            (None,) * value.ndim,
            plan.kept[variable],
        )
        for variable, value in program.constants.items()
        if variable in plan.kept
    }
    environment.update(zip(program.inputs, arrays, strict=True))
    for variable, name in plan.frozen.items():
        shape = [
            dependence.size(bits, full)
            for bits, full in zip(
                plan.kept[variable], at(program.shapes[variable], batch), strict=True
            )
        ]
        spread = unfold(constants[name], plan.places[name])
        environment[variable] = jnp.broadcast_to(spread, shape)

    def look(variable: int, wanted: Kept) -> Any:
        return dependence.pick(environment[variable], plan.kept[variable], wanted)

    def constant(step: Step) -> Any:
        name = step.constant
        return None if name is None else unfold(constants[name], plan.places[name])

    for step in plan.steps:
        if isinstance(step, Fused) and isinstance(batch, int):
            pairs = zip(step.block.inputs, step.operands, strict=True)
            x, kernel, bias = (look(*pair) for pair in pairs)
            more = constant(step.steps[0])
            if more is not None:
                bias = bias + more.reshape(-1)
            environment[step.block.output] = step.block.again(x, kernel, bias)
            continue
        for each in step.steps if isinstance(step, Fused) else (step,):
            read = [look(*pair) for pair in zip(each.op.inputs, each.operands, strict=True)]
            call = Call(
                each.op, each.plan, each.operands, each.outputs, read, constant(each), batch
            )
            environment.update(zip(each.op.outputs, each.rule.run(call), strict=True))
    return [environment[variable] for variable in program.outputs]


def fold(values: np.ndarray, repeats: Sequence[bool]) -> Folded:
    """Store every row that repeats itself once; of axes that are said to repeat, one."""
    places: list[np.ndarray | None] = []
    for axis in range(values.ndim):
        if repeats[axis]:
            values = np.take(values, [0], axis=axis)
        rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        inverse = inverse.reshape(-1)
        if len(first) == 1:
            values = np.take(values, [0], axis=axis)
            places.append(None)
        elif len(first) <= values.shape[axis] // 2:
            values = np.take(values, first, axis=axis)
            places.append(inverse.astype(np.int32))
        else:
            places.append(None)
    return Folded(values, tuple(places))


def unfold(values: Any, places: Sequence[np.ndarray | None]) -> Any:
    """Undo `fold`, but for axes of size 1."""
    for axis, where in enumerate(places):
        if where is not None:
            values = jnp.take(values, where, axis=axis, mode="clip")
    return values
