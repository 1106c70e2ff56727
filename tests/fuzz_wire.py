"""Fuzz the decoder of the wire format, in little memory.

    python tests/fuzz_wire.py --seconds 600 --seed 1 --findings FOLDER

Several can run at once, each with a seed of its own. Messages are written with every coding, also
with such as the encoder would not choose, then damaged; the checksum is taken for right, so that
what lies behind it is reached. It is a finding, kept in FOLDER, if anything but `WireError` is
raised, if a message needs more than the address space that is left to the process, or if what was
read cannot be written and read again. `tests/fuzz_wire_guided.py` does the same guided by coverage.
"""

import argparse
import contextlib
import pathlib
import random
import resource
import sys
import time
import traceback
import types
import zlib

import numpy as np

from fedjaxprune.wire import codings, headers, packing
from fedjaxprune.wire import format as wire_format
from fedjaxprune.wire.codings import Coding
from fedjaxprune.wire.headers import Plan

CORPUS = sorted((pathlib.Path(__file__).parent / "corpus" / "wire").glob("*.bin"))
KNOWN = {
    "a": np.arange(35).reshape(5, 7) % 3 == 0,
    "b": np.ones([16], np.bool_),
    "c": np.zeros([2, 3], np.bool_),
}
ADDRESS_SPACE = 512 << 20  # bytes
SMALL, LARGE = 1 << 14, 1 << 26  # bytes that a message may declare: nearly always, and rarely
ONE_IN = 64  # messages with a large limit, and new messages among damaged ones
POOL = 2000  # messages to damage
NUMBERS = (0, 1, 2, 3, 7, 8, 9, 63, 127, 128, 255, 1 << 14, 1 << 25, 1 << 32, (1 << 63) - 1)


@contextlib.contextmanager
def checksum_ignored():
    """Take every checksum for right that is zero."""
    wire_format.zlib = types.SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        crc32=lambda data, digest=0: 0, compress=zlib.compress
    )
    try:
        yield
    finally:
        wire_format.zlib = zlib


def new_message(chance: random.Random) -> bytes:
    """Write a message that should be accepted, with any codings; its checksum is zero."""
    plans, payloads = [], []
    for name in chance.sample(["a", "b", "c", "aa", "b/é", ""], chance.choice((0, 1, 1, 2, 4))):
        plan, payload = _tensor(chance, name)
        plans.append(plan)
        payloads.append(payload)
    before = ["", *(plan.name for plan in plans)]
    body = packing.varint(len(plans))
    body += b"".join(map(headers.write, plans, before)) + b"".join(payloads)
    is_deflated = chance.random() < 0.1
    body = _deflated(chance, body) if is_deflated else body
    return wire_format.MAGIC + bytes([is_deflated]) + body + bytes(4)


