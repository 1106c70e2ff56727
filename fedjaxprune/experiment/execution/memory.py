"""How much memory is free."""

import math
import pathlib

import jax

CGROUPS = pathlib.Path("/sys/fs/cgroup")
_LIMITS = (  # of a container, by version 2 and 1 of Linux's control groups
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def free_bytes() -> float | None:
    """Find how much memory a device has left; None where nobody says."""
    said = jax.local_devices()[0].memory_stats()
    if said and "bytes_limit" in said:
        return said["bytes_limit"] - said.get("bytes_in_use", 0)
    return free_host_bytes()


def free_host_bytes() -> float | None:
    """Find how much memory the host has left; None where nobody says."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return min(1024.0 * int(kib), room_in_container(CGROUPS), _room_under_limits())
    except (OSError, ValueError, StopIteration):
        return None


def _room_under_limits() -> float:
    """Find how much more this process may take by its own limits (``ulimit -v`` and ``-d``)."""
    import resource  # there is none on Windows, where `/proc` is missing, too

    lines = pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    taken = dict(line.split(":", 1) for line in lines)
    room = math.inf
    for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            room = min(room, most - 1024.0 * int(taken[name].split()[0]))
    return room


def room_in_container(root: pathlib.Path) -> float:
    """Find how much more a container lets its processes have; one that takes more is killed.

    Pages of files that nobody reads any more do not count as taken.
    """
    for limit, taken, facts, idle in _LIMITS:
        try:
            most = (root / limit).read_text(encoding="ascii").strip()
            if most == "max":
                return math.inf
            used = int((root / taken).read_text(encoding="ascii"))
            lines = (root / facts).read_text(encoding="ascii").splitlines()
            free = next(int(line.split()[1]) for line in lines if line.startswith(f"{idle} "))
            return float(int(most) - used + free)
        except (OSError, ValueError, StopIteration):
            continue
    return math.inf
