"""Which devices share the clients of a round."""

import collections
import contextlib
import os
import pathlib
import platform
from typing import Any

from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.config import resolve as resolve_lib
from fedjaxprune.experiment.config.sections import RunConfig


def num_cores() -> int:
    """Count the cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def processor() -> str:
    """Name the kind of processor, which JAX calls no more than a cpu."""
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = next(line for line in lines if line.startswith("model name"))
        return found.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def wanted(config: RunConfig, *, num_processes: int = 1, process: int = 0) -> int:
    """Say how many devices a run wants of a CPU: one a core, at most one a client of a round.

    Of several processes each has its share of them.
    """
    given, size = config.execution.devices, config.federation.cohort_size
    number = num_processes * num_cores() if given == "auto" else given
    number = number if size is None else min(number, size * config.execution.model_devices)
    return max(1, _share(number, num_processes, process))


def _share(number: int, num_processes: int, process: int) -> int:
    """Deal devices out to processes: shares that differ by one at most."""
    return number // num_processes + (process < number % num_processes)


def prepare(config: RunConfig, *, num_processes: int = 1, process: int = 0) -> None:
    """Make a CPU as many devices as a run wants, unless JAX is in use already."""
    import jax

    with contextlib.suppress(RuntimeError):  # JAX is in use already, with devices of its own
        number = wanted(config, num_processes=num_processes, process=process)
        jax.config.update("jax_num_cpu_devices", number)


def resolve(config: RunConfig) -> RunConfig:
    """Fill in the number of devices of all processes; a chunk is at most the cohort."""
    import jax

    count = jax.process_count()
    # A process with more devices than another one uses no more of them.
    here = count * min(collections.Counter(d.process_index for d in jax.devices()).values())
    cohort, shared = config.federation.cohort_size or 1, config.execution.model_devices
    given, chunk = config.execution.devices, config.execution.chunk_size
    if given != "auto" and min(given, cohort * shared) > jax.device_count():
        raise ConfigError(
            f"execution.devices must be at most {jax.device_count()}, the number of "
            f"{jax.default_backend()} devices here, got {given}."
        )
    for name, value in {"execution.devices": given, "federation.cohort_size": cohort}.items():
        if value != "auto" and value < count:
            raise ConfigError(
                f"{name} must be at least {count}, one for each process, got {value}."
            )
    is_alone = count == 1 and jax.default_backend() == "cpu"
    most = num_cores() if is_alone else here
    most = most if given == "auto" else given
    number = min(most, cohort * shared)
    number = min(number, here) if given == "auto" else number
    if shared > 1:
        number = _shared(number, shared, given)
    return resolve_lib.replace(
        config,
        {
            "execution.devices": number,
            "execution.chunk_size": chunk if chunk == "auto" else min(chunk, cohort),
        },
    )


def _shared(number: int, shared: int, given: Any) -> int:
    """Take as many devices as can be divided into groups that share a model."""
    import jax

    if jax.process_count() > 1:
        raise ConfigError(
            f"execution.model_devices must be 1 in a run of several processes, got {shared}."
        )
    if number < shared or (given != "auto" and given % shared):
        raise ConfigError(
            f"execution.model_devices must divide execution.devices ({number} here), got {shared}."
        )
    return number - number % shared


def chosen(number: int) -> list[Any]:
    """Choose so many devices, as many of one process as of another, in the order of processes."""
    import jax

    count = jax.process_count()
    if count == 1:
        return jax.devices()[:number]
    found = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    devices = []
    for process in range(count):
        own = [device for device in found if device.process_index == process]
        share = _share(number, count, process)
        if len(own) < share:
            raise ConfigError(
                f"execution.devices {number} takes {share} devices of process {process}, which "
                f"has {len(own)}: give at most {count * len(own)}."
            )
        devices += own[:share]
    return devices


def of_this_process(mesh: Any) -> Any:
    """Make a mesh of those devices of a mesh that are this process's; None for one device."""
    from fedjaxprune.federated import cohort

    if mesh is None or not mesh.is_multi_process:
        return mesh
    own = [device for device in mesh.devices.flat if device in set(mesh.local_devices)]
    return cohort.make_mesh(devices=own) if len(own) > 1 else None
