"""Sets of positions as bytes: which of the `n` entries of a tensor are marked.

Six codings, of which a message takes the shortest, with what its header says of them. Three have a
length that depends on the number of marked entries alone (`counted`): a simulator can charge for
them without looking at a position. `positions` reads what is written here.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjaxprune.wire import packing
from fedjaxprune.wire.packing import WireError

ALL, BITMAP, RICE, ELIAS_FANO, SLICES, AXIS = range(6)
LISTS = (RICE, ELIAS_FANO)  # these list positions; the others draw them
WITH_PARAMETER = (RICE, ELIAS_FANO, SLICES, AXIS)
WITH_EXTRA = (RICE, SLICES)
MAX_PARAMETER = 40  # low bits of a listed number


class Coding(NamedTuple):
    """How a set of positions is written.

    Attributes:
      code: ALL, BITMAP, RICE, ELIAS_FANO, SLICES or AXIS.
      complement: whether the listed positions are the unmarked ones; only where positions are
        listed.
      num_listed: how many positions are listed, or marked where nothing is listed.
      parameter: low bits per number (RICE, ELIAS_FANO), or the axis (SLICES, AXIS).
      extra: what depends on the positions: bytes of RICE's unary part, live slices of SLICES.
    """

    code: int
    complement: bool = False
    num_listed: int = 0
    parameter: int = 0
    extra: int = 0


def num_marked(coding: Coding, n: int) -> int:
    """Count the marked of `n` entries."""
    if coding.code == ALL:
        return n
    return n - coding.num_listed if coding.complement else coding.num_listed


def header(coding: Coding) -> bytes:
    """Write what a tensor's header says of its coding, beside the byte that names it."""
    parts = b"" if coding.code == ALL else packing.varint(coding.num_listed)
    if coding.code in WITH_PARAMETER:
        parts += bytes([coding.parameter])
    return parts + packing.varint(coding.extra) if coding.code in WITH_EXTRA else parts


def total_bytes(coding: Coding, n: int, shape: Sequence[int]) -> int:
    """Tell how many bytes a coding takes in the header and for the positions together."""
    return len(header(coding)) + num_bytes(coding, n, shape)


