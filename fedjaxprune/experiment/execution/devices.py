"""Which devices share the clients of a round."""

import contextlib
import os
import pathlib
import platform

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


def wanted(config: RunConfig) -> int:
    """Say how many devices a run wants of a CPU: one a core, at most one a client of a round."""
    given, size = config.execution.devices, config.federation.cohort_size
    number = num_cores() if given == "auto" else given
    return number if size is None else min(number, size)


def prepare(config: RunConfig) -> None:
    """Make a CPU as many devices as a run wants, unless JAX is in use already."""
    import jax

    with contextlib.suppress(RuntimeError):  # JAX is in use already, with devices of its own
        jax.config.update("jax_num_cpu_devices", wanted(config))


def resolve(config: RunConfig) -> RunConfig:
    """Fill in the number of devices; a chunk is at most the cohort."""
    import jax

    here, cohort = jax.device_count(), config.federation.cohort_size or 1
    given, chunk = config.execution.devices, config.execution.chunk_size
    if given != "auto" and min(given, cohort) > here:
        raise ConfigError(
            f"execution.devices must be at most {here}, the number of {jax.default_backend()} "
            f"devices here, got {given}."
        )
    most = num_cores() if given == "auto" and jax.default_backend() == "cpu" else here
    number = most if given == "auto" else given
    return resolve_lib.replace(
        config,
        {
            "execution.devices": min(number, cohort, here),
            "execution.chunk_size": chunk if chunk == "auto" else min(chunk, cohort),
        },
    )
