"""Run a sweep: in this process one after the other, or in several processes side by side.

In one process, seeds of one configuration find the code that the first of them had compiled, in
JAX's cache on disk, which processes share, too. Nothing is printed: callers receive sentences.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from fedjaxprune.errors import ConfigError, FedJaxPruneError, RunFolderError
from fedjaxprune.experiment.execution import devices, signals
from fedjaxprune.experiment.folder import failure, layout, lock
from fedjaxprune.experiment.run import launch
from fedjaxprune.experiment.run.listener import Listener
from fedjaxprune.experiment.sweeps import plan
from fedjaxprune.experiment.sweeps.plan import Member, Sweep

# Each process keeps to cores of its own.
_CHILD = """
import os
if {cores} and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {cores})
from fedjaxprune.experiment.sweeps import execute
execute.child({given!r})
"""
_FAILED = "failed: "
BUSY = "another process is running it"  # why a member was left out


class Audience(NamedTuple):
    """Who listens to a sweep."""

    # opens a listener for each run of this process
    listen: Callable[[], AbstractContextManager[Listener]] = lambda: nullcontext(Listener())
    note: Callable[[str], object] = lambda sentence: (
        None
    )  # takes a sentence: which run begins, which one ended
    warn: Callable[[str], object] = lambda sentence: (
        None
    )  # takes a sentence: which run failed, and why


def is_finished(member: Member) -> bool:
    """Tell whether nothing is left to do for a member."""
    return (member.folder / layout.SUMMARY).exists() and failure.read(member.folder) is None


def one_by_one(
    sweep: Sweep,
    audience: Audience,
    *,
    trackers: launch.Openers | None = None,
    stop: launch.StopFn = launch.never,
) -> dict[str, str]:
    """Run what is missing in this process; return what failed, by name, and why.

    `stop` is asked once a round: whether the run that is at work ends after it.
    """
    missing = [member for member in sweep.members if not is_finished(member)]
    failed = {}
    if missing:
        import jax

        devices.prepare(max((member.config for member in missing), key=devices.wanted))
        jax.devices()  # from here on their number is fixed, for members of all sizes
        for number, member in enumerate(missing, start=1):
            audience.note(f"run {number} of {len(missing)}: {member.name}")
            with audience.listen() as listener:
                why = attempt(member, listener, trackers=trackers, stop=stop)
            if why is not None:
                failed[member.name] = why
                audience.warn(_said(member, why))
            jax.clear_caches()  # else compiled rounds pile up in memory
    return failed


def _said(member: Member, why: str) -> str:
    return f"{'left out' if why == BUSY else 'failed'}: {member.name}: {why}"


def attempt(
    member: Member,
    listener: Listener,
    *,
    trackers: launch.Openers | None = None,
    stop: launch.StopFn = launch.never,
) -> str | None:
    """Begin a member or continue it; return why it failed, or None.

    It is `BUSY` where another process works in the folder, such as that of another sweep.
    """
    common: Any = {"listener": listener, "trackers": trackers, "stop": stop}
    try:
        if (member.folder / layout.CONFIG).exists():
            launch.resume(member.folder, **common)
        else:
            launch.start(member.config, folder=member.folder, **common)
    except FedJaxPruneError as error:
        is_busy = isinstance(error, RunFolderError) and lock.is_held(member.folder)
        return BUSY if is_busy else str(error)
    except Exception as error:
        return failure.describe(error)
    return None


def side_by_side(
    sweep: Sweep, audience: Audience, *, jobs: int, track: Sequence[str] = ()
) -> dict[str, str]:
    """Run what is missing in `jobs` processes, each on its share of the cores."""
    if not sweep.source.endswith((".yaml", ".yml")):
        raise ConfigError("jobs must be 1 for a sweep that is not a file.")
    missing = [member for member in sweep.members if not is_finished(member)]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares: queue.Queue[set[int]] = queue.Queue()
    for number in range(jobs):
        shares.put(set(cores[number::jobs]))
    at_work: set[subprocess.Popen[str]] = set()
    is_over = threading.Event()

    def run(member: Member) -> str | None:
        share = shares.get()
        try:
            if is_over.is_set():
                return None
            given = json.dumps([sweep.source, str(sweep.folder), member.name, list(track)])
            with subprocess.Popen(
                [sys.executable, "-c", _CHILD.format(cores=share or None, given=given)],
                stdin=subprocess.PIPE,  # ends with this process, and the other one with it
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            ) as process:
                at_work.add(process)
                assert process.stderr is not None
                said = process.stderr.read()
                status = process.wait()
            at_work.discard(process)
            if status == 0 or is_over.is_set():
                return None
            lines = [line for line in said.splitlines() if line.startswith(_FAILED)]
            return lines[-1].removeprefix(_FAILED) if lines else f"it ended with status {status}"
        finally:
            shares.put(share)

    failed = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        coming = {pool.submit(run, member): member for member in missing}
        try:
            for number, done in enumerate(concurrent.futures.as_completed(coming), start=1):
                member, why = coming[done], done.result()
                if why is not None:
                    failed[member.name] = why
                    audience.warn(_said(member, why))
                else:
                    audience.note(f"finished {number} of {len(missing)}: {member.name}")
        except BaseException:
            is_over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(at_work):
                with contextlib.suppress(OSError):
                    process.terminate()
            raise
    return failed


def child(given: str) -> None:
    """Run one member in a process of its own, which ends when the one that started it does."""
    from fedjaxprune.experiment.execution import compilation_cache

    source, folder, name, track = json.loads(given)

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):  # a buffered reader would hinder Python's end
            pass
        os._exit(launch.INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()
    sweep = plan.read(source, folder=pathlib.Path(folder))
    member = next(member for member in sweep.members if member.name == name)
    trackers: dict[str, Any] = {}
    if track:
        from fedjaxprune.experiment.tracking import tracker

        trackers = tracker.find(track)
    listener = Listener(warn=lambda sentence: None)
    why = None
    try:
        with compilation_cache.kept(), signals.watched(last_words=lambda number: "") as signaled:
            why = attempt(member, listener, trackers=trackers, stop=signaled.stop)
            if (number := signaled.came()) is not None and not is_finished(member):
                raise signals.Stopped(number)
    except signals.Stopped as stopped:
        sys.exit(signals.status(stopped.number))
    if why is not None:
        sys.stderr.write(f"{_FAILED}{why}\n")
        sys.exit(1)
