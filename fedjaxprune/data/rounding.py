"""Numbers that lose what tells them apart when they become floating-point numbers."""

import numpy as np

from fedjaxprune.errors import DataError

FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT32_DIGITS = 24  # binary ones
_TINY = float(np.finfo(np.float32).tiny)
_FEW = 2.0 ** (4 - _FLOAT32_DIGITS)  # within this share of a number lie at most 2 ** 4 of float32
_NOISE = 1e-12  # what float64 arithmetic may add to equal numbers


def check(values: np.ndarray, what: str, *, advice: str = "scale them before") -> None:
    """Refuse numbers ``[E, ...]`` that float32 would merge or turn to zeros.

    These are integers that float32 does not hold exactly, and float64 numbers of one feature
    (position in an example) whose range is a tiny part of their size, or that are all too small.
    The usual rounding to 24 binary digits passes.

    Args:
      values: finite integers or floating-point numbers; others pass.
      what: their name in errors.
      advice: what to do.
    """
    if values.dtype.kind in "ui":
        check_integers(values, what, digits=_FLOAT32_DIGITS, advice=advice)
    if values.dtype.kind != "f" or values.dtype.itemsize <= 4 or not values.size:
        return
    low, high = np.asarray(values.min(axis=0)), np.asarray(values.max(axis=0))
    size = np.asarray(np.maximum(np.abs(low), np.abs(high)))
    spread = high / 2 - low / 2  # half of it, as the whole may be too large
    is_narrow = (spread < size / 2 * _FEW) & (spread > size / 2 * _NOISE)
    is_tiny = (size < _TINY) & (size > 0)
    for at in map(tuple, np.argwhere(is_narrow | is_tiny)):
        column = values[(slice(None), *at)]
        if is_tiny[at] or len(np.unique(column.astype(np.float32))) < len(np.unique(column)):
            where = f" at position {'/'.join(map(str, at))}" if at else ""
            raise DataError(
                f"{what} lie between {low[at]:.17g} and {high[at]:.17g}{where}, which float32 "
                f"cannot tell apart: {advice}."
            )


def check_integers(values: np.ndarray, what: str, *, digits: int, advice: str) -> None:
    """Refuse integers ``[E, ...]`` that a floating-point number of so many binary digits rounds."""
    if values.dtype.kind not in "ui" or not values.size:
        return
    if max(int(values.max()), -int(values.min())) <= 2**digits:
        return
    lowest_bit = values & (~values + values.dtype.type(1))
    is_rounded = abs(values // np.maximum(abs(lowest_bit), 1)) >= 2**digits
    if is_rounded.any():
        at = tuple(np.argwhere(is_rounded)[0])
        rounded = int(np.float32(values[at]) if digits == _FLOAT32_DIGITS else float(values[at]))
        raise DataError(
            f"{what} have the integer {values[at]} in example {at[0]}, which would be rounded to "
            f"{rounded}: {advice}, or give floating-point numbers if this does not matter."
        )