def num_bytes(coding: Coding, n: int, shape: Sequence[int]) -> int:
    """Tell how many bytes the positions take, exactly."""
    code, _, count, parameter, extra = coding
    if code == ALL or (code in LISTS and count == 0):
        return 0
    if code == BITMAP:
        return packing.num_bytes(n)
    if code == RICE:
        return packing.num_bytes(count * parameter) + extra
    if code == ELIAS_FANO:
        return packing.num_bytes(count * parameter) + packing.num_bytes(
            count + ((n - 1) >> parameter)
        )
    num_slices = shape[parameter]
    drawn = extra * (n // num_slices) if code == SLICES and num_slices else 0
    return packing.num_bytes(num_slices) + packing.num_bytes(drawn)


def counted(n: int, marked: int) -> Coding:
    """Choose the shortest coding among those whose length depends on the counts alone."""
    if marked == n:
        return Coding(ALL)
    complement = 2 * marked > n
    count = n - marked if complement else marked
    drawn, listed = Coding(BITMAP, num_listed=marked), _elias_fano(n, count, complement)
    return min(drawn, listed, key=lambda coding: total_bytes(coding, n, ()))


def shortest(mask: np.ndarray) -> tuple[Coding, np.ndarray | None]:
    """Choose the shortest coding of a mask ``[...]``; also give the positions that it lists."""
    n, marked = mask.size, int(np.count_nonzero(mask))
    if marked == n:
        return Coding(ALL), None
    complement = 2 * marked > n
    listed = np.flatnonzero(~mask if complement else mask)
    options = [Coding(BITMAP, num_listed=marked), _rice(n, listed, complement)]
    options.append(_elias_fano(n, len(listed), complement))
    for axis in range(mask.ndim if mask.ndim >= 2 and mask.size else 0):
        if _follows(mask, marked, axis):
            options.append(Coding(AXIS, num_listed=marked, parameter=axis))
        elif not complement:
            live = _live(listed, mask.shape, axis)
            if live is not None:
                num_live = int(np.count_nonzero(live))
                options.append(Coding(SLICES, num_listed=marked, parameter=axis, extra=num_live))
    best = min(options, key=lambda coding: (total_bytes(coding, n, mask.shape), coding.code))
    return best, listed if best.code in LISTS else None


def write(coding: Coding, mask: np.ndarray, listed: np.ndarray | None) -> list[bytes]:
    """Write a mask ``[...]`` in a coding; `listed` as `shortest` gives it, or None."""
    if coding.code == ALL or (coding.code in LISTS and coding.num_listed == 0):
        return []
    if coding.code == BITMAP:
        return [np.packbits(mask).tobytes()]
    if coding.code == AXIS:
        return [np.packbits(_line(mask, coding.parameter)).tobytes()]
    if coding.code == SLICES:
        live = mask.any(axis=tuple(i for i in range(mask.ndim) if i != coding.parameter))
        drawn = np.compress(live, mask, axis=coding.parameter)
        return [np.packbits(live).tobytes(), np.packbits(drawn).tobytes()]
    if listed is None:
        listed = np.flatnonzero(~mask if coding.complement else mask)
    k = coding.parameter
    if coding.code == RICE:
        numbers = _gaps(listed)
        ends = np.cumsum((numbers >> k) + 1) - 1
        unary = np.zeros(8 * coding.extra, np.bool_)
    else:
        numbers = listed
        ends = (listed >> k) + np.arange(len(listed))
        unary = np.zeros(coding.num_listed + ((mask.size - 1) >> k), np.bool_)
    unary[ends] = True
    return [packing.pack(numbers & ((1 << k) - 1), k), np.packbits(unary).tobytes()]


def check(coding: Coding, n: int, shape: Sequence[int], *, is_whole: bool) -> None:
    """Refuse a coding that makes no sense for `n` entries.

    Args:
      coding: as a message has it.
      n: entries.
      shape: of the tensor.
      is_whole: whether the entries are all those of the tensor, so that rows and axes exist.

    Raises:
      WireError: if it does not.
    """
    code, complement, count, parameter, extra = coding
    if code > AXIS:
        raise WireError("a coding is unknown.")
    if complement and code not in LISTS:
        raise WireError("a coding that lists nothing has no complement.")
    if count > n or (code in (RICE, ELIAS_FANO) and parameter > MAX_PARAMETER):
        raise WireError("a coding lists more than there is.")
    if code in (SLICES, AXIS) and (not is_whole or len(shape) < 2):
        raise WireError("a coding by slices needs a whole tensor of two axes or more.")
    if code in (SLICES, AXIS) and (parameter >= len(shape) or extra > shape[parameter]):
        raise WireError("a coding names slices that are not there.")
    if code == RICE and count == 0 and extra:
        raise WireError("a list of nothing has a length.")
    if code == RICE and not count <= 8 * extra <= count + (n >> parameter) + 7:
        raise WireError("a list of gaps has a length that cannot be.")


def _elias_fano(n: int, count: int, complement: bool) -> Coding:
    """Take the number of low bits that makes the list shortest, the least of them if several do."""
    options = [Coding(ELIAS_FANO, complement, count, k) for k in _low_bits(n, count)]
    return min(options, key=lambda coding: total_bytes(coding, n, ()))


def _rice(n: int, listed: np.ndarray, complement: bool) -> Coding:
    """Take the number of low bits that makes the list of gaps shortest."""
    count, gaps = len(listed), _gaps(listed)
    options = []
    for k in _low_bits(n, count):
        length = packing.num_bytes(int((gaps >> k).sum()) + count)
        options.append(Coding(RICE, complement, count, k, length))
    return min(options, key=lambda coding: total_bytes(coding, n, ()))


def _low_bits(n: int, count: int) -> range:
    """Give the numbers of low bits among which the best one is."""
    guess = (n // count).bit_length() - 1 if count else 0
    return range(max(guess - 1, 0), min(guess + 2, MAX_PARAMETER + 1))


def _gaps(listed: np.ndarray) -> np.ndarray:
    """Count the entries that are skipped before each listed one."""
    return np.diff(listed, prepend=-1) - 1


def _live(listed: np.ndarray, shape: Sequence[int], axis: int) -> np.ndarray | None:
    """Mark the slices along an axis that hold a listed position; None if all of them do."""
    stride = math.prod(shape[axis + 1 :])
    live = np.zeros(shape[axis], np.bool_)
    few = 16 * shape[axis]  # positions that tell most often that no slice is dead
    for some in (listed[:: len(listed) // few + 1], listed):
        live[some // stride % shape[axis]] = True
        if live.all():
            return None
    return live


def _across(shape: Sequence[int], axis: int) -> list[int]:
    """Give the shape that a line along one axis broadcasts from."""
    return [-1 if i == axis else 1 for i in range(len(shape))]


def _line(mask: np.ndarray, axis: int) -> np.ndarray:
    """Take the mask along one axis, at the first place of all others."""
    return mask[tuple(slice(None) if i == axis else 0 for i in range(mask.ndim))]


def _follows(mask: np.ndarray, marked: int, axis: int) -> bool:
    """Tell whether a mask depends on one axis alone; most masks fail the count already."""
    line = _line(mask, axis)
    if np.count_nonzero(line) * (mask.size // mask.shape[axis]) != marked:
        return False
    return bool(np.all(mask == line.reshape(_across(mask.shape, axis))))
