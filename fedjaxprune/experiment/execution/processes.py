"""The processes of one run: how this one takes part, what all agree on, and how they end.

All processes run the same code on the same config, and the devices of all share the clients of a
round. Process 0 alone decides what may differ (the folder's name, the chunk size, which checkpoint
is continued), writes the run folder and tells how the run goes. JAX is imported by `join` only.
"""

import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fedjaxprune import __version__
from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.execution import last_words, meeting, stopping
from fedjaxprune.experiment.execution.channel import FAILED, Channel, Loss, ProcessLost
from fedjaxprune.experiment.folder import failure, layout

HEARTBEAT_S = 20.0
_WAIT_S = 300.0  # until all processes have come
_JAX_HEARTBEATS = 3  # of ours in one of JAX's service, so that ours is first
_SHUTDOWN_S = 3600  # that the first process to end waits for the last one
_LEAVING_S = 10.0  # that all may take to leave if one fails
_GRACE_S = 2.0  # that a process has to find the error by itself that another one reports
_AUTO = "auto"

Stop = Callable[[], bool]


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


class Processes(NamedTuple):
    """The processes of a run, seen from one of them.

    Attributes:
      index: which one this is; 0 writes the folder.
      count: how many there are.
      channel: to the others; None if there are none.
      heartbeat_s: as `Membership` has it.
    """

    index: int = 0
    count: int = 1
    channel: Channel | None = None
    heartbeat_s: float = HEARTBEAT_S

    @property
    def is_first(self) -> bool:
        """Tell whether this is process 0."""
        return self.index == 0


ALONE = Processes()


def decided(processes: Processes, decide: Callable[[], Any]) -> Any:
    """Let process 0 decide something that JSON can tell, and give it to all."""
    if processes.channel is None:
        return decide()
    data = json.dumps(decide()).encode() if processes.is_first else b""
    return json.loads(processes.channel.share(data))


def shared_arrays(processes: Processes, arrays: Any, like: Any) -> Any:
    """Give all processes the arrays of process 0, a tree like `like`, which the others give.

    Each leaf becomes an array of the host, and keeps its bits.
    """
    import jax

    if processes.channel is None:
        return arrays
    leaves, treedef = jax.tree.flatten(like)
    found = jax.tree.leaves(arrays) if processes.is_first else leaves
    received = []
    for leaf, shape in zip(found, leaves, strict=True):
        data = np.ascontiguousarray(leaf).tobytes() if processes.is_first else b""
        array = np.frombuffer(processes.channel.share(data), shape.dtype)
        received.append(array.reshape(shape.shape))
    return jax.tree.unflatten(treedef, received)


def check_same(processes: Processes, values: Mapping[str, Any], *, advice: str) -> None:
    """See that all processes have the same values by name, which JSON can tell.

    Raises:
      ConfigError: on all processes, with `advice`, if one has others.
    """
    if processes.channel is None:
        return
    gathered = processes.channel.gather(json.dumps(values).encode())
    each = [json.loads(one) for one in gathered]

    def difference() -> str:
        for index, theirs in enumerate(each):
            for name in {**values, **theirs}:
                if theirs.get(name) != values.get(name):
                    return (
                        f"process {index} has {name} {theirs.get(name)!r} and process 0 has "
                        f"{values.get(name)!r}: {advice}."
                    )
        return ""

    if sentence := decided(processes, difference):
        raise ConfigError(sentence)


def wait_for_all(processes: Processes) -> None:
    """Wait until all processes are here."""
    if processes.channel is not None:
        processes.channel.gather(b"")
        processes.channel.share()


def together(processes: Processes, stop: Stop, heard: Callable[[], object]) -> Stop:
    """Make `stop` say the same on all processes in the same round, and call `heard` if it does.

    All processes must call this before they next wait for each other.
    """
    if processes.channel is None:
        return stop
    agreed = stopping.together(processes.channel, stop)

    def stop_fn() -> bool:
        is_over = agreed()
        if is_over:
            heard()
        return is_over

    return stop_fn


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
    if number < 1:
        raise ConfigError(f"num_processes must be at least 1, got {number}.")
    if not 0 <= index < number:
        raise ConfigError(f"process_id must be in [0, {number - 1}], got {index}.")
    if not 1.0 <= heartbeat_s <= 3600.0:
        raise ConfigError(f"heartbeat must be between 1 and 3600 seconds, got {heartbeat_s:g}.")
    meeting.place_of(membership.coordinator)
    return membership


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
    assert number is not None and index is not None
    if number == 1:
        return ALONE
    place = meeting.place_of(membership.coordinator)
    names = ("jax", "jaxlib", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    caller = meeting.Caller(index, number, {"fedjaxprune": __version__, **versions})
    links = meeting.meet(place, caller, wait_s=_WAIT_S)
    channel = Channel(links, index=index, heartbeat_s=membership.heartbeat_s)
    joined = Processes(index, number, channel, membership.heartbeat_s)
    try:
        _start_jax(joined, place, membership.local_devices)
    except BaseException as error:
        channel.tell("failed", why=failure.describe(error))
        raise
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
                f"{joined.index} of {joined.count}."
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
            joined.count,
            joined.index,
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


@contextlib.contextmanager
def at_work(processes: Processes, place: Callable[[], pathlib.Path | None]) -> Iterator[None]:
    """End this process if another one is gone; if this one fails, let the others know.

    Args:
      processes: of the run.
      place: gives the run's folder, once it is known.
    """
    channel = processes.channel
    if channel is None:
        yield
        return
    is_over, lock = threading.Event(), threading.Lock()

    def end(loss: Loss) -> None:
        """Leave, from another thread, unless this process ends by itself."""
        if loss.how == FAILED and is_over.wait(_GRACE_S):
            return
        with lock:
            if is_over.is_set():
                return
            folder = place()
            has_begun = folder is not None and (folder / layout.CONFIG).exists()
            after = (
                f"continue with `fedjaxprune run --resume {folder}` on any number of processes"
                if has_begun
                else "the run had not begun"
            )

            def mark() -> None:
                if has_begun and folder is not None and (processes.is_first or loss.index == 0):
                    failure.mark(folder, loss.sentence)

            if loss.how == FAILED:
                _shut_down()
            last_words.leave(f"stopped: {loss.sentence}; {after}.", mark)

    with last_words.before_aborts(processes.heartbeat_s):
        channel.watch(end)
        try:
            yield
            wait_for_all(processes)
        except BaseException as error:
            if isinstance(error, ProcessLost) or _is_of_collective(error):
                is_over.wait(processes.heartbeat_s)  # `end` knows who is gone, or will
            with lock:
                is_over.set()
            channel.tell("failed", why=failure.describe(error))
            if not _shut_down():
                last_words.leave(f"error: {failure.describe(error)}", lambda: None)
            raise
        finally:
            channel.watch(None)


def _is_of_collective(error: BaseException) -> bool:
    """Tell whether an error may be what a lost connection looks like to a collective."""
    words = ("gloo", "nccl", "collective", "connection", "peer", "coordination", "rendezvous")
    return any(word in str(error).lower() for word in words)


def _shut_down() -> bool:
    """Leave JAX's runtime in good order, as all processes do if one fails; False if some do not."""
    import jax

    def leave() -> None:
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()

    leaving = threading.Thread(target=leave, daemon=True)
    leaving.start()
    leaving.join(_LEAVING_S)
    return not leaving.is_alive()
