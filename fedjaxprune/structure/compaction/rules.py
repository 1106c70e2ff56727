"""Which rule an operation has."""

from collections.abc import Sequence

from fedjaxprune.structure import moves
from fedjaxprune.structure.compaction import additions, dependence, elementwise, shape_ops
from fedjaxprune.structure.compaction.dependence import Known, Rule
from fedjaxprune.structure.compaction.program import Op


def choose(op: Op, operands: Sequence[Known]) -> Rule:
    """Choose by the primitive, and by what its operands are made of."""
    name, params = op.equation.primitive.name, op.equation.params
    if any(dependence.is_opaque(v.aval.dtype) for v in (*op.equation.invars, *op.equation.outvars)):
        return shape_ops.OTHER
    if elementwise.is_pointwise(op):
        return elementwise.POINTWISE
    if name in moves.MOVES and len(op.inputs) == _num_operands(name, op):
        return elementwise.MOVE
    if name == "conv_general_dilated" and operands[1].static and params["batch_group_count"] == 1:
        if params["feature_group_count"] == 1:
            return additions.CONV
        if additions.is_by_channel(op):
            return additions.DEPTHWISE
    if name == "dot_general":
        return additions.DOT
    if name in additions.REDUCTIONS:
        return additions.REDUCE
    if name in shape_ops.WINDOWS and len(op.inputs) == 1:
        return shape_ops.WINDOW
    if name == "gather" and shape_ops.is_lookup(op, operands):
        return shape_ops.LOOKUP
    return shape_ops.OTHER


def _num_operands(name: str, op: Op) -> int:
    """Count the operands of a move whose sizes are all known beforehand."""
    return len(op.inputs) if name == "concatenate" else 2 if name == "pad" else 1
