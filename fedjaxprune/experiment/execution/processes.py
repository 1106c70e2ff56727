"""The processes of one run: what they agree on, and how they end.

All processes run the same code on the same config, and the devices of all share the clients of a
round. Process 0 alone decides what may differ (the folder's name, the chunk size, which checkpoint
is continued), writes the run folder and tells how the run goes. `joining` says how they begin.
"""

import contextlib
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fedjaxprune.errors import ConfigError, FedJaxPruneError
from fedjaxprune.experiment.execution import last_words, signals, stopping
from fedjaxprune.experiment.execution.channel import FAILED, HEARTBEAT_S, STOPPED, Channel, Loss
from fedjaxprune.experiment.folder import failure, layout

_LEAVING_S = 10.0  # that all may take to leave if one fails
_USAGE = 2  # exit status where something that was given cannot be used
_GRACE_S = 2.0  # that a process has to find the error by itself that another one reports
# What is said by a collective whose connection is lost.
_OF_LOSS = ("gloo", "nccl", "collective", "connection", "peer", "coordination", "rendezvous")

Stop = Callable[[], bool]


class Processes(NamedTuple):
    """The processes of a run, seen from one of them.

    Attributes:
      process: which one this is; 0 writes the folder.
      number: how many there are.
      channel: to the others; None if there are none.
      heartbeat_s: as `Membership` has it.
    """

    process: int = 0
    number: int = 1
    channel: Channel | None = None
    heartbeat_s: float = HEARTBEAT_S

    @property
    def is_first(self) -> bool:
        """Tell whether this is process 0."""
        return self.process == 0


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
        data = np.asarray(leaf).tobytes() if processes.is_first else b""
        data = processes.channel.share(data)
        empty = np.empty(shape.shape, shape.dtype)
        received.append(np.frombuffer(data, shape.dtype).reshape(shape.shape) if data else empty)
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
        ours = each[0]
        for process, theirs in enumerate(each):
            for name in {**ours, **theirs}:
                if theirs.get(name) != ours.get(name):
                    return (
                        f"process {process} has {name} {theirs.get(name)!r} and process 0 has "
                        f"{ours.get(name)!r}: {advice}."
                    )
        return ""

    if sentence := decided(processes, difference):
        raise ConfigError(sentence)


def wait_for_all(processes: Processes) -> None:
    """Wait until all processes are here."""
    if processes.channel is not None:
        processes.channel.gather(b"")
        processes.channel.share()


def together(processes: Processes, stop: Stop, heard: Callable[[], object] = lambda: None) -> Stop:
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
        if loss.how in (FAILED, STOPPED) and is_over.wait(_GRACE_S):
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
                is_ours = loss.process != processes.process and (
                    processes.is_first or loss.process == 0
                )
                if folder is None or not has_begun or not is_ours or loss.how == STOPPED:
                    return
                if not (folder / layout.SUMMARY).exists():  # else the run is finished
                    failure.mark(folder, loss.sentence)

            if loss.how in (FAILED, STOPPED):
                _shut_down()
            last_words.leave(f"stopped: {loss.sentence}; {after}.", mark, loss.status)

    with last_words.before_aborts(processes.heartbeat_s):
        channel.watch(end)
        try:
            yield
            wait_for_all(processes)
        except BaseException as error:
            _hear_out(channel, error, 0.0)
            with lock:
                is_over.set()
            how, words = _words(error)
            status = _USAGE if isinstance(error, FedJaxPruneError) else 1
            channel.tell(how, words=words, status=status if how == FAILED else last_words.LOST)
            if not _shut_down():
                last_words.leave(f"error: {failure.describe(error)}", lambda: None, status)
            raise
        finally:
            channel.watch(None)


@contextlib.contextmanager
def patient(processes: Processes) -> Iterator[None]:
    """Hold an error back that comes of a process that is gone: `at_work` says which."""
    try:
        yield
    except Exception as error:
        if processes.channel is not None:
            _hear_out(processes.channel, error, processes.heartbeat_s)
        raise


def _hear_out(channel: Channel, error: BaseException, wait_s: float) -> None:
    """Let this process be ended where another one is gone, if the error may come of that."""
    may_be = any(word in str(error).lower() for word in _OF_LOSS)
    if channel.lost.wait(wait_s if may_be else 0.0):
        time.sleep(_GRACE_S + 2 * _LEAVING_S)


def _words(error: BaseException) -> tuple[str, str]:
    """Say to the others how this process ends."""
    if isinstance(error, KeyboardInterrupt):
        return STOPPED, "was interrupted"
    if isinstance(error, signals.Stopped):
        return STOPPED, "was stopped by a signal"
    said = str(error) if isinstance(error, FedJaxPruneError) else failure.describe(error)
    return FAILED, f"failed: {said.rstrip('.')}"


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
