"""Where a value made of masked parameters may differ from zero, followed through a graph.

A support is a bool array ``[...]`` of the value's shape, exact, or a `Fraction`, the share of
entries that may differ from zero where their places are not known. Both err on one side: an entry
counts unless it is surely zero.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from fedjaxprune.structure import moves
from fedjaxprune.structure.channels.propagation import elementwise

Support = np.ndarray | Fraction

DENSE, EMPTY = Fraction(1), Fraction(0)

_LARGEST = 2**24  # a constant of more entries is taken for dense

# Of one operand, and zero where that is zero.
_FIX_ZERO = (elementwise.KEEPS_ZERO - {"integer_pow"}) | {
    "device_put",
    "name",
    "sharding_constraint",
}
_MOVES = {
    **moves.MOVES,
    "tile": lambda params, array: np.tile(array, params["reps"]),
    "stack": lambda params, *arrays: np.stack(arrays, params["axis"]),
}


def density(support: Support) -> Fraction:
    """Measure the share of entries that may differ from zero; 0 of an empty array."""
    if isinstance(support, Fraction):
        return support
    return Fraction(int(np.count_nonzero(support)), max(1, support.size))


def of_value(value: Any) -> Support:
    """Find the support of a known array or number; dense where there is nothing to look at."""
    if isinstance(value, core.Tracer) or np.size(value) > _LARGEST:
        return DENSE
    if jnp.issubdtype(jnp.result_type(value), jax.dtypes.extended):  # a key
        return DENSE
    return _tidy(np.asarray(value) != 0)


def join(first: Support, second: Support) -> Support:
    """Cover both: the support of a value that may be either."""
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return first | second if first.shape == second.shape else DENSE
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first if first == second or second == EMPTY else second if first == EMPTY else DENSE
    return first if isinstance(second, Fraction) and second == EMPTY else DENSE


def through(name: str, params: Any, operands: Sequence[Support], shapes: Any, outputs: Any) -> Any:
    """Follow the operands' supports through one primitive to those of its outputs.

    They are dense for a primitive that is not known to keep zeros.
    """
    if name in _FIX_ZERO or (name == "integer_pow" and params["y"] > 0):
        return list(operands)
    if name in ("div", "rem"):
        return [_with_shape(operands[0], shapes[0], outputs[0])]
    if name in elementwise.PRODUCTS:  # zero where one operand is
        return [_meet(operands, outputs[0])]
    if name in elementwise.SUMS:  # zero only where all are
        return [_unite(operands, outputs[0])]
    if name == "select_n":
        return [_unite(operands[1:], outputs[0])]
    if name in ("dynamic_slice", "gather"):  # who knows where: as dense as the whole
        return [density(operands[0])]
    if name not in _MOVES:
        return [DENSE] * len(outputs)
    arrays = [_as_array(entry, shape) for entry, shape in zip(operands, shapes, strict=True)]
    if all(isinstance(entry, Fraction) for entry in operands) or any(a is None for a in arrays):
        shares = [density(entry) for entry in operands]
        return [_mean_of_moved(name, shares, shapes, outputs[0])] * len(outputs)
    moved = _MOVES[name](params, *arrays)
    return [_tidy(entry) for entry in (moved if isinstance(moved, list) else [moved])]


def _tidy(array: Any) -> Support:
    """Make an array of no axes a share."""
    array = np.asarray(array)
    return Fraction(int(array)) if array.ndim == 0 else array


def _with_shape(support: Support, shape: Any, output: Any) -> Support:
    """Keep a support whose place is known only if the shapes agree (a scalar was broadcast)."""
    return support if isinstance(support, Fraction) or shape == output else density(support)


def _meet(operands: Sequence[Support], shape: Any) -> Support:
    arrays = [entry for entry in operands if isinstance(entry, np.ndarray) and entry.shape == shape]
    shares = [entry for entry in operands if isinstance(entry, Fraction)]
    if EMPTY in shares:
        return EMPTY
    if arrays:
        return np.logical_and.reduce(arrays)  # a share below 1 would only take more away
    return min(shares, default=DENSE)


def _unite(operands: Sequence[Support], shape: Any) -> Support:
    rest = [entry for entry in operands if isinstance(entry, np.ndarray) or entry != EMPTY]
    if not rest:
        return EMPTY
    arrays = [entry for entry in rest if isinstance(entry, np.ndarray) and entry.shape == shape]
    if len(arrays) == len(rest):
        return np.logical_or.reduce(arrays)
    return min(DENSE, sum(map(density, rest), EMPTY))


def _mean_of_moved(name: str, operands: Any, shapes: Any, output: Any) -> Fraction:
    """Find the share after entries were moved, from the shares before."""
    if name in ("concatenate", "stack"):
        sizes = [math.prod(shape) for shape in shapes]
        live = sum((d * n for d, n in zip(operands, sizes, strict=True)), EMPTY)
        return live / max(1, sum(sizes))
    if name == "pad":
        filling = max(0, math.prod(output) - math.prod(shapes[0]))
        live = operands[0] * min(math.prod(shapes[0]), math.prod(output)) + operands[1] * filling
        return min(DENSE, live / max(1, math.prod(output)))
    return operands[0]


def _as_array(support: Support, shape: Any) -> np.ndarray | None:
    if isinstance(support, np.ndarray):
        return support
    if support in (DENSE, EMPTY):
        return np.full(shape, support == DENSE)
    return None
