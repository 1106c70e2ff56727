"""Messages as bytes, and their exact length; ``docs/reference/wire.md`` describes the format.

A message is a mapping from names to tensors. A plain NumPy array travels whole, in the shortest
coding; `kept`, `pairs`, `levels` and `counted` say what the receiver knows already, or that the
length must follow from counts alone. Everything is NumPy on the host.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedjaxprune.wire import codings, headers, packing, reading
from fedjaxprune.wire.codings import Coding
from fedjaxprune.wire.headers import Lengths, Plan
from fedjaxprune.wire.packing import WireError

MAGIC = b"FJP\x01"  # the last byte is the version
DEFLATED = 0x01
MAX_BYTES = 1 << 28
CHECKSUM_BYTES = 4


class Part(NamedTuple):
    """One tensor of a message; made by the functions below.

    Attributes:
      values: ``[...]`` numbers, or levels as uint16, or a bool mask.
      known: ``[...]`` bool, entries that may travel, which the receiver knows; None if all.
      chosen: ``[...]`` bool, entries that travel with their positions; None if all that may.
      scales: ``[s]`` float32, what levels mean.
      level_bits: bits of a level; 0 for values as they are.
    """

    values: np.ndarray
    known: np.ndarray | None = None
    chosen: np.ndarray | None = None
    scales: np.ndarray | None = None
    level_bits: int = 0


class Levels(NamedTuple):
    """Quantized values as they arrive.

    Attributes:
      levels: ``[...]`` uint16; 0 where nothing travelled.
      scales: ``[s]`` float32.
      level_bits: bits of a level.
    """

    levels: np.ndarray
    scales: np.ndarray
    level_bits: int


Message = (
    Mapping[str, np.ndarray]
    | Mapping[str, Part]
    | Mapping[str, np.ndarray | Part]
    | Mapping[str, np.ndarray | Levels]
)


def kept(values: np.ndarray, mask: np.ndarray | None) -> Part:
    """Send the entries under a mask that the receiver knows, all of them, as they are.

    Entries outside the mask are not looked at, and arrive as zeros. The length depends on the
    number of live entries alone. Without a mask all entries are sent.
    """
    return Part(values=values, known=mask)


def pairs(values: np.ndarray, chosen: np.ndarray, *, known: np.ndarray | None = None) -> Part:
    """Send chosen entries with their positions (top-k); the others arrive as zeros.

    Positions are numbered among the `known` entries, and are coded so that their length depends on
    the counts alone.
    """
    return Part(values=values, known=known, chosen=chosen)


def levels(
    values: np.ndarray,
    *,
    bits: int,
    scales: np.ndarray,
    known: np.ndarray | None = None,
    chosen: np.ndarray | None = None,
) -> Part:
    """Send quantized values: levels of `bits` bits, and the float32 numbers that give them sense.

    Raises:
      ValueError: if `bits` is outside [1, 16], a level has more, or levels are no integers.
    """
    if bits not in range(1, headers.MAX_LEVEL_BITS + 1):
        raise ValueError(
            f"bits must be a whole number in [1, {headers.MAX_LEVEL_BITS}], got {bits!r}."
        )
    values = _array("levels", values)
    if values.dtype.kind not in "iu":
        raise ValueError(f"levels must be integers, got {values.dtype}.")
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**bits:
        raise ValueError(
            f"levels of {bits} bits must lie in [0, {2**bits - 1}], "
            f"got [{values.min()}, {values.max()}]."
        )
    scales = np.asarray(scales, np.float32).reshape(-1)
    if len(scales) > 255:
        raise ValueError(f"a tensor may have 255 scales, got {len(scales)}.")
    return Part(values.astype(np.uint16), known, chosen, scales, bits)


def counted(mask: np.ndarray) -> Part:
    """Send a mask in a coding whose length depends on the number of live entries alone."""
    return Part(values=mask, chosen=mask)


def encode(message: Message, *, deflate_level: int | None = None) -> bytes:
    """Write a message.

    Args:
      message: named tensors, in the order in which they travel.
      deflate_level: if given, the body goes through zlib at this level (1 to 9), and the length is
        no longer that of `num_bits`.

    Raises:
      ValueError: if it is no mapping, a type, a shape, a mask or a name is not one that travels, or
        the level is none.
    """
    if deflate_level is not None and deflate_level not in range(1, 10):
        raise ValueError(f"deflate_level must be a whole number in [1, 9], got {deflate_level!r}.")
    planned = [_plan(name, part) for name, part in _items(message)]
    plans = [item for item, _ in planned]
    body: list[bytes | memoryview] = [packing.varint(len(plans))]
    body.extend(map(headers.write, plans, _before(plans)))
    for item, part in planned:
        body.extend(_payload(item, part))
    flags = 0
    if deflate_level is not None:
        raw, flags = b"".join(body), DEFLATED
        body = [packing.varint(len(raw)), zlib.compress(raw, deflate_level)]
    body.insert(0, MAGIC + bytes([flags]))
    digest = 0
    for piece in body:
        digest = zlib.crc32(piece, digest)
    for _, part in planned:
        digest = _crc_known(part.known, digest)
    return b"".join([*body, digest.to_bytes(CHECKSUM_BYTES, "little")])


def num_bits(message: Message) -> int:
    """Count the bits of ``encode(message)`` without writing it."""
    plans = plan(message)
    return 8 * (frame_bytes(len(plans)) + sum(sum(length) for length in measure(plans)))


def measure(plans: Sequence[Plan]) -> list[Lengths]:
    """Tell the bytes of every tensor of a message."""
    return list(map(headers.lengths, plans, _before(plans)))


def plan(message: Message) -> list[Plan]:
    """Decide how every tensor of a message is written, as `encode` does."""
    return [_plan(name, part)[0] for name, part in _items(message)]


def frame_bytes(num_tensors: int) -> int:
    """Count the bytes of a message that belong to no tensor."""
    return len(MAGIC) + 1 + len(packing.varint(num_tensors)) + CHECKSUM_BYTES


def decode(
    data: bytes | bytearray | memoryview,
    *,
    known: Mapping[str, np.ndarray] | None = None,
    max_bytes: int = MAX_BYTES,
) -> dict[str, np.ndarray | Levels]:
    """Read a message back, bit for bit; what did not travel is zero.

    Args:
      data: what `encode` wrote, from whomever it comes.
      known: masks ``[...]`` bool that the receiver holds, by the tensors' names.
      max_bytes: how much the tensors together may take. What is declared is compared with it before
        anything is allocated. Reading takes that much again for a deflated message, and once more
        for a tensor under a known mask, beside a few MiB.

    Raises:
      WireError: if the data are no bytes, or no whole and undamaged message, or too large, or made
        for other masks than the known ones, if there is too little memory, or if another argument
        is not of its type.
    """
    known = {} if known is None else known
    if not isinstance(known, Mapping):
        raise WireError(f"known must be a mapping of masks by name, got {type(known).__name__}.")
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int | np.integer):
        raise WireError(f"max_bytes must be a whole number, got {max_bytes!r}.")
    try:
        return _decode(_bytes_of(data), known, int(max_bytes))
    except MemoryError:
        raise WireError("the message needs more memory than there is.") from None


def _bytes_of(data: bytes | bytearray | memoryview) -> memoryview:
    """See the bytes of a message, or say of which type it is."""
    try:
        return memoryview(data).cast("B")
    except TypeError:
        given = type(data).__name__
        raise WireError(f"a message must be contiguous bytes, got {given}.") from None


def _decode(
    view: memoryview, known: Mapping[str, np.ndarray], max_bytes: int
) -> dict[str, np.ndarray | Levels]:
    """Read a message back."""
    if len(view) < frame_bytes(0) or view[: len(MAGIC)] != MAGIC:
        raise WireError("this is no message of version 1.")
    flags, at = packing.read_byte(view, len(MAGIC))
    body = view[at : len(view) - CHECKSUM_BYTES]
    if flags == DEFLATED:
        body = reading.inflate(body, max_bytes)
    elif flags:
        raise WireError("a flag of the message is unknown.")
    plans, at = reading.plans(body, max_bytes)
    masks = [_known_mask(item, known) for item in plans]
    digest = zlib.crc32(view[: len(view) - CHECKSUM_BYTES])
    for mask in masks:
        digest = _crc_known(mask, digest)
    if digest != int.from_bytes(view[len(view) - CHECKSUM_BYTES :], "little"):
        raise WireError("the checksum does not fit: damaged, or made for other known masks.")
    tensors = {}
    for item, mask in zip(plans, masks, strict=True):
        begin, (positions, values) = at, headers.payload(item)
        middle, at = begin + positions, begin + positions + values
        tensor = reading.tensor(item, mask, body[begin:middle], body[middle:at])
        if item.level_bits:
            scales = np.frombuffer(body[middle : middle + 4 * item.num_scales], "<f4")
            tensor = Levels(tensor, scales.astype(np.float32), item.level_bits)
        tensors[item.name] = tensor
    return tensors


def _items(message: Message) -> Iterable[tuple[str, np.ndarray | Part | Levels]]:
    """List a message's tensors, or say of which type it is."""
    if not isinstance(message, Mapping):
        raise ValueError(f"a message must be a mapping of arrays, got {type(message).__name__}.")
    return message.items()


