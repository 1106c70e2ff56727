"""A message's body and tensors back from bytes, in no more memory than the receiver permits."""

import math
import sys
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from fedjaxprune.wire import codings, headers, packing, positions
from fedjaxprune.wire.headers import Plan
from fedjaxprune.wire.packing import CHUNK, WireError

MIN_TENSORS = 1 << 12  # a message may have so many in any case,
BYTES_PER_TENSOR = 1 << 12  # and one more for each so many bytes that its tensors may take
MAX_RATIO = 1032  # zlib shortens nothing more than that,
PIECE = 1 << 12  # so that so many deflated bytes at a time take little memory


def inflate(body: memoryview, max_bytes: int) -> memoryview:
    """Undo zlib, as far as the declared length and no further."""
    size, at = packing.read_varint(body, 0)
    longest = max_bytes + max_bytes // 8 + headers.MAX_HEADER * _max_tensors(max_bytes) + 9
    if size > MAX_RATIO * len(body) or size > longest:
        raise WireError("the message declares more than it can hold.")
    inflater, raw, end = zlib.decompressobj(), bytearray(size), 0
    try:
        for begin in range(at, len(body), PIECE):
            piece = inflater.decompress(body[begin : begin + PIECE], size + 1 - end)
            end += len(piece)
            if end > size or inflater.unused_data:
                break
            raw[end - len(piece) : end] = piece
    except zlib.error:
        raise WireError("the message cannot be inflated.") from None
    if end != size or not inflater.eof or inflater.unused_data:
        raise WireError("the message inflates to another length than it declares.")
    return memoryview(raw)


def plans(body: memoryview, max_bytes: int) -> tuple[list[Plan], int]:
    """Read all headers, and see that what they declare is there and not too much."""
    count, at = packing.read_varint(body, 0)
    if count > _max_tensors(max_bytes):
        raise WireError(f"the message has more than {_max_tensors(max_bytes)} tensors.")
    found, name, declared, names = [], "", 0, set()
    for _ in range(count):
        item, at = headers.read(body, at, name)
        name = item.name
        if name in names:
            raise WireError("two tensors have the same name.")
        names.add(name)
        if item.dtype == headers.BOOL and item.num_known is not None:
            raise WireError("a mask travels whole, not under another one.")
        size = math.prod(max(size, 1) for size in item.shape) * item.dtype.itemsize
        declared += size + 4 * item.num_scales
        if declared > min(max_bytes, sys.maxsize):
            raise WireError(f"the tensors take more than {max_bytes} bytes.")
        found.append(item)
    payload = sum(sum(headers.payload(item)) for item in found)
    if payload != len(body) - at:
        raise WireError(f"the payload has {len(body) - at} bytes, not {payload}.")
    return found, at


def tensor(
    plan: Plan, mask: np.ndarray | None, marked: memoryview, values: memoryview
) -> np.ndarray:
    """Read a tensor back, or its levels.

    Args:
      plan: as `plans` gives it.
      mask: ``[...]`` bool, entries that could travel; None if all.
      marked: bytes of the positions.
      values: bytes of the scales and values.
    """
    n = headers.num_entries(plan)
    take = _values(plan, values)
    out = np.zeros(math.prod(plan.shape), f"u{plan.dtype.itemsize}")
    if plan.coding.code == codings.ALL and mask is None:
        for begin in range(0, n, CHUNK):
            end = min(begin + CHUNK, n)
            out[begin:end] = take(begin, end)
    elif plan.coding.code == codings.ALL and mask is not None:
        _fill(out, positions.true_of(mask), take)
    else:
        sent = out if mask is None else np.zeros(n, out.dtype)
        _fill(sent, positions.read(plan.coding, marked, n, plan.shape), take)
        if mask is not None:
            _fill(out, positions.true_of(mask), lambda begin, end: sent[begin:end])
    return out.view(plan.dtype).reshape(plan.shape)


def _values(plan: Plan, values: memoryview) -> Callable[[int, int], np.ndarray | int]:
    """Make the function that reads values from one number to another."""
    if plan.dtype == headers.BOOL:
        return lambda begin, end: 1
    if not plan.level_bits:
        sent = np.frombuffer(values, f"<u{plan.dtype.itemsize}")
        return lambda begin, end: sent[begin:end]
    levels = values[4 * plan.num_scales :]
    num_levels = codings.num_marked(plan.coding, headers.num_entries(plan))
    packing.check_filling(levels, num_levels * plan.level_bits)
    return lambda begin, end: packing.unpack(levels, begin, end - begin, plan.level_bits)


def _fill(
    out: np.ndarray, pieces: Iterator[np.ndarray], take: Callable[[int, int], np.ndarray | int]
) -> None:
    """Put values one after the other in the places that pieces of positions name."""
    done = 0
    for where in pieces:
        out[where] = take(done, done + len(where))
        done += len(where)


def _max_tensors(max_bytes: int) -> int:
    """Say how many tensors a message may have: each takes memory of its own, even if empty."""
    return MIN_TENSORS + max(max_bytes, 0) // BYTES_PER_TENSOR
