"""Fuzz the decoder of the wire format, guided by coverage.

    pip install -e '.[fuzz]'
    python tests/fuzz_wire.py -max_total_time=600 -max_len=512 FINDINGS tests/corpus/wire

New inputs go to the folder FINDINGS, which must be there. The checksum is taken for right here, so
that the fuzzer reaches what lies behind it. It is a finding if anything but `WireError` is raised,
if memory grows beyond a multiple of what may be declared, or if what was read back cannot be
written and read again. `tests/test_wire.py` decodes the corpus in every test run.
"""

import sys
import tracemalloc
import types
import zlib

import atheris  # pyright: ignore[reportMissingModuleSource, reportMissingImports]

with atheris.instrument_imports(  # pyright: ignore[reportAttributeAccessIssue]
    include=["fedjaxprune.wire"]
):
    from fedjaxprune.wire import format as wire_format
    from fedjaxprune.wire import packing

import numpy as np

MAX_BYTES = 1 << 14
BYTES_PER_DECLARED = 64  # positions are int64 numbers, and several arrays of them live at once
KNOWN = {
    "a": np.arange(35).reshape(5, 7) % 3 == 0,
    "b": np.ones([16], np.bool_),
    "c": np.zeros([2, 3], np.bool_),
}


def one_input(data: bytes) -> None:
    """Decode one input."""
    tracemalloc.reset_peak()
    begin = tracemalloc.get_traced_memory()[0]
    try:
        tensors = wire_format.decode(data[:-4] + bytes(4), known=KNOWN, max_bytes=MAX_BYTES)
    except packing.WireError:
        tensors = {}
    grown = tracemalloc.get_traced_memory()[1] - begin
    if grown > BYTES_PER_DECLARED * (MAX_BYTES + len(data)) + (1 << 18):
        raise MemoryError(f"{grown} bytes for an input of {len(data)}")
    plain = {name: value for name, value in tensors.items() if isinstance(value, np.ndarray)}
    again = wire_format.decode(wire_format.encode(plain)[:-4] + bytes(4))
    for name, value in plain.items():
        other = again[name]
        assert isinstance(other, np.ndarray)
        assert (value.tobytes(), value.shape) == (other.tobytes(), other.shape)


if __name__ == "__main__":
    wire_format.zlib = types.SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        crc32=lambda data, digest=0: 0,
        decompressobj=zlib.decompressobj,
        compress=zlib.compress,
        error=zlib.error,
    )
    tracemalloc.start()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