def _plan(name: str, given: np.ndarray | Part | Levels) -> tuple[Plan, "_Work"]:
    """Decide how a tensor is written."""
    if isinstance(given, Levels):
        given = levels(given.levels, bits=given.level_bits, scales=given.scales)
    part = _arrays(name, given if isinstance(given, Part) else Part(given))
    values = part.values
    if not isinstance(name, str) or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise ValueError(f"a name must be text that UTF-8 can write, got {name!r}.")
    if len(name.encode()) > headers.MAX_NAME:
        raise ValueError(f"a name may have {headers.MAX_NAME} bytes, got {name!r}.")
    if values.dtype not in headers.DTYPES:
        raise ValueError(f"{name}: tensors of type {values.dtype} do not travel.")
    if values.ndim > headers.MAX_AXES:
        raise ValueError(f"{name}: {values.ndim} axes, at most {headers.MAX_AXES} travel.")
    for mask in (part.known, part.chosen):
        if mask is not None and (mask.shape != values.shape or mask.dtype != np.bool_):
            raise ValueError(
                f"{name}: a mask must be bool and of the shape {values.shape}, "
                f"got {mask.dtype} and {mask.shape}."
            )
    is_mask = values.dtype == headers.BOOL
    if is_mask and part.known is not None:
        raise ValueError(f"{name}: a mask travels whole, not under another one.")
    if is_mask and part.chosen is not None and part.chosen is not part.values:
        raise ValueError(f"{name}: a mask has no values beside the positions that are chosen.")
    if part.known is not None and part.chosen is not None and np.any(part.chosen & ~part.known):
        raise ValueError(f"{name}: entries are chosen that lie outside the known mask.")
    num_known = None if part.known is None else int(np.count_nonzero(part.known))
    dense, listed = Coding(codings.ALL), None
    if not isinstance(given, Part):
        chosen = values if is_mask else _bits(values) != 0
        coding, listed = codings.shortest(chosen)
        if not is_mask and _size(coding, values) >= _size(dense, values):
            coding, chosen = dense, None
    elif part.chosen is None and not is_mask:
        coding, chosen = dense, None
    else:
        chosen = values if part.chosen is None else part.chosen
        if part.known is not None:
            chosen = chosen[part.known]
        n = values.size if num_known is None else num_known
        coding = codings.counted(n, int(np.count_nonzero(chosen)))
    num_scales = 0 if part.scales is None else len(part.scales)
    made = Plan(name, values.dtype, values.shape, num_known, coding, part.level_bits, num_scales)
    return made, _Work(values, part.known, chosen, listed, part.scales)


