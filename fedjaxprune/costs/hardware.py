"""Modeled time: what the clients' devices can do, and how long a round would take them.

A part of the kind ``hardware`` gives a table of the clients' devices. The seconds of a client are
those of its messages, whose bits the ledger counts, and of its arithmetic, whose FLOPs the record
counts; a round takes as long as its slowest client. Memory, latency and the server's own time are
not modeled.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic

from fedjaxprune.registry import Part
from fedjaxprune.settings import NonNegative, Positive, Settings, setting
from fedjaxprune.traffic import ClientBits

_MEGABIT = 1e6
_GIGAFLOP = 1e9


class Device(NamedTuple):
    """What a device can do.

    Attributes:
      gflops_per_second: billions of floating-point operations a second in training.
      up_mbit_per_second: to the server.
      down_mbit_per_second: from the server.
    """

    gflops_per_second: float
    up_mbit_per_second: float
    down_mbit_per_second: float


# The first is inferred: PruneFL's published times of a Raspberry Pi are 5.56e-6 s for 64 bits of a
# weight both ways, and about 2e-9 s for a multiply-add with its two of the backward pass. The
# others are round numbers of their class, measured by nobody.
DEVICES: Mapping[str, Device] = {
    "raspberry_pi": Device(3.0, 11.5, 11.5),
    "phone": Device(20.0, 10.0, 50.0),
    "laptop": Device(200.0, 20.0, 100.0),
    "workstation": Device(10_000.0, 1_000.0, 1_000.0),
}


class Hardware(NamedTuple):
    """The devices of all clients, ``[N]`` float64 each.

    Attributes:
      flops_per_second: floating-point operations a second.
      up_bits_per_second: to the server.
      down_bits_per_second: from the server.
    """

    flops_per_second: np.ndarray
    up_bits_per_second: np.ndarray
    down_bits_per_second: np.ndarray


class Time(NamedTuple):
    """How long a round takes, modeled.

    Attributes:
      seconds: of the slowest client, which receives, computes and sends in turn.
      overlapped_seconds: the same if the three went on at once, so that the longest counts.
      slowest_client: id of the first; None if nobody took part.
    """

    seconds: float
    overlapped_seconds: float
    slowest_client: int | None


def of_devices(devices: Sequence[Device]) -> Hardware:
    """Make the table of clients from their devices."""
    table = np.array(devices, np.float64).reshape(-1, len(Device._fields))
    return Hardware(_GIGAFLOP * table[:, 0], _MEGABIT * table[:, 1], _MEGABIT * table[:, 2])


def check(hardware: Any, num_clients: int) -> Hardware:
    """Check a table against the number of clients.

    Raises:
      ValueError: it is no `Hardware`, or a field has not one positive finite number for each.
    """
    if not isinstance(hardware, Hardware):
        raise ValueError(f"the hardware must be a Hardware, got a {type(hardware).__name__}.")
    made = []
    for name, values in hardware._asdict().items():
        array = np.asarray(values, np.float64)
        if array.shape != (num_clients,):
            raise ValueError(
                f"{name} of the hardware must have the shape [{num_clients}], a number for each "
                f"client, got {list(array.shape)}."
            )
        wrong = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
        if len(wrong):
            raise ValueError(
                f"{name} of the hardware must be positive and finite, got {array[wrong[0]]} for "
                f"client {wrong[0]}."
            )
        made.append(array)
    return Hardware(*made)


def time_of_round(
    hardware: Hardware, clients: Sequence[ClientBits], *, flops: float, work: np.ndarray
) -> Time:
    """Model how long a round takes.

    Args:
      hardware: of the clients.
      clients: what each sent and received (`Traffic.clients`); one that sent nothing dropped out,
        and nobody waits for it.
      flops: of all clients together; they divide them as their `work`.
      work: ``[N]``, examples that a client passes over in a round.

    Returns:
      the modeled time; zero where nobody took part.
    """
    bits = [
        (client, entry.uplink_bits, entry.downlink_bits)
        for entry in clients
        if entry.uplink_bits
        for client in entry.client_ids
    ]
    if not bits:
        return Time(0.0, 0.0, None)
    ids, up, down = (np.array(column, np.int64) for column in zip(*bits, strict=True))
    total = float(work[ids].sum())
    own = flops * work[ids] / total if total > 0 else np.zeros(len(ids))
    parts = np.stack(
        [
            down / hardware.down_bits_per_second[ids],
            own / hardware.flops_per_second[ids],
            up / hardware.up_bits_per_second[ids],
        ]
    )
    seconds = parts.sum(axis=0)
    slowest = np.lexsort((ids, -seconds))[0]
    return Time(float(seconds[slowest]), float(parts.max()), int(ids[slowest]))


class SameSettings(Settings):
    """Settings of devices that are all alike."""

    gflops_per_second: Positive = setting(
        DEVICES["phone"].gflops_per_second, "Arithmetic of a device in training.", unit="GFLOP/s"
    )
    up_mbit_per_second: Positive = setting(
        DEVICES["phone"].up_mbit_per_second, "From a device to the server.", unit="Mbit/s"
    )
    down_mbit_per_second: Positive = setting(
        DEVICES["phone"].down_mbit_per_second, "From the server to a device.", unit="Mbit/s"
    )


class SpreadSettings(SameSettings):
    """Settings of devices that differ; those of `SameSettings` are medians."""

    spread: NonNegative = setting(
        0.5, "Standard deviation of the logarithm of each number.", unit="natural logarithm"
    )


class MixedSettings(Settings):
    """Settings of devices of several classes."""

    classes: Annotated[tuple[str, ...], pydantic.Field(min_length=1)] = setting(
        tuple(DEVICES),
        f"Classes, each as likely, one that is named twice twice: {', '.join(DEVICES)}.",
        unit="",
    )

    @pydantic.field_validator("classes")
    @classmethod
    def _check(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        for name in classes:
            if name not in DEVICES:
                raise ValueError(f"must be of {', '.join(DEVICES)}, got {name!r}.")
        return classes


def same(device: Device, num_clients: int) -> Hardware:
    """Give every client the same device."""
    return of_devices([device] * num_clients)


def spread(
    device: Device, num_clients: int, *, rng: np.random.Generator, spread: float
) -> Hardware:
    """Draw each number of each client from a log-normal distribution around that of a device."""
    factors = np.exp(spread * rng.standard_normal((num_clients, len(Device._fields))))
    return of_devices([Device(*row) for row in (np.asarray(device) * factors).tolist()])


def mixed(classes: Sequence[str], num_clients: int, *, rng: np.random.Generator) -> Hardware:
    """Draw each client's device from classes of `DEVICES`."""
    drawn: list[int] = rng.integers(len(classes), size=num_clients).tolist()
    return of_devices([DEVICES[classes[number]] for number in drawn])


def _median(settings: Any) -> Device:
    return Device(*(getattr(settings, name) for name in Device._fields))


PARTS = {
    "none": Part(lambda settings, **_: None, summary="times are not modeled"),
    "same": Part(
        lambda settings, *, num_clients, rng: same(_median(settings), num_clients),
        SameSettings,
        summary="all clients have the same device",
    ),
    "spread": Part(
        lambda settings, *, num_clients, rng: spread(
            _median(settings), num_clients, rng=rng, spread=settings.spread
        ),
        SpreadSettings,
        summary="log-normal around one device",
    ),
    "mixed": Part(
        lambda settings, *, num_clients, rng: mixed(settings.classes, num_clients, rng=rng),
        MixedSettings,
        summary="each client's device is drawn from classes",
    ),
}
