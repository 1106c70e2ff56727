"""Where a run keeps the clients' examples and their rows: on the device while both fit there."""

from typing import NamedTuple

import jax
import numpy as np

from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.config.sections import RunConfig
from fedjaxprune.experiment.execution import memory

_ROOM = 0.6  # of the memory that is free, as a round needs more
_COPIES = 2  # of the rows on a device, as a checkpoint makes one
_GIB = 2**30


class Sizes(NamedTuple):
    """Bytes of what a run keeps: the clients' examples, and the rows of all clients."""

    examples: int
    rows: int


class Places(NamedTuple):
    """Where they are, and a sentence about it; empty where all is on the device."""

    examples: str
    rows: str
    sentence: str


def choose(config: RunConfig, sizes: Sizes) -> Places:
    """Choose by the memory that is free what the config leaves open (``"auto"``).

    Of several processes each has a share of the rows that are not on devices.
    """
    section = config.execution
    free, on_host = memory.free_bytes(), memory.free_host_bytes()
    number = section.devices if isinstance(section.devices, int) else 1
    # The devices of a CPU share its memory, and each has all examples and rows.
    count = jax.process_count()
    each = -(-number // count) if jax.default_backend() == "cpu" else 1
    room = np.inf if free is None else _ROOM * free / each
    examples, rows = section.examples, section.client_rows
    needed = _COPIES * sizes.rows if rows in ("auto", "device") else 0
    if examples == "auto":
        fits = sizes.examples + needed <= room
        # Rows are read and written, so that examples leave first.
        fits = fits or (rows == "auto" and sizes.examples < needed and sizes.examples <= room / 2)
        examples = "device" if fits else "host"
    if rows == "auto":
        taken = sizes.examples if examples == "device" else 0
        rows = "device" if taken + needed <= room else "host"
        if rows == "host" and on_host is not None and sizes.rows > count * _ROOM * on_host:
            rows = "disk"
    return Places(examples, rows, _sentence(examples, rows, sizes, free))


def check_round(config: RunConfig, name: str, num_bytes: int) -> None:
    """Refuse a stage whose rounds are fed more than the device has room for.

    Args:
      config: of the run.
      name: of the stage.
      num_bytes: that a round is fed.

    Raises:
      ConfigError: two rounds' do not fit, as one is fed while the other runs.
    """
    free = memory.free_bytes()
    if free is not None and 2 * num_bytes > free:
        raise ConfigError(
            f"a round of the stage {name!r} of {config.method.name!r} is fed {_gib(num_bytes)} of "
            f"examples and clients' rows, and two of them do not fit in the {_gib(free)} of memory "
            "that are free: take a smaller federation.cohort_size, or other settings where the "
            "stage asks all clients."
        )


def _sentence(examples: str, rows: str, sizes: Sizes, free: float | None) -> str:
    """Say what is not on the device, and why."""
    away = []
    if examples != "device":
        away.append(f"{_gib(sizes.examples)} of examples stay in host memory or in their files")
    if rows != "device":
        where = "in host memory" if rows == "host" else "in files of the run folder"
        away.append(f"{_gib(sizes.rows)} of clients' rows stay {where}")
    if not away:
        return ""
    left = "" if free is None else f", where {_gib(free)} are free"
    return f"{' and '.join(away)}; cohorts are fed to the device one round ahead{left}."


def _gib(num_bytes: float) -> str:
    """Write a number of bytes."""
    return f"{num_bytes / _GIB:,.2f} GiB" if num_bytes >= _GIB / 100 else f"{num_bytes:,.0f} bytes"