class _Work(NamedTuple):
    """What of a tensor is to be written: marked entries among those that may travel."""

    values: np.ndarray
    known: np.ndarray | None
    chosen: np.ndarray | None
    listed: np.ndarray | None
    scales: np.ndarray | None


def _arrays(name: str, part: Part) -> Part:
    """Make arrays of what a tensor is given as, such as nested lists."""
    values = _array(name, part.values)
    known = None if part.known is None else _array(name, part.known)
    if part.chosen is None or part.chosen is part.values:
        return part._replace(
            values=values, known=known, chosen=None if part.chosen is None else values
        )
    return part._replace(values=values, known=known, chosen=_array(name, part.chosen))


def _array(name: str, given: np.ndarray) -> np.ndarray:
    """Make an array of values or of a mask, or say why there is none."""
    if np.ma.is_masked(given):
        raise ValueError(f"{name}: an array has masked values, which do not travel: fill them.")
    try:
        return np.asarray(given)
    except (ValueError, TypeError):  # rows of several lengths, a key, a value that is being traced
        raise ValueError(
            f"{name}: an array of numbers or booleans is needed, or lists whose rows have one "
            f"length, got {type(given).__name__}."
        ) from None


def _bits(values: np.ndarray) -> np.ndarray:
    """See numbers as the integers of their bits, so that no NaN and no -0.0 is lost."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").reshape(values.shape)


def _size(coding: Coding, values: np.ndarray) -> int:
    """Count the bytes of a plain tensor that depend on its coding."""
    marked = codings.num_marked(coding, values.size)
    return codings.total_bytes(coding, values.size, values.shape) + marked * values.dtype.itemsize


def _payload(plan: Plan, work: _Work) -> list[bytes | memoryview]:
    """Write positions, scales and values of a tensor."""
    pieces: list[bytes | memoryview] = []
    if work.chosen is not None:
        pieces.extend(codings.write(plan.coding, work.chosen, work.listed))
    if plan.dtype == headers.BOOL:
        return pieces
    sent = _bits(work.values).reshape(-1)
    if work.known is not None:
        sent = sent[np.flatnonzero(work.known)]
    if work.chosen is not None and plan.coding.code != codings.ALL:
        is_listed = work.listed is not None and not plan.coding.complement
        sent = sent[work.listed if is_listed else np.flatnonzero(work.chosen)]
    if plan.level_bits:
        scales = b"" if work.scales is None else work.scales.astype("<f4").tobytes()
        return [*pieces, scales, packing.pack(sent, plan.level_bits)]
    return [*pieces, sent.astype(sent.dtype.newbyteorder("<"), copy=False).view(np.uint8).data]


def _known_mask(plan: Plan, known: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Look up the mask under which a tensor was sent."""
    if plan.num_known is None:
        return None
    try:
        mask = np.asarray(known.get(plan.name))
    except (ValueError, TypeError):
        mask = np.asarray(None)
    if mask.dtype != np.bool_ or mask.shape != plan.shape:
        raise WireError(f"{plan.name!r} needs a known bool mask of the shape {plan.shape}.")
    if int(np.count_nonzero(mask)) != plan.num_known:
        raise WireError(f"{plan.name!r} was sent under another mask than the known one.")
    return mask


def _crc_known(mask: np.ndarray | None, digest: int) -> int:
    """Let a known mask into the checksum, so that no message is read under another one."""
    return digest if mask is None else zlib.crc32(np.packbits(mask).data, digest)


def _before(plans: Sequence[Plan]) -> list[str]:
    """Give the name before each, from which its own is decoded."""
    return ["", *(plan.name for plan in plans)][: len(plans)]
