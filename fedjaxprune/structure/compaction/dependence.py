"""What the analysis knows of a program's variables, and the shape of a rule.

Sizes are those of the trace with `program.FEW` examples.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune.structure.compaction import arithmetic
from fedjaxprune.structure.compaction.program import FEW, Linear, Op, Program, at

# Of a variable, for each axis: which indices are kept, ``[n]`` bool; None where all must be.
Kept = tuple[np.ndarray | None, ...]


class Known(NamedTuple):
    """What is known of a variable without looking at the network's inputs.

    Attributes:
      varies: ``[...]`` bool, the variable's shape: where it depends on the inputs.
      value: ``[...]`` where it does not, and anything elsewhere.
      static: whether it is made of parameters and constants alone.
    """

    varies: np.ndarray
    value: Any
    static: bool


class Facts(NamedTuple):
    """What is known of a program.

    Attributes:
      program: the operations.
      known: of each variable.
      droppable: of each variable, for each axis: whether it counts channels.
    """

    program: Program
    known: dict[int, Known]
    droppable: dict[int, tuple[bool, ...]]


class Wish(NamedTuple):
    """What an operation needs of an operand.

    Attributes:
      kept: the indices that it reads.
      soft: axes along which an index that does not vary may be left out all the same: what it
        contributes is a constant that the operation adds by itself.
    """

    kept: Kept
    soft: frozenset[int] = frozenset()


class Call(NamedTuple):
    """An operation as the smaller network does it once.

    Attributes:
      op: the operation.
      plan: of `Rule.wish`.
      kept: of the operands.
      outputs: what is kept of them.
      arrays: the operands.
      constant: what the channels that are gone contribute, or None.
      batch: number of examples; may be symbolic.
    """

    op: Op
    plan: Any
    kept: Sequence[Kept]
    outputs: Sequence[Kept]
    arrays: Sequence[Any]
    constant: Any
    batch: Any


class Rule(NamedTuple):
    """How the analysis treats a kind of operation.

    Attributes:
      known: ``(op, facts of the operands) -> facts of the outputs``.
      wish: ``(op, facts, kept of the outputs, kept of the operands) -> (wishes, plan)``; of an
        operand that is not decided yet None is given. The plan is handed to `run`.
      fold: ``(op, facts, kept of the operands, kept of the outputs) -> constant``, what the indices
        that are left out contribute, in the shape of the output that is kept; None for nothing.
      run: ``call -> outputs``.
    """

    known: Callable[[Op, Sequence[Known]], list[Known]]
    wish: Callable[[Op, Facts, Sequence[Kept], Sequence[Kept | None]], tuple[list[Wish], Any]]
    fold: Callable[[Op, Facts, Sequence[Kept], Sequence[Kept]], np.ndarray | None]
    run: Callable[[Call], list[Any]]


def no_fold(op: Op, known: Facts, kept: Sequence[Kept], outputs: Sequence[Kept]) -> None:
    """Contribute nothing."""
    del op, known, kept, outputs


def bind(op: Op, arrays: Sequence[Any], batch: Any) -> list[Any]:
    """Play an operation as it was traced, for a batch of another size."""
    params = at(op.params, batch)
    outputs = op.equation.primitive.bind(*arrays, **params)
    return list(outputs) if op.equation.primitive.multiple_results else [outputs]


def evaluate(op: Op, values: Sequence[Any]) -> list[Any]:
    """Play an operation on the host's numbers."""
    function = arithmetic.POINTWISE.get(op.equation.primitive.name)
    if function is not None:
        with np.errstate(all="ignore"):  # of entries that vary the numbers mean nothing
            return [
                np.asarray(function(*map(np.asarray, values)), op.equation.outvars[0].aval.dtype)
            ]
    outputs = op.equation.primitive.bind(*map(jnp.asarray, values), **op.equation.params)
    outputs = outputs if op.equation.primitive.multiple_results else [outputs]
    return [each if is_opaque(each.dtype) else np.asarray(each) for each in outputs]


def is_opaque(dtype: Any) -> bool:
    """Tell a key's type from a number's."""
    return bool(jnp.issubdtype(dtype, jax.dtypes.extended))


def full_size(shape: Sequence[int | Linear]) -> tuple[int, ...]:
    """Give the shape that the analysis sees."""
    return at(tuple(shape), FEW)


def everything(facts: Facts, variable: int) -> Kept:
    """Keep all of a variable."""
    shape = full_size(facts.program.shapes[variable])
    axes = zip(shape, facts.droppable[variable], strict=True)
    return tuple(np.ones(n, bool) if flag else None for n, flag in axes)


def along(bits: np.ndarray, axis: int) -> np.ndarray:
    """Tell which indices of an axis have a bit set anywhere: ``[n]``."""
    return np.asarray(np.any(bits, axis=tuple(i for i in range(bits.ndim) if i != axis)))


def silent(known: Known, filling: float = 0) -> np.ndarray:
    """Give the values of what does not vary, and `filling` in the place of the rest."""
    return np.where(known.varies, filling, np.asarray(known.value))


def grid(kept: Kept, shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Index an array of a shape by what is kept."""
    return np.ix_(
        *(
            np.arange(n) if bits is None else np.flatnonzero(bits)
            for n, bits in zip(shape, kept, strict=True)
        )
    )


def size(bits: np.ndarray | None, full: Any) -> Any:
    """Count what is kept of an axis."""
    return full if bits is None else int(np.count_nonzero(bits))


def pick(array: Any, have: Kept, want: Kept) -> Any:
    """Take, from an array that holds what `have` keeps, what `want` keeps."""
    for axis, (own, wanted) in enumerate(zip(have, want, strict=True)):
        if wanted is None or wanted.all():
            continue
        places = np.flatnonzero(wanted if own is None else wanted[own])
        if own is not None and len(places) == np.count_nonzero(own):
            continue
        if len(places) and places[-1] - places[0] + 1 == len(places):
            array = jax.lax.slice_in_dim(array, int(places[0]), int(places[-1]) + 1, axis=axis)
        else:
            array = jnp.take(array, places.astype(np.int32), axis=axis, mode="clip")
    return array


def operand_shapes(op: Op) -> list[tuple[int, ...]]:
    """List the operands' shapes, as the analysis sees them."""
    return [tuple(getattr(v.aval, "shape", ())) for v in op.equation.invars]
