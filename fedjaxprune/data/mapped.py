"""Arrays that may be larger than memory: looked at in parts, and copied only where they must be."""

from collections.abc import Iterator
from typing import Any

import numpy as np

_AT_ONCE = 2**24  # values that are looked at together


def as_type(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Copy an array as another type; a memory-mapped one that has it already is not copied."""
    if values.dtype == dtype and _is_mapped(values):
        return values
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def blocks(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Walk through an array by some examples at a time: the number of the first, and these."""
    step = max(1, _AT_ONCE // max(1, values[:1].size))
    return ((start, values[start : start + step]) for start in range(0, len(values), step))


def _is_mapped(values: Any) -> bool:
    """Tell whether an array is a view of a memory-mapped file."""
    while isinstance(values, np.ndarray):
        if isinstance(values, np.memmap):
            return True
        values = values.base
    return False
