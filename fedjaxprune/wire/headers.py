"""What a message says about each tensor before the payload: name, type, shape, coding.

A `Plan` fixes the length of everything that will be written, so that lengths can be had without
writing: from the data (`wire.num_bits`) or from counts alone (`plan_counts`).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from fedjaxprune.wire import codings, packing
from fedjaxprune.wire.codings import Coding
from fedjaxprune.wire.packing import WireError

_INTEGERS = "int8 int16 int32 int64 uint8 uint16 uint32 uint64"
_FLOATS = ("float16", ml_dtypes.bfloat16, "float32", "float64")
DTYPES = tuple(np.dtype(name) for name in ("bool", *_INTEGERS.split(), *_FLOATS))
BOOL = DTYPES[0]
MAX_AXES, MAX_NAME, MAX_LEVEL_BITS = 15, 255, 16
MAX_HEADER = 2 + MAX_NAME + 2 + 9 * MAX_AXES + 9 + 2 + 9 + 1 + 9  # bytes; a varint has at most 9
COMPLEMENT, KNOWN, LEVELS = 0x08, 0x10, 0x20  # flags beside the coding's three bits


class Plan(NamedTuple):
    """One tensor as it will be written.

    Attributes:
      name: unique in the message.
      dtype: of the tensor; of levels uint16.
      shape: of the tensor.
      num_known: entries of the mask that the receiver holds, which alone may travel; None if all.
      coding: of the marked entries among those; of a bool tensor it is all there is.
      level_bits: bits of a quantized value; 0 for values as they are.
      num_scales: float32 numbers that say what the levels mean.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    num_known: int | None
    coding: Coding
    level_bits: int = 0
    num_scales: int = 0


class Lengths(NamedTuple):
    """Bytes of one tensor; a bool tensor is positions alone."""

    header: int
    positions: int
    values: int


def num_entries(plan: Plan) -> int:
    """Count the entries that may travel."""
    return math.prod(plan.shape) if plan.num_known is None else plan.num_known


def lengths(plan: Plan, before: str) -> Lengths:
    """Tell how many bytes a tensor takes after one of name `before`."""
    return Lengths(len(write(plan, before)), *payload(plan))


def payload(plan: Plan) -> tuple[int, int]:
    """Tell how many bytes the positions of a tensor take, and scales and values together."""
    n = num_entries(plan)
    values = 0
    if plan.dtype != BOOL:
        marked = codings.num_marked(plan.coding, n)
        bits = plan.level_bits or 8 * plan.dtype.itemsize
        values = 4 * plan.num_scales + packing.num_bytes(bits * marked)
    return codings.num_bytes(plan.coding, n, plan.shape), values


def plan_counts(
    name: str,
    dtype: np.dtype,
    shape: Sequence[int],
    *,
    num_known: int | None = None,
    num_chosen: int | None = None,
    level_bits: int = 0,
    num_scales: int = 0,
) -> Plan:
    """Plan a tensor without its data, of which `num_chosen` entries (None: all) are sent."""
    n = math.prod(shape) if num_known is None else num_known
    coding = Coding(codings.ALL) if num_chosen is None else codings.counted(n, num_chosen)
    return Plan(name, dtype, tuple(shape), num_known, coding, level_bits, num_scales)


def write(plan: Plan, before: str) -> bytes:
    """Write a tensor's header; of its name only what differs from the name `before`."""
    coding = plan.coding
    flags = (
        coding.code
        | COMPLEMENT * coding.complement
        | KNOWN * (plan.num_known is not None)
        | LEVELS * bool(plan.level_bits)
    )
    form = _write_form(plan.dtype, plan.shape)
    parts = [_write_name(plan.name, before), form[:1], bytes([flags]), form[1:]]
    if plan.num_known is not None:
        parts.append(packing.varint(plan.num_known))
    if plan.level_bits:
        parts.append(bytes([plan.level_bits, plan.num_scales]))
    return b"".join([*parts, codings.header(coding)])


@functools.lru_cache(maxsize=4096)
def _write_name(name: str, before: str) -> bytes:
    """Write a name; once, as every round's messages have the same."""
    old, new = before.encode(), name.encode()
    shared = 0
    while shared < min(len(old), len(new)) and old[shared] == new[shared]:
        shared += 1
    return bytes([shared, len(new) - shared]) + new[shared:]


@functools.lru_cache(maxsize=4096)
def _write_form(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """Write type and shape, which are the same in every round."""
    kind = bytes([DTYPES.index(dtype) | len(shape) << 4])
    return b"".join([kind, *map(packing.varint, shape)])


def read(data: memoryview, at: int, before: str) -> tuple[Plan, int]:
    """Read the header at byte `at` after that of name `before`; also give the place after it."""
    shared, at = packing.read_byte(data, at)
    added, at = packing.read_byte(data, at)
    old = before.encode()
    if shared > len(old) or shared + added > MAX_NAME or at + added > len(data):
        raise WireError("a name does not fit.")
    try:
        name = (old[:shared] + bytes(data[at : at + added])).decode()
    except UnicodeDecodeError:
        raise WireError("a name is not UTF-8.") from None
    kind, at = packing.read_byte(data, at + added)
    flags, at = packing.read_byte(data, at)
    if kind & 0x0F >= len(DTYPES) or flags >= 0x40:
        raise WireError("a type or a flag is unknown.")
    dtype = DTYPES[kind & 0x0F]
    shape = []
    for _ in range(kind >> 4):
        size, at = packing.read_varint(data, at)
        shape.append(size)
    num_known, level_bits, num_scales = None, 0, 0
    if flags & KNOWN:
        num_known, at = packing.read_varint(data, at)
    if flags & LEVELS:
        level_bits, at = packing.read_byte(data, at)
        num_scales, at = packing.read_byte(data, at)
    code, count, parameter, extra = flags & 0x07, 0, 0, 0
    if code != codings.ALL:
        count, at = packing.read_varint(data, at)
    if code in codings.WITH_PARAMETER:
        parameter, at = packing.read_byte(data, at)
    if code in codings.WITH_EXTRA:
        extra, at = packing.read_varint(data, at)
    coding = Coding(code, bool(flags & COMPLEMENT), count, parameter, extra)
    plan = Plan(name, dtype, tuple(shape), num_known, coding, level_bits, num_scales)
    if num_known is not None and num_known > math.prod(shape):
        raise WireError("a mask is larger than its tensor.")
    if flags & LEVELS and (dtype != np.uint16 or not 1 <= level_bits <= MAX_LEVEL_BITS):
        raise WireError("levels are not of 1 to 16 bits in uint16.")
    codings.check(coding, num_entries(plan), shape, is_whole=num_known is None)
    return plan, at
