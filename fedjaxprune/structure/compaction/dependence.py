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
    """What is known of a variable without looking at the network's inputs."""

    varies: np.ndarray  # bool, the variable's shape: where it depends on the inputs
    value: Any  # where it does not, and anything elsewhere
    static: bool  # whether it is made of parameters and constants alone


class Facts(NamedTuple):
    """What is known of a program, by variable."""

    program: Program
    known: dict[int, Known]
    droppable: dict[int, tuple[bool, ...]]  # for each axis: whether it counts channels


class Wish(NamedTuple):
    """What an operation needs of an operand: the indices that it reads.

    Along a soft axis an index that does not vary may be left out all the same: what it contributes
    is a constant that the operation adds by itself.
    """

    kept: Kept
    soft: frozenset[int] = frozenset()


Wishes = tuple[list[Wish], Any]  # of the operands; and a plan that is handed to the rule's `run`


class Site(NamedTuple):
    """An operation among what is known, and what is kept of its operands and outputs."""

    op: Op
    facts: Facts
    operands: Sequence[Any]  # while wishes are made, None for one that is not decided yet
    outputs: Sequence[Kept]


class Call(NamedTuple):
    """An operation as the smaller network does it once."""

    op: Op
    plan: Any
    kept: Sequence[Kept]  # of the operands
    outputs: Sequence[Kept]  # what is kept of them
    arrays: Sequence[Any]  # the operands
    constant: Any  # what the channels that are gone contribute, or None
    batch: Any  # number of examples; may be symbolic


def no_fold(site: Site) -> None:
    """Contribute nothing."""
    del site


class Rule(NamedTuple):
    """How the analysis treats a kind of operation.

    `known` turns facts of the operands into those of the outputs. `fold` gives what the indices
    that are left out contribute, in the shape of the output that is kept; None for nothing.
    """

    known: Callable[[Op, Sequence[Known]], list[Known]]
    wish: Callable[[Site], Wishes]
    run: Callable[[Call], list[Any]]
    fold: Callable[[Site], np.ndarray | None] = no_fold


def bind(op: Op, arrays: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Play an operation's primitive, with these parameters."""
    outputs = op.equation.primitive.bind(*arrays, **params)
    return list(outputs) if op.equation.primitive.multiple_results else [outputs]


def play(call: Call) -> list[Any]:
    """Play an operation as it was traced, for a batch of another size."""
    return bind(call.op, call.arrays, at(call.op.params, call.batch))


def evaluate(op: Op, values: Sequence[Any]) -> list[Any]:
    """Play an operation on the host's numbers."""
    function = arithmetic.POINTWISE.get(op.equation.primitive.name)
    if function is not None:
        with np.errstate(all="ignore"):  # of entries that vary the numbers mean nothing
            return [np.asarray(function(*map(np.asarray, values)), output(op).dtype)]
    outputs = bind(op, [jnp.asarray(value) for value in values], op.equation.params)
    return [each if is_opaque(each.dtype) else np.asarray(each) for each in outputs]


def known_where(op: Op, operands: Sequence[Known], varies: np.ndarray) -> Known:
    """Play an operation on the host, unless all of its output varies."""
    made = output(op)
    varies = np.broadcast_to(varies, made.shape)
    if varies.all() and varies.size:
        value = np.broadcast_to(np.zeros((), made.dtype), made.shape)
    else:
        (value,) = evaluate(op, [each.value for each in operands])
    return Known(varies, value, all(each.static for each in operands))


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


def whole(site: Site) -> list[list[np.ndarray | None]]:
    """Keep all of every operand, as lists to be written to."""
    return [list(everything(site.facts, variable)) for variable in site.op.inputs]


def wishes(kept: Sequence[Sequence[np.ndarray | None]], plan: Any = None) -> Wishes:
    """Wish for what is kept of each operand."""
    return [Wish(tuple(each)) for each in kept], plan


def is_whole(kept: Sequence[np.ndarray | None]) -> bool:
    """Tell whether nothing is left out."""
    return all(bits is None or bits.all() for bits in kept)


def along(bits: np.ndarray, axis: int) -> np.ndarray:
    """Tell which indices of an axis have a bit set anywhere: ``[n]``."""
    return np.asarray(np.any(bits, axis=tuple(i for i in range(bits.ndim) if i != axis)))


def silent(known: Known, filling: float = 0) -> np.ndarray:
    """Give the values of what does not vary, and `filling` in the place of the rest."""
    return np.where(known.varies, filling, np.asarray(known.value))


def is_zero(known: Known) -> np.ndarray:
    """Tell where a variable is known to be zero."""
    return ~known.varies & (np.asarray(known.value) == 0)


def grid(kept: Kept, shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Index an array of a shape by what is kept."""
    axes = zip(shape, kept, strict=True)
    return np.ix_(*(np.arange(n) if bits is None else np.flatnonzero(bits) for n, bits in axes))


def part(array: np.ndarray, kept: Kept) -> np.ndarray:
    """Take what is kept of an array."""
    return array[grid(kept, array.shape)]


def size(bits: np.ndarray | None, full: Any) -> Any:
    """Count what is kept of an axis."""
    return full if bits is None else int(np.count_nonzero(bits))


def pick(array: Any, want: Kept, have: Kept | None = None) -> Any:
    """Take, from an array that holds what `have` keeps (None: all), what `want` keeps."""
    have = (None,) * len(want) if have is None else have
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


def output(op: Op) -> Any:
    """Describe an operation's first output, by shape and dtype."""
    return op.equation.outvars[0].aval
