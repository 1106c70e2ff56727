"""Fuzz the decoder of the wire format, guided by coverage.

    pip install -e '.[fuzz]'
    python tests/fuzz_wire_guided.py -max_total_time=600 -max_len=512 FINDINGS tests/corpus/wire

New inputs go to the folder FINDINGS, which must be there. What is a finding is said in
`tests/fuzz_wire.py`, which is many times as fast and needs nothing; here memory is measured for
each input. `tests/test_wire.py` decodes the corpus in every test run.
"""

import pathlib
import sys
import tracemalloc

import atheris  # pyright: ignore[reportMissingModuleSource, reportMissingImports]

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
with atheris.instrument_imports(  # pyright: ignore[reportAttributeAccessIssue]
    include=["fedjaxprune.wire"]
):
    from tests import fuzz_wire

WORK = 16 << 20  # bytes that reading takes beside what a message declares


def one_input(data: bytes) -> None:
    """Decode one input."""
    tracemalloc.reset_peak()
    begin = tracemalloc.get_traced_memory()[0]
    fuzz_wire.try_one(data[:-4] + bytes(4))
    grown = tracemalloc.get_traced_memory()[1] - begin
    if grown > 4 * fuzz_wire.SMALL + WORK:
        raise MemoryError(f"{grown} bytes for an input of {len(data)}")


if __name__ == "__main__":
    tracemalloc.start()
    with fuzz_wire.checksum_ignored():
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()
