"""Which rule an operation has."""

from collections.abc import Sequence

from fedjaxprune.compaction import arithmetic, entrywise, facts, others, sums
from fedjaxprune.compaction.facts import Known, Rule
from fedjaxprune.compaction.program import Op


def choose(op: Op, operands: Sequence[Known]) -> Rule:
    """Choose by the primitive, and by what its operands are made of."""
    name, params = op.equation.primitive.name, op.equation.params
    if any(facts.is_opaque(v.aval.dtype) for v in (*op.equation.invars, *op.equation.outvars)):
        return others.OTHER
    if entrywise.is_pointwise(op):
        return entrywise.POINTWISE
    if name in arithmetic.MOVES and len(op.inputs) == _num_operands(name, op):
        return entrywise.MOVE
    if name == "conv_general_dilated" and operands[1].static and params["batch_group_count"] == 1:
        if params["feature_group_count"] == 1:
            return sums.CONV
        if sums.is_by_channel(op):
            return sums.DEPTHWISE
    if name == "dot_general":
        return sums.DOT
    if name in sums.REDUCTIONS:
        return sums.REDUCE
    if name in others.WINDOWS and len(op.inputs) == 1:
        return others.WINDOW
    if name == "gather" and others.is_lookup(op, operands):
        return others.LOOKUP
    return others.OTHER


def _num_operands(name: str, op: Op) -> int:
    """Count the operands of a move whose sizes are all known beforehand."""
    return len(op.inputs) if name == "concatenate" else 2 if name == "pad" else 1
