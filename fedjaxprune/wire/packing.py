"""Integers of any width as a bit string, and varints: the bottom of the wire format.

Bit strings are filled from the most significant bit of every byte and end with zero bits.
"""

import numpy as np

CHUNK = 1 << 16  # numbers at a time, a multiple of 8: working memory stays in the cache


class WireError(ValueError):
    """What is to be decoded is no message, or is damaged, or does not fit what is known."""


def num_bytes(num_bits: int) -> int:
    """Round bits up to bytes."""
    return -(-num_bits // 8)


def pack(values: np.ndarray, width: int) -> bytes:
    """Write the `width` low bits of every integer of `values` ``[m]``, one after the other."""
    if width == 0 or not values.size:
        return b""
    holder = _holder(width)
    parts = []
    for begin in range(0, len(values), CHUNK):
        words = values[begin : begin + CHUNK].astype(holder)
        bits = np.unpackbits(words.view(np.uint8)).reshape(len(words), -1)
        parts.append(np.packbits(bits[:, -width:]))
    return b"".join(parts)


def unpack(data: memoryview, begin: int, count: int, width: int) -> np.ndarray:
    """Read `count` integers of `width` bits, from number `begin` on: ``[count]`` int64."""
    if width == 0 or count == 0:
        return np.zeros(count, np.int64)
    holder = _holder(width)
    bits = np.zeros((count, 8 * holder.itemsize), np.uint8)
    bits[:, -width:] = read_bits(data, begin * width, count * width).reshape(count, width)
    return np.packbits(bits).view(holder).astype(np.int64)


def read_bits(data: memoryview, begin: int, count: int) -> np.ndarray:
    """Read `count` bits, from bit `begin` on: ``[count]`` uint8."""
    within = np.frombuffer(data[begin // 8 : num_bytes(begin + count)], np.uint8)
    return np.unpackbits(within, count=begin % 8 + count)[begin % 8 :]


def check_filling(data: memoryview, num_bits: int) -> None:
    """Refuse a bit string whose last byte has ones after its `num_bits` bits."""
    spare = -num_bits % 8
    if spare and data[num_bytes(num_bits) - 1] & ((1 << spare) - 1):
        raise WireError("a bit string does not end with zeros.")


def varint(number: int) -> bytes:
    """Write an integer from 0 on in LEB128, as DWARF and protocol buffers do."""
    parts = bytearray()
    while number > 0x7F:
        parts.append(0x80 | number & 0x7F)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """Read an integer below 2**63 at byte `at`; also give the place after it."""
    number = shift = 0
    while True:
        byte, at = read_byte(data, at)
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
        if shift == 63:
            raise WireError("a number has more than 63 bits.")
    if byte == 0 and shift > 7:
        raise WireError("a number is written longer than it need be.")
    return number, at


def read_byte(data: memoryview, at: int) -> tuple[int, int]:
    """Read one byte; also give the place after it."""
    if at >= len(data):
        raise WireError("the message ends too early.")
    return data[at], at + 1


def _holder(width: int) -> np.dtype:
    """Choose the smallest big-endian type of `width` bits."""
    return np.dtype(f">u{next(size for size in (1, 2, 4, 8) if width <= 8 * size)}")
