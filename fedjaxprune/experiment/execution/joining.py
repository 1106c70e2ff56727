"""How a process becomes one of several that run together: they meet, and start JAX's runtime."""

import contextlib
import functools
import importlib.metadata
import os
import socket
import sys
from typing import Any, NamedTuple

import numpy as np

from fedjaxprune import __version__
from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.execution import last_words, meeting
from fedjaxprune.experiment.execution.channel import Channel
from fedjaxprune.experiment.execution.processes import (
    ALONE,
    HEARTBEAT_S,
    Processes,
    at_work,
    decided,
    wait_for_all,
)
from fedjaxprune.experiment.folder import failure

_WAIT_S = 300.0  # until all processes have come
_JAX_HEARTBEATS = 3  # of ours in one of JAX's service, so that ours is first
_SHUTDOWN_S = 3600  # that the first process to end waits for the last one
_AUTO = "auto"


class Membership(NamedTuple):
    """How a process takes part in a run of several.

    Attributes:
      coordinator: ``"HOST:PORT"`` of process 0, whose next port is used as well, or ``"auto"``.
      num_processes: how many there are; None with ``"auto"``.
      process_id: which one this is, from 0; None with ``"auto"``.
      heartbeat_s: how long a process may be silent before the others give it up, seconds.
      local_devices: accelerators of the machine that are this process's; None for all.
    """

    coordinator: str
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_s: float = HEARTBEAT_S
    local_devices: tuple[int, ...] | None = None


def membership(
    coordinator: str | None, num_processes: int | None, process_id: int | None, heartbeat_s: float
) -> Membership | None:
    """Make a membership of what was given; None where no coordinator was."""
    if coordinator is not None:
        return Membership(coordinator, num_processes, process_id, heartbeat_s)
    given = {"num_processes": num_processes, "process_id": process_id}
    if unused := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"{unused[0]} needs a coordinator, HOST:PORT or auto.")
    return None


def join(membership: Membership | None) -> Processes:
    """Meet the other processes and start JAX's runtime with them; once in a process.

    Raises:
      ConfigError: the processes do not fit together or did not all come, or JAX is in use already.
    """
    if membership is not None:
        return _join(_found(membership))
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1:
        raise ConfigError(
            f"JAX runs in {jax.process_count()} processes here: give coordinator, num_processes "
            "and process_id, so that they make one run."
        )
    return ALONE


def _found(membership: Membership) -> Membership:
    """Fill in what the environment says, and check what was given."""
    if membership.coordinator == _AUTO:
        membership = _detected(membership)
    number, index, heartbeat_s = membership[1:4]
    if number is None or index is None:
        raise ConfigError("coordinator HOST:PORT needs num_processes and process_id, too.")
    for name, value in {"num_processes": number, "process_id": index}.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ConfigError(f"{name} must be a whole number, got {value!r}.")
    if isinstance(heartbeat_s, bool) or not isinstance(heartbeat_s, int | float | np.number):
        raise ConfigError(f"heartbeat must be a number of seconds, got {heartbeat_s!r}.")
    if number < 1:
        raise ConfigError(f"num_processes must be at least 1, got {number}.")
    if not 0 <= index < number:
        raise ConfigError(f"process_id must be in [0, {number - 1}], got {index}.")
    if not 1.0 <= heartbeat_s <= 3600.0:
        raise ConfigError(f"heartbeat must be between 1 and 3600 seconds, got {heartbeat_s:g}.")
    meeting.place_of(membership.coordinator)
    return membership._replace(num_processes=int(number), process_id=int(index))


def _detected(membership: Membership) -> Membership:
    """Ask JAX where SLURM, Open MPI, Kubernetes or a TPU pod says that the processes are."""
    _, number, index, _, local = membership
    try:
        from jax._src import clusters  # what `jax.distributed.initialize()` asks

        where, number, index, local = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), number, index, local, None, int(_WAIT_S)
        )
    except Exception as error:
        raise ConfigError(
            f"coordinator auto found no processes ({failure.describe(error)}): give coordinator "
            "HOST:PORT, num_processes and process_id."
        ) from None
    if where is None:
        raise ConfigError(
            "coordinator auto found neither SLURM, Open MPI, Kubernetes nor a TPU pod: give "
            "coordinator HOST:PORT, num_processes and process_id."
        )
    return membership._replace(
        coordinator=where,
        num_processes=number,
        process_id=index,
        local_devices=None if local is None else tuple(local),
    )


@functools.cache
def _join(membership: Membership) -> Processes:
    number, index = membership.num_processes, membership.process_id
    assert number is not None
    assert index is not None
    if number == 1:
        return ALONE
    place = meeting.place_of(membership.coordinator)
    names = ("jax", "jaxlib", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    caller = meeting.Caller(index, number, {"fedjaxprune": __version__, **versions})
    links = meeting.meet(place, caller, wait_s=_WAIT_S)
    channel = Channel(links, process=index, heartbeat_s=membership.heartbeat_s)
    joined = Processes(index, number, channel, membership.heartbeat_s)
    with at_work(joined, lambda: None):
        _start_jax(joined, place, membership.local_devices)
    return joined


def _start_jax(
    joined: Processes, place: meeting.Place, local_devices: tuple[int, ...] | None
) -> None:
    """Start JAX's distributed runtime, with its service beside process 0's channel."""
    import jax

    port = decided(joined, lambda: _free_port(place))
    service = meeting.Place(place.host, port)
    if jax.distributed.is_initialized():
        if (jax.process_index(), jax.process_count()) != joined[:2]:
            raise ConfigError(
                f"JAX has process_id {jax.process_index()} of {jax.process_count()} here, got "
                f"{joined.process} of {joined.number}."
            )
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Two programs at work would mix up their messages: gloo has one order for all.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # It would hear SIGTERM, which ends the run after a round that all agree on.
    jax.config.update("jax_enable_preemption_service", False)
    local = place.host in ("localhost", "127.0.0.1", "::1")
    heartbeat_s = max(10, round(_JAX_HEARTBEATS * joined.heartbeat_s))
    try:
        jax.distributed.initialize(
            str(service),
            joined.number,
            joined.process,
            local_device_ids=local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(_WAIT_S),
            heartbeat_timeout_seconds=heartbeat_s,
            shutdown_timeout_seconds=_SHUTDOWN_S,
            coordinator_bind_address=str(service) if local else None,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"JAX's processes could not be started ({failure.describe(error)}); in Python they "
            "are started before JAX is first used."
        ) from None


def _free_port(place: meeting.Place) -> int:
    """Find a port for JAX's service: the next one if it is free."""
    for port in (place.port + 1, 0):
        with contextlib.suppress(OSError, OverflowError), socket.create_server(("", port)) as one:
            return one.getsockname()[1]
    raise ConfigError(f"process 0 has no free port beside {place}.")


def connect(processes: Processes, mesh: Any) -> None:
    """Open the connections between the devices of all processes while all are here.

    A first collective does it, and waits for half a minute only; later ones wait for a process
    that compiles or writes.
    """
    if processes.channel is None:
        return
    import jax
    from jax.sharding import PartitionSpec

    from fedjaxprune.experiment.execution import placing

    (axis,) = mesh.axis_names
    one = placing.place(np.float32(1.0), mesh)
    spec = PartitionSpec()
    count = jax.jit(
        jax.shard_map(lambda x: jax.lax.psum(x, axis), mesh=mesh, in_specs=spec, out_specs=spec)
    )
    with last_words.without_stdout():  # gloo writes there
        compiled = count.lower(one).compile()
        wait_for_all(processes)
        jax.block_until_ready(compiled(one))
