"""The wire against strangers: bounded memory, one kind of error, and codings that are shortest."""

import itertools
import pathlib
import random
import subprocess
import sys
import tracemalloc
import zlib
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjaxprune.wire import codings, headers, packing
from fedjaxprune.wire import format as wire_format
from fedjaxprune.wire.codings import Coding
from fedjaxprune.wire.headers import Plan
from fedjaxprune.wire.packing import WireError
from tests import fuzz_wire

INT8, LEVELS = np.dtype("int8"), np.dtype("uint16")
MIB = 1 << 20
WORK = 12 * MIB  # bytes that reading takes beside what a message declares
N = 16 * MIB


def with_checksum(body):
    return body + zlib.crc32(body).to_bytes(4, "little")


def hostile(plan, payload, *, is_deflated=True):
    """Write a message of one tensor, whose payload is what it is."""
    body = packing.varint(1) + headers.write(plan, "") + payload
    if is_deflated:
        body = packing.varint(len(body)) + zlib.compress(body, 1)
    return with_checksum(wire_format.MAGIC + bytes([is_deflated]) + body)


def int8(shape, coding, payload):
    plan = Plan("x", INT8, shape, None, coding)
    size = sum(headers.payload(plan))
    assert len(payload) <= size
    return hostile(plan, payload.ljust(size, b"\1"))


