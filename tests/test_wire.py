"""The wire: lossless to the bit, as long as it says, short, and hard against hostile input."""

import math
import pathlib
import random
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjaxprune import masks, models, trees
from fedjaxprune.wire import codings, headers
from fedjaxprune.wire import format as wire_format
from fedjaxprune.wire.packing import WireError

CORPUS = sorted((pathlib.Path(__file__).parent / "corpus" / "wire").glob("*.bin"))
KNOWN = {
    "a": np.arange(35).reshape(5, 7) % 3 == 0,
    "b": np.ones([16], np.bool_),
    "c": np.zeros([2, 3], np.bool_),
}
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)
DENSITIES = st.sampled_from([0.0, 0.02, 0.1, 0.5, 0.9, 1.0])
STRUCTURES = st.sampled_from(["entries", "first axis", "last axis", "slices"])
CONSTANT = 64  # bytes of a tensor's header, name included: what "dense plus a constant" allows


@st.composite
def bool_masks(draw, shape):
    """Make masks of every density, some of them by whole slices."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    density, structure = draw(DENSITIES), draw(STRUCTURES)
    mask = rng.random(shape) < density
    if shape and structure != "entries":
        line = rng.random(shape[0 if structure == "first axis" else -1]) < 0.5
        by_slice = (
            line.reshape([-1, *[1] * (len(shape) - 1)]) if structure == "first axis" else line
        )
        mask = mask & by_slice if structure == "slices" else np.broadcast_to(by_slice, shape).copy()
    return mask


@st.composite
def tensors(draw, shape=None):
    """Make arrays of random bits, so that every NaN, subnormal and negative zero occurs."""
    shape = draw(SHAPES) if shape is None else shape
    dtype = draw(st.sampled_from(headers.DTYPES))
    mask = draw(bool_masks(shape))
    if dtype == np.bool_:
        return mask
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = np.frombuffer(rng.bytes(max(mask.size, 1) * dtype.itemsize), dtype)[: mask.size]
    values = values.reshape(shape).copy()
    values[~mask] = np.zeros([], dtype)
    if values.dtype.kind == "f" and values.size:
        values.reshape(-1)[0] = -0.0
    return values


def assert_same_bits(found, expected):
    assert isinstance(found, np.ndarray)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()


NAMES = st.text(max_size=20).filter(lambda name: len(name.encode(errors="replace")) < 60)
NAMES = NAMES.filter(lambda name: name.isprintable())


@settings(deadline=None)
@given(st.dictionaries(NAMES, tensors(), max_size=5), st.sampled_from([None, 1, 9]))
@example({"nan": np.array([0x7FC00001, 0xFF812345, 0x80000000], np.uint32).view(np.float32)}, None)
@example({"scalar": np.array(3, np.int8), "empty": np.zeros([3, 0, 2], ml_dtypes.bfloat16)}, 9)
def test_what_is_decoded_is_what_was_encoded_and_as_long_as_it_says(message, deflate_level):
    data = wire_format.encode(message, deflate_level=deflate_level)
    decoded = wire_format.decode(data)
    assert list(decoded) == list(message)
    for name, values in message.items():
        assert_same_bits(decoded[name], values)
    if deflate_level is None:
        assert 8 * len(data) == wire_format.num_bits(message)
        dense = sum(
            math.ceil(v.size / 8) if v.dtype == np.bool_ else v.nbytes for v in message.values()
        )
        assert len(data) <= wire_format.frame_bytes(len(message)) + dense + CONSTANT * len(
            message
        ) + sum(len(name.encode()) for name in message)


@st.composite
def parts(draw):
    """Make a tensor of which the receiver knows something; also what must arrive."""
    shape = draw(SHAPES)
    values = draw(tensors(shape).filter(lambda v: v.dtype != np.bool_))
    known = draw(st.one_of(st.none(), bool_masks(shape)))
    chosen = draw(bool_masks(shape))
    may = np.ones(shape, np.bool_) if known is None else known
    kind = draw(st.sampled_from(["kept", "pairs", "levels", "counted"]))
    if kind == "counted":
        return wire_format.counted(chosen), None, chosen, {"num_chosen": int(chosen.sum())}
    counts = {"num_known": None if known is None else int(known.sum())}
    if kind == "kept":
        return (
            wire_format.kept(values, known),
            known,
            np.where(may, values, np.zeros_like(values)),
            counts,
        )
    sent = may & chosen
    if kind == "pairs":
        part = wire_format.pairs(values, sent, known=known)
        counts["num_chosen"] = int(sent.sum())
        return part, known, np.where(sent, values, np.zeros_like(values)), counts
    bits = draw(st.integers(1, 16))
    grid = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2**bits, shape)
    scales = np.array([np.nan, -0.0], np.float32)[: draw(st.integers(0, 2))]
    counts |= {"level_bits": bits, "num_scales": len(scales)}
    part = wire_format.levels(grid, bits=bits, scales=scales, known=known)
    return part, known, np.where(may, grid, 0).astype(np.uint16), counts


@settings(deadline=None)
@given(parts())
def test_what_the_receiver_knows_is_not_sent_and_the_length_follows_from_counts(case):
    part, known, expected, counts = case
    data = wire_format.encode({"x": part})
    found = wire_format.decode(data, known={} if known is None else {"x": known})["x"]
    if isinstance(found, wire_format.Levels):
        assert found.level_bits == part.level_bits
        assert_same_bits(found.scales, part.scales)
        found = found.levels
    assert_same_bits(found, expected)
    assert 8 * len(data) == wire_format.num_bits({"x": part})
    planned = headers.plan_counts("x", part.values.dtype, part.values.shape, **counts)
    assert len(data) == wire_format.frame_bytes(1) + sum(headers.lengths(planned, ""))


def test_a_message_written_by_hand_is_the_one_of_the_documentation():
    values = np.zeros([8, 10], np.float32)
    values[0, 2], values[6, 1] = 1.5, -2.0
    message = {"b": np.array([1, 2], np.int8), "w": values}
    written = (
        "464a5001 00 02"  # magic and version, flags, two tensors
        "00 01 62 11 00 02"  # b: int8, one axis, dense, 2 entries
        "00 01 77 2b 03 08 0a 02 04"  # w: float32, two axes, ELIAS_FANO, 8 by 10, 2 listed, 4 low
        "01 02"  # values of b
        "2d 88"  # positions 2 and 61: low bits 0010 1101, then the bits 0 + 0 and 3 + 1 of six
        "0000c03f 000000c0"  # 1.5, -2.0
    )
    body = bytes.fromhex(written)
    assert wire_format.encode(message)[:-4].hex(" ") == body.hex(" ")
    assert wire_format.encode(message) == body + zlib.crc32(body).to_bytes(4, "little")
    text = (pathlib.Path(__file__).parents[1] / "docs" / "reference" / "wire.md").read_text()
    example = text.split("```text\n")[-1].split("```")[0]
    lines = [line.split("  ")[0] for line in example.splitlines()]
    assert bytes.fromhex("".join(lines)) == wire_format.encode(message)


def test_every_coding_is_the_shortest_of_something():
    rng = np.random.default_rng(0)
    by_filter = np.broadcast_to(rng.random(16) < 0.5, [3, 3, 8, 16])
    rows = (rng.random([64, 1]) < 0.3) & (rng.random([64, 64]) < 0.5)
    cases = {
        codings.ALL: np.ones([9], np.bool_),
        codings.BITMAP: rng.random(1000) < 0.5,
        codings.RICE: rng.random(1000) < 0.05,
        codings.SLICES: rows,
        codings.AXIS: by_filter,
    }
    for code, mask in cases.items():
        assert codings.shortest(mask)[0].code == code
    assert codings.counted(1000, 50).code == codings.ELIAS_FANO
    nearly_full = rng.random(1000) < 0.97
    assert codings.shortest(nearly_full)[0].complement


@pytest.mark.parametrize("by", ["chance", "magnitude"])
def test_lenet5_at_095_is_within_two_per_cent_of_the_entropy_bound(by):
    model = models.lenet5(input_shape=(28, 28, 1), num_classes=10)
    params, _ = jax.jit(model.init)(jax.random.key(0))
    flags = masks.prunable_leaves(params, masks.is_kernel)
    rng = np.random.default_rng(1)
    leaves = [np.asarray(leaf) + np.float32(1e-3) for leaf in jax.tree.leaves(params)]
    scores = [rng.random(v.shape) if by == "chance" else np.abs(v) for v in leaves]
    ranked = np.sort(np.concatenate([s.ravel() for s, f in zip(scores, flags, strict=True) if f]))
    num_kept = ranked.size - round(0.95 * ranked.size)
    message, bound, num_values = {}, 0.0, 0
    for path, values, score, flag in zip(trees.paths(params), leaves, scores, flags, strict=True):
        live = score >= ranked[-num_kept] if flag else np.ones(values.shape, np.bool_)
        message[path] = np.where(live, values, np.float32(0))
        n, m = live.size, int(live.sum())
        num_values += m
        bound += 0.0 if m in (0, n) else -m * math.log2(m / n) - (n - m) * math.log2(1 - m / n)
    assert num_values == 61_706 - 61_470 + num_kept
    assert wire_format.num_bits(message) <= 1.02 * (bound + 32 * num_values)


def test_an_array_of_the_device_travels_as_it_is():
    values = jnp.asarray([1.0, jnp.nan, -0.0], jnp.bfloat16)
    message = {"x": np.asarray(values)}
    assert_same_bits(wire_format.decode(wire_format.encode(message))["x"], np.asarray(values))


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"x": np.zeros(2, np.complex64)}, "complex64 do not travel"),
        ({"x" * 256: np.zeros(2)}, "255 bytes"),
        ({"x": np.zeros([1] * 16)}, "16 axes"),
        ({"x": wire_format.kept(np.zeros(3), np.ones(2, np.bool_))}, "a mask must be bool"),
        ({"x": wire_format.kept(np.zeros(3, np.bool_), np.ones(3, np.bool_))}, "travels whole"),
        ({"x": wire_format.pairs(np.ones(3, np.bool_), np.zeros(3, np.bool_))}, "no values beside"),
    ],
)
def test_what_cannot_travel_is_refused(message, sentence):
    with pytest.raises(ValueError, match=sentence):
        wire_format.encode(message)


@pytest.mark.parametrize(
    ("bits", "grid", "sentence"),
    [
        (0, [0], r"\[1, 16\], got 0"),
        (2, [4], r"\[0, 3\], got \[4, 4\]"),
        (2, [1.5], "must be integers, got float64"),
    ],
)
def test_levels_outside_their_range_are_refused(bits, grid, sentence):
    with pytest.raises(ValueError, match=sentence):
        wire_format.levels(np.array(grid), bits=bits, scales=np.zeros(1))


def sample_message():
    rng = np.random.default_rng(2)
    sparse = np.where(rng.random([12, 10]) < 0.1, 1.5, 0.0)
    return {
        "a": wire_format.kept(np.ones([5, 7], np.float32), KNOWN["a"]),
        "masks": rng.random([20, 10]) < 0.2,
        "sparse": sparse.astype(np.float32),
    }


@pytest.mark.parametrize("deflate_level", [None, 6])
def test_every_truncation_and_every_flipped_bit_is_told(deflate_level):
    data = wire_format.encode(sample_message(), deflate_level=deflate_level)
    wire_format.decode(data, known=KNOWN)
    for size in range(len(data)):
        with pytest.raises(WireError):
            wire_format.decode(data[:size], known=KNOWN)
    with pytest.raises(WireError):
        wire_format.decode(data + b"\0", known=KNOWN)
    for at in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(WireError):
            wire_format.decode(flipped, known=KNOWN)


def test_another_mask_than_the_sender_had_is_told():
    data = wire_format.encode(sample_message())
    for other in (None, KNOWN["a"][:4], np.roll(KNOWN["a"], 1), ~KNOWN["a"]):
        with pytest.raises(WireError):
            wire_format.decode(data, known={} if other is None else {"a": other})


def with_checksum(body):
    return body + zlib.crc32(body).to_bytes(4, "little")


def test_a_small_message_that_declares_a_large_tensor_is_refused():
    huge = bytes([0, 1, 0x78, 0x1B, 0x02, *[0x80] * 5, 1, 0, 0, 0])  # sparse, all zero, 2**35 wide
    with pytest.raises(WireError, match="more than"):
        wire_format.decode(with_checksum(b"FJP\x01\0\x01" + huge))
    bomb = zlib.compress(bytes(1 << 20), 9)
    with pytest.raises(WireError, match="inflates to another length"):
        wire_format.decode(b"FJP\x01\x01" + bytes([100]) + bomb + bytes(4))
    message = {"x": np.zeros(1000, np.float32)}
    with pytest.raises(WireError, match="more than 3999 bytes"):
        wire_format.decode(wire_format.encode(message), max_bytes=3999)


@settings(deadline=None, max_examples=500)
@given(st.sampled_from(CORPUS or [None]), st.integers(0, 2**32), st.integers(1, 8))
def test_damage_behind_a_right_checksum_raises_the_one_error(file, seed, num_changes):
    chance = random.Random(seed)
    body = bytearray(file.read_bytes()[:-4])
    for _ in range(num_changes):
        at = chance.randrange(4, len(body) + 1) if len(body) >= 4 else 0
        kind = chance.randrange(3)
        if kind == 0 and at < len(body):
            body[at] = chance.randrange(256)
        elif kind == 1:
            body[at:at] = chance.randbytes(chance.randrange(4))
        else:
            del body[at : at + chance.randrange(4)]
    try:
        decoded = wire_format.decode(with_checksum(bytes(body)), known=KNOWN, max_bytes=1 << 16)
    except WireError:
        return
    assert sum(v.nbytes for v in decoded.values() if isinstance(v, np.ndarray)) <= 1 << 16


def test_the_corpus_of_the_fuzzer_raises_nothing_but_the_one_error():
    assert len(CORPUS) > 10
    for file in CORPUS:
        try:
            wire_format.decode(file.read_bytes(), known=KNOWN, max_bytes=1 << 16)
        except WireError:
            continue
