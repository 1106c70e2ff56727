"""Sets of positions back from bytes, piece by piece.

What `codings` writes is read in pieces of some `packing.CHUNK` entries, so that reading takes
little memory, however large the tensor is that a message declares.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from fedjaxprune.wire import codings, packing
from fedjaxprune.wire.codings import Coding
from fedjaxprune.wire.packing import CHUNK, WireError


def read(coding: Coding, data: memoryview, n: int, shape: Sequence[int]) -> Iterator[np.ndarray]:
    """Read the marked positions, ascending, in pieces ``[m]`` int64.

    Args:
      coding: other than ALL, and checked by `codings.check`.
      data: exactly as long as `codings.num_bytes` says.
      n: entries.
      shape: of the tensor, for SLICES and AXIS.

    Raises:
      WireError: at the latest after the last piece, if the bytes are not those of a set of so many
        positions. No piece goes beyond what the coding says is marked.
    """
    if coding.code in codings.LISTS:
        pieces = _listed(coding, data, n)
        pieces = _others(pieces, n) if coding.complement else pieces
    elif coding.code == codings.BITMAP:
        pieces = _drawn(data, n)
    else:
        pieces = _in_slices(coding, data, n, shape)
    left = codings.num_marked(coding, n)
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            break
        yield piece
    if left:
        raise WireError("a bitmap does not mark as many entries as it should.")


def true_of(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Give the positions of the true entries of a mask, in pieces."""
    flat = mask.reshape(-1)
    for begin in range(0, flat.size, CHUNK):
        yield np.flatnonzero(flat[begin : begin + CHUNK]) + begin


def _drawn(data: memoryview, n: int) -> Iterator[np.ndarray]:
    """Read a bitmap of `n` entries."""
    packing.check_filling(data, n)
    for begin in range(0, n, CHUNK):
        bits = packing.read_bits(data, begin, min(CHUNK, n - begin))
        yield np.flatnonzero(bits.view(np.bool_)) + begin


def _listed(coding: Coding, data: memoryview, n: int) -> Iterator[np.ndarray]:
    """Read listed positions."""
    count, k = coding.num_listed, coding.parameter
    split = packing.num_bytes(count * k)
    low, unary = data[:split], data[split:]
    packing.check_filling(low, count * k)
    done, end, last = 0, -1, -1  # numbers read, where the last one ends, and its position
    for begin in range(0, 8 * len(unary), CHUNK):
        bits = packing.read_bits(unary, begin, min(CHUNK, 8 * len(unary) - begin))
        ends = np.flatnonzero(bits.view(np.bool_)) + begin
        size = len(ends)
        if size == 0:
            continue
        if done + size > count:
            raise WireError("a unary list does not hold as many numbers as it should.")
        if int(ends[-1]) + 1 - (done + size) > (n >> k):
            raise WireError("a position is out of range.")
        lows = packing.unpack(low, done, size, k)
        if coding.code == codings.ELIAS_FANO:
            piece = ((ends - np.arange(done, done + size)) << k) | lows
        else:
            gaps = np.diff(ends, prepend=end) - 1
            piece = np.cumsum(((gaps << k) | lows) + 1) + last
        if int(piece[0]) <= last or int(piece[-1]) >= n or not np.all(piece[1:] > piece[:-1]):
            raise WireError("positions do not ascend within their range.")
        done, end, last = done + size, int(ends[-1]), int(piece[-1])
        yield piece
    if done != count:
        raise WireError("a unary list does not hold as many numbers as it should.")
    if coding.code == codings.RICE and packing.num_bytes(end + 1) != len(unary):
        raise WireError("a unary list continues after its last number.")


def _others(pieces: Iterator[np.ndarray], n: int) -> Iterator[np.ndarray]:
    """Give the positions below `n` that are not among those of some pieces."""
    done = 0
    for piece in pieces:
        yield from _between(piece, done, int(piece[-1]) + 1)
        done = int(piece[-1]) + 1
    yield from _between(np.zeros(0, np.int64), done, n)


def _between(listed: np.ndarray, begin: int, end: int) -> Iterator[np.ndarray]:
    """Give the positions from `begin` to `end` that are not listed."""
    for first in range(begin, end, CHUNK):
        last = min(first + CHUNK, end)
        here = slice(*np.searchsorted(listed, [first, last]))
        marks = np.ones(last - first, np.bool_)
        marks[listed[here] - first] = False
        yield np.flatnonzero(marks) + first


def _in_slices(
    coding: Coding, data: memoryview, n: int, shape: Sequence[int]
) -> Iterator[np.ndarray]:
    """Read which slices along an axis are live, and of SLICES a bitmap of those."""
    size = shape[coding.parameter]
    stride = math.prod(shape[coding.parameter + 1 :])
    split = packing.num_bytes(size)
    line, drawn, done = data[:split], data[split:], 0
    num_live = sum(map(len, _drawn(line, size)))
    if coding.code == codings.SLICES:
        if num_live != coding.extra:
            raise WireError("not so many slices are live as there should be.")
        packing.check_filling(drawn, num_live * (n // max(size, 1)))
    for begin in range(0, n, CHUNK):
        end = min(begin + CHUNK, n)
        first, last = begin // stride, (end - 1) // stride
        marks = _around(line, size, first % size, last + 1 - first).view(np.bool_)
        if stride > 1:
            edges = np.clip(np.arange(first, last + 2) * stride, begin, end)
            marks = np.repeat(marks, np.diff(edges))
        piece = np.flatnonzero(marks) + begin
        if coding.code == codings.SLICES:
            bits = packing.read_bits(drawn, done, len(piece))
            done, piece = done + len(piece), piece[bits.view(np.bool_)]
        yield piece


def _around(data: memoryview, size: int, begin: int, count: int) -> np.ndarray:
    """Read `count` bits from bit `begin` on of a string of `size` bits, which is without end."""
    rest = begin + count - size
    if rest <= 0:
        return packing.read_bits(data, begin, count)
    again = packing.read_bits(data, 0, min(rest, size))
    again = np.tile(again, -(-rest // size))[:rest]
    return np.concatenate([packing.read_bits(data, begin, size - begin), again])