def damaged(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Change a message in a few places; `other` is another one, to take a piece of."""
    body, kinds = bytearray(data[:-4]), chance.choice((2, 7))  # the first two keep the length
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = 4 + _below(chance, len(body) - 3) if len(body) >= 4 else 0
        kind = _below(chance, kinds)
        if kind == 0:
            body[at : at + 1] = bytes([_below(chance, 256)])
        elif kind == 1 and at < len(body):
            body[at] ^= 1 << _below(chance, 8)
        elif kind == 2:
            body[at : at + _below(chance, 2)] = packing.varint(
                NUMBERS[_below(chance, len(NUMBERS))]
            )
        elif kind == 3:
            body[at:at] = chance.randbytes(1 + _below(chance, 4))
        elif kind == 4:
            del body[at : at + 1 + _below(chance, 4)]
        elif kind == 5:
            body[at:] = other[_below(chance, len(other)) : -4]
        else:
            body[at:at] = body[at : at + 1 + _below(chance, 64)]
    if body[4:5] == b"\0" and chance.random() < 0.03:
        body[4:] = b"\1" + _deflated(chance, bytes(body[5:]))
    return bytes(body) + bytes(4)


def try_one(data: bytes, max_bytes: int = SMALL) -> bool:
    """Decode an input, and tell whether it was accepted.

    Raises:
      AssertionError: if it took too much memory, or does not encode to an equal message.
    """
    try:
        message = wire_format.decode(data, known=KNOWN, max_bytes=max_bytes)
    except packing.WireError as error:
        if "memory" in str(error):
            raise AssertionError("a message takes more memory than it may") from error
        return False
    size = sum(values.nbytes for values in map(as_array, message.values()))
    assert size <= max_bytes
    if size <= SMALL:
        again = wire_format.decode(wire_format.encode(message)[:-4] + bytes(4))
        assert list(again) == list(message)
        assert list(map(_looks, again.values())) == list(map(_looks, message.values()))
    return True


def _deflated(chance: random.Random, body: bytes) -> bytes:
    """Deflate a body at any level."""
    return packing.varint(len(body)) + zlib.compress(body, _below(chance, 10))


def _below(chance: random.Random, end: int) -> int:
    """Give a number from 0 on below `end`, faster than `randrange`."""
    return int(chance.random() * end)


def _tensor(chance: random.Random, name: str) -> tuple[Plan, bytes]:
    """Write a tensor in any coding that it can have."""
    rng = np.random.default_rng(chance.randrange(1 << 32))
    dtype, known = chance.choice(headers.DTYPES), None
    shape = tuple(chance.choice((0, 1, 2, 3, 5, 16)) for _ in range(chance.choice((0, 1, 2, 2, 3))))
    if name in KNOWN and chance.random() < 0.7:
        shape = KNOWN[name].shape
        known = KNOWN[name] if dtype != headers.BOOL else None
    bits = chance.randrange(1, 17) if dtype == np.uint16 and chance.random() < 0.5 else 0
    scales = chance.randrange(3) if bits else 0
    density = chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
    mask = rng.random(shape) < density
    if shape and chance.random() < 0.3:  # by slices along the last axis
        mask &= rng.random(shape[-1]) < 0.5
    if known is not None:
        mask = mask[known]
    coding, positions = _coded(chance, mask, is_whole=known is None)
    num_known = None if known is None else mask.size
    plan = Plan(name, dtype, shape, num_known, coding, bits, scales)
    values = rng.bytes(headers.payload(plan)[1])
    num_bits = bits * codings.num_marked(coding, mask.size)
    if num_bits % 8:  # the last byte ends with zeros
        values = values[:-1] + bytes([values[-1] & 0xFF00 >> num_bits % 8 & 0xFF])
    return plan, positions + values


def _coded(chance: random.Random, mask: np.ndarray, *, is_whole: bool) -> tuple[Coding, bytes]:
    """Write positions in one of the codings that can hold them."""
    n, marked = mask.size, int(np.count_nonzero(mask))
    complement = chance.random() < 0.4
    listed = np.flatnonzero(~mask if complement else mask)
    k = chance.choice((0, 1, 2, 3, 5, 13, 40))
    gaps = int((np.diff(listed, prepend=-1) - 1 >> k).sum()) + len(listed)
    choices = [
        Coding(codings.BITMAP, num_listed=marked),
        Coding(codings.RICE, complement, len(listed), k, packing.num_bytes(gaps)),
        Coding(codings.ELIAS_FANO, complement, len(listed), k),
    ]
    if marked == n:
        choices.append(Coding(codings.ALL))
    if is_whole and mask.ndim >= 2 and n:
        axis = chance.randrange(mask.ndim)
        live = mask.any(axis=tuple(i for i in range(mask.ndim) if i != axis))
        num_live = int(np.count_nonzero(live))
        choices.append(Coding(codings.SLICES, False, marked, axis, num_live))
        if num_live * (n // mask.shape[axis]) == marked:
            choices.append(Coding(codings.AXIS, False, marked, axis))
    coding = chance.choice(choices)
    return coding, b"".join(codings.write(coding, mask, None))


def as_array(values: np.ndarray | wire_format.Levels) -> np.ndarray:
    return values.levels if isinstance(values, wire_format.Levels) else values


def _looks(values: np.ndarray | wire_format.Levels) -> tuple:
    """Give all that two tensors must share to be equal, to the bit."""
    array, rest = as_array(values), ()
    if isinstance(values, wire_format.Levels):
        rest = (values.scales.tobytes(), values.level_bits)
    return array.dtype, array.shape, array.tobytes(), *rest


def _main() -> int:
    """Fuzz for a while; say how many inputs there were, and exit 1 at the first finding."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=pathlib.Path, default=pathlib.Path("findings"))
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    chance, begin = random.Random(options.seed), time.monotonic()
    pool = [file.read_bytes() for file in CORPUS]
    pool += [new_message(chance) for _ in range(POOL - len(pool))]
    count = accepted = 0
    with checksum_ignored():
        while count % 1024 or time.monotonic() - begin < options.seconds:
            data, max_bytes = pool[_below(chance, POOL)], SMALL
            if count % ONE_IN == 0:
                data = pool[chance.randrange(len(CORPUS), POOL)] = new_message(chance)
            else:
                data = damaged(chance, data, pool[_below(chance, POOL)])
                max_bytes = LARGE if count % ONE_IN == 1 else SMALL
            count += 1
            try:
                accepted += try_one(data, max_bytes)
            except BaseException:
                options.findings.mkdir(parents=True, exist_ok=True)
                file = options.findings / f"{options.seed}_{count}.bin"
                file.write_bytes(data)
                traceback.print_exc()
                print(f"finding after {count:,} inputs: {file} with max_bytes={max_bytes}")
                return 1
    seconds = time.monotonic() - begin
    print(
        f"seed {options.seed}: {count:,} inputs in {seconds:.0f} s, {accepted:,} accepted, "
        f"{count - accepted:,} refused, no findings"
    )
    return 0


if __name__ == "__main__":
    sys.exit(_main())