CASES = {  # name: what makes a message that declares N bytes and is as costly to read as can be
    "nothing marked": lambda: int8((N,), Coding(codings.BITMAP), bytes(N // 8)),
    "all": lambda: int8((N,), Coding(codings.ALL), b""),
    "bitmap": lambda: int8((N,), Coding(codings.BITMAP, num_listed=N), b"\xff" * (N // 8)),
    "gaps": lambda: int8((N,), Coding(codings.RICE, False, N, 0, N // 8), b"\xff" * (N // 8)),
    "listed": lambda: int8((N,), Coding(codings.ELIAS_FANO, False, N), b"\xaa" * (N // 4)),
    "wide gaps": lambda: int8(
        (N,),
        Coding(codings.RICE, False, N // 64, 40, N // 512),
        bytes(5 * N // 64) + b"\xff" * (N // 512),
    ),
    "unlisted": lambda: int8((N,), Coding(codings.ELIAS_FANO, True, N), b"\xaa" * (N // 4)),
    "few unlisted": lambda: int8(
        (N,), Coding(codings.RICE, True, 1, 0, N // 8), bytes(N // 8 - 1) + b"\1"
    ),
    "slices": lambda: int8(
        (N, 1), Coding(codings.SLICES, False, N, 0, N), b"\xff" * (N // 8) + b"\xff" * (N // 8)
    ),
    "slices of the last axis": lambda: int8(
        (2, N // 2),
        Coding(codings.SLICES, False, N, 1, N // 2),
        b"\xff" * (N // 16) + b"\xff" * (N // 8),
    ),
    "one long slice": lambda: int8(
        (1, N), Coding(codings.SLICES, False, N, 0, 1), b"\x80" + b"\xff" * (N // 8)
    ),
    "axis": lambda: int8((N, 1), Coding(codings.AXIS, False, N, 0), b"\xff" * (N // 8)),
    "one long axis": lambda: int8((1, N), Coding(codings.AXIS, False, N, 0), b"\x80"),
    "levels": lambda: hostile(
        Plan("x", LEVELS, (N // 2 - 4,), None, Coding(codings.ALL), 16, 2), bytes(N)
    ),
    "mask": lambda: hostile(
        Plan("x", headers.BOOL, (N,), None, Coding(codings.BITMAP, num_listed=N)),
        b"\xff" * (N // 8),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_reading_takes_no_more_than_what_is_declared_and_a_constant(name):
    data = CASES[name]()
    tracemalloc.start()
    try:
        decoded = wire_format.decode(data, max_bytes=N)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert N - 8 <= fuzz_wire.as_array(decoded["x"]).nbytes <= N
    body = packing.read_varint(memoryview(data), 5)[0]
    assert peak <= N + body + WORK


def test_a_known_mask_costs_the_tensor_once_more_and_no_more():
    shape, known = (N,), np.ones([N], np.bool_)
    plan = Plan("x", INT8, shape, N, Coding(codings.BITMAP, num_listed=N))
    body = packing.varint(1) + headers.write(plan, "") + b"\xff" * (N // 8) + b"\1" * N
    body = wire_format.MAGIC + b"\0" + body
    digest = zlib.crc32(np.packbits(known).data, zlib.crc32(body))
    data = body + digest.to_bytes(4, "little")
    tracemalloc.start()
    try:
        decoded = wire_format.decode(data, known={"x": known}, max_bytes=N)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.all(fuzz_wire.as_array(decoded["x"]) == 1)
    assert peak <= 2 * N + WORK


def test_by_default_a_message_may_declare_256_mib():
    def declares(*shape):
        return hostile(Plan("x", INT8, shape, None, Coding(codings.RICE)), b"", is_deflated=False)

    assert len(declares(1 << 32)) < 25
    for shape in ((1 << 32,), ((1 << 28) + 1,), (1 << 62, 0), (1 << 62,) * 15, (0, (1 << 63) - 1)):
        with pytest.raises(WireError, match="take more than 268435456 bytes"):
            wire_format.decode(declares(*shape))
    array = wire_format.decode(declares(1 << 28))["x"]
    assert fuzz_wire.as_array(array).nbytes == wire_format.MAX_BYTES
    wire_format.decode(declares((1 << 28) + 1), max_bytes=1 << 29)


@pytest.mark.parametrize("shape", [(1 << 49,), (1 << 62,), (1 << 62, 4)])
def test_too_little_memory_is_the_one_error(shape):
    plan = Plan("x", INT8, shape, None, Coding(codings.RICE))
    with pytest.raises(WireError, match=r"memory|take more than"):
        wire_format.decode(hostile(plan, b"", is_deflated=False), max_bytes=1 << 70)


def test_memory_that_runs_out_anywhere_is_the_one_error(monkeypatch):
    data = wire_format.encode({"x": np.arange(9)}, deflate_level=6)
    for place in ("bytearray", "np.zeros", "zlib.decompressobj", "headers.read"):
        module, _, name = place.rpartition(".")
        owner = "fedjaxprune.wire.reading" + ("." + module if module else "")

        def fail(*_, **__):
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(f"{owner}.{name}", fail, raising=False)
            with pytest.raises(WireError, match="more memory than there is"):
                wire_format.decode(data)
    wire_format.decode(data)


def test_the_number_of_tensors_is_bounded_by_what_they_may_take():
    def of(count):
        plans = [Plan(f"{i:05}", INT8, (0,) * 15, None, Coding(codings.ALL)) for i in range(count)]
        before = ["", *(plan.name for plan in plans)]
        body = packing.varint(count) + b"".join(map(headers.write, plans, before))
        return with_checksum(wire_format.MAGIC + b"\0" + body)

    data = of(4096)
    tracemalloc.start()
    try:
        assert len(wire_format.decode(data, max_bytes=4096)) == 4096
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < WORK
    with pytest.raises(WireError, match="more than 4097 tensors"):
        wire_format.decode(of(4098), max_bytes=4098)
    assert len(wire_format.decode(of(4097), max_bytes=4097)) == 4097


def test_a_deflated_body_is_bounded_by_what_its_tensors_may_take():
    body = bytes(8 * MIB)  # one tensor of no bytes, then a payload that nobody declared
    data = packing.varint(len(body)) + zlib.compress(body, 9)
    data = with_checksum(wire_format.MAGIC + b"\1" + data)
    assert len(data) < 10_000
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="more than it can hold"):
            wire_format.decode(data, max_bytes=MIB)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MIB
    dense = {"x": np.arange(MIB, dtype=np.int8), "y": np.zeros([0], np.bool_)}
    packed = wire_format.encode(dense, deflate_level=9)
    np.testing.assert_array_equal(wire_format.decode(packed, max_bytes=MIB + 1)["x"], dense["x"])


@pytest.mark.parametrize("rest", [b"", b"\0", bytes(1 << 17)])
@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_deflated_body_ends_where_it_says(rest, wrong):
    raw = wire_format.encode({"x": np.zeros([70_000], np.int8)})[5:-4]
    packed = zlib.compress(raw)
    size = len(raw) + (0 if rest else wrong)
    data = wire_format.MAGIC + b"\1" + packing.varint(size) + packed + rest
    with pytest.raises(WireError, match="another length"):
        wire_format.decode(with_checksum(data))


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32))
def test_every_message_that_is_accepted_encodes_to_an_equal_one(seed):
    chance = random.Random(seed)
    with fuzz_wire.checksum_ignored():
        messages = [fuzz_wire.new_message(chance) for _ in range(2)]
        # Several tensors together may take more than a small message.
        assert all(fuzz_wire.try_one(one, fuzz_wire.LARGE) for one in messages)
        for _ in range(20):
            fuzz_wire.try_one(fuzz_wire.damaged(chance, *messages))


def test_the_fuzzer_runs_in_half_a_gibibyte_and_counts(tmp_path):
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-m", "tests.fuzz_wire", "--seconds", "0.1", "--seed", "3"]
    done = subprocess.run(
        [*command, "--findings", str(tmp_path)], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "inputs in" in done.stdout
    assert not list(tmp_path.iterdir())


def num_bytes(coding, mask):
    """Write a mask in a coding, and count the bytes of the whole message."""
    plan = Plan("x", headers.BOOL, mask.shape, None, coding)
    body = headers.write(plan, "") + b"".join(codings.write(coding, mask, None))
    assert len(body) == sum(headers.lengths(plan, ""))
    return wire_format.frame_bytes(1) + len(body)


def alternatives(mask):
    """List the codings of a mask that the writer compares."""
    n, marked = mask.size, int(mask.sum())
    yield Coding(codings.BITMAP, num_listed=marked)
    for complement in (False, True):
        listed = np.flatnonzero(~mask if complement else mask)
        guess = (n // len(listed)).bit_length() - 1 if len(listed) else 0
        for k in range(max(guess - 1, 0), guess + 2):
            gaps = np.diff(listed, prepend=-1) - 1
            length = packing.num_bytes(int((gaps >> k).sum()) + len(listed))
            if complement == (2 * marked > n):
                yield Coding(codings.RICE, complement, len(listed), k, length)
                yield Coding(codings.ELIAS_FANO, complement, len(listed), k)
    for axis in range(mask.ndim):
        others = tuple(i for i in range(mask.ndim) if i != axis)
        live = mask.any(axis=others)
        if np.array_equal(live, mask.all(axis=others)):
            yield Coding(codings.AXIS, False, marked, axis)
        elif 2 * marked <= n:
            yield Coding(codings.SLICES, False, marked, axis, int(live.sum()))


def test_no_coding_is_shorter_than_the_one_that_is_taken_headers_included():
    rng = np.random.default_rng(5)
    codes = set()
    for _ in range(500):
        shape = tuple(rng.integers(1, 24, 2))
        mask = rng.random(shape) < rng.choice([0.02, 0.1, 0.3, 0.5, 0.9])
        if rng.random() < 0.3:
            mask &= rng.random((shape[0], 1)) < 0.4
        elif rng.random() < 0.1:
            mask = np.broadcast_to(rng.random((shape[0], 1)) < 0.4, shape).copy()
        if mask.all():
            continue
        taken = codings.shortest(mask)[0]
        options = sorted((num_bytes(coding, mask), coding.code) for coding in alternatives(mask))
        assert (num_bytes(taken, mask), taken.code) == options[0]
        assert len(wire_format.encode({"x": mask})) == options[0][0]
        codes.add(taken.code)
        by_counts = codings.counted(mask.size, int(mask.sum()))
        lengths = [
            num_bytes(coding, mask)
            for coding in alternatives(mask)
            if coding.code in (codings.BITMAP, codings.ELIAS_FANO)
        ]
        assert num_bytes(by_counts, mask) == min(lengths)
        assert len(wire_format.encode({"x": wire_format.counted(mask)})) == min(lengths)
    assert codes >= {codings.BITMAP, codings.ELIAS_FANO, codings.SLICES, codings.AXIS}


def test_no_sparse_tensor_is_longer_than_the_dense_one():
    for n, seed in itertools.product(range(1, 40), range(4)):
        values = np.random.default_rng(seed).integers(0, 2, n).astype(np.int8)
        dense = np.ones([n], np.int8)
        assert wire_format.num_bits({"x": values}) <= wire_format.num_bits({"x": dense})
        np.testing.assert_array_equal(
            wire_format.decode(wire_format.encode({"x": values}))["x"], values
        )


def test_levels_that_arrived_can_be_sent_again():
    sent = wire_format.levels(np.arange(8), bits=3, scales=np.array([-1.0, 1.0], np.float32))
    arrived = wire_format.decode(wire_format.encode({"x": sent}))
    assert wire_format.encode(arrived) == wire_format.encode({"x": sent})


@pytest.mark.parametrize("name", ["\ud800", 3, b"x", None])
def test_names_that_are_not_text_are_refused(name):
    with pytest.raises(ValueError, match="must be text that UTF-8 can write"):
        wire_format.encode({name: np.zeros(2)})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("data", [None, "text", 3, [1, 2], np.zeros((4, 4), np.uint8)[:, ::2]])
def test_what_is_no_bytes_is_the_one_error_too(data):
    with pytest.raises(WireError, match=f"must be contiguous bytes, got {type(data).__name__}"):
        wire_format.decode(data)


def test_messages_and_known_masks_are_mappings():
    wrong: Any = [np.ones(2, bool)]
    with pytest.raises(WireError, match="known must be a mapping of masks by name, got list"):
        wire_format.decode(wire_format.encode({}), known=wrong)
    for call in (wire_format.encode, wire_format.num_bits):
        with pytest.raises(ValueError, match="must be a mapping of arrays, got list"):
            call(wrong)


A = np.arange(6, dtype=np.float32).reshape(2, 3)
PLACES = np.array([[True, False, True], [False, True, True]])
kept: Any = wire_format.kept  # of arrays or lists
pairs: Any = wire_format.pairs
counted: Any = wire_format.counted
NOT_ARRAYS: dict[str, tuple[Any, str]] = {
    "ragged": ([[1.0], [1.0, 2.0]], "lists whose rows have one length, got list"),
    "ragged beside a mask": (
        kept([[1], [1, 2]], None),
        "an array of numbers or booleans",
    ),
    "a key": (jax.random.key(0), "an array of numbers or booleans"),
    "masked values": (np.ma.array(A, mask=A > 2), "masked values, which do not travel"),
    "a ragged mask": (kept(A, [[True], [True] * 2]), "whose rows have one length, got list"),
    "a mask of numbers": (kept(A, [[1, 0, 1]] * 2), "a mask must be bool and of"),
    "chosen outside": (pairs(A, A > 1, known=PLACES), "outside the known mask"),
}


@pytest.mark.parametrize("name", NOT_ARRAYS)
def test_what_would_not_arrive_as_it_is_is_refused(name):
    given_, sentence = NOT_ARRAYS[name]
    for call in (wire_format.encode, wire_format.num_bits):
        with pytest.raises(ValueError, match=f"^x: .*{sentence}") as caught:
            call({"x": given_})
        assert "\n" not in str(caught.value)


def test_numbers_of_bits_and_levels_are_whole():
    wrong: Any
    for wrong in (0, 17, 2.5, "2", None):
        with pytest.raises(ValueError, match=r"bits must be a whole number in \[1, 16\], got"):
            wire_format.levels(np.arange(2), bits=wrong, scales=np.zeros(1))
    for wrong in (0, 10, 2.5, "9", -1):
        with pytest.raises(ValueError, match=r"deflate_level must be a whole number in \[1, 9\]"):
            wire_format.encode({"x": A}, deflate_level=wrong)
    ragged: Any = [[1], [1, 2]]
    with pytest.raises(ValueError, match=r"levels: .* whose rows have one length, got list"):
        wire_format.levels(ragged, bits=2, scales=np.zeros(1))


def test_lists_are_as_good_as_arrays():
    of_lists: Any
    for of_lists, of_arrays in (
        (A.tolist(), A.astype(np.float64)),
        (kept(A, PLACES.tolist()), kept(A, PLACES)),
        (pairs(A, PLACES.tolist()), pairs(A, PLACES)),
        (counted(PLACES.tolist()), counted(PLACES)),
    ):
        assert wire_format.encode({"x": of_lists}) == wire_format.encode({"x": of_arrays})


def test_a_limit_that_limits_nothing_and_masks_that_are_none_are_refused():
    wrong: Any
    plain = wire_format.encode({"x": A})
    for wrong in (None, float("nan"), float("inf"), 100.0, "100", True):
        with pytest.raises(WireError, match=f"max_bytes must be a whole number, got {wrong!r}"):
            wire_format.decode(plain, max_bytes=wrong)
    limit: Any = np.int64(24)
    assert "x" in wire_format.decode(plain, max_bytes=limit)
    masked = wire_format.encode({"x": kept(A, PLACES)})
    for wrong in ([[True], [True] * 2], None, PLACES.astype(int), jax.random.key(0)):
        with pytest.raises(WireError, match="'x' needs a known bool mask of the shape"):
            wire_format.decode(masked, known={"x": wrong})
