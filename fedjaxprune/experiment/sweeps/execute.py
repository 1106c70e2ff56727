"""Play a sweep: in this process one after the other, or in several processes side by side.

In one process, seeds of one configuration find the code that the first of them had compiled, in
JAX's cache on disk, which processes share, too.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import click

from fedjaxprune.experiment.config.flat import validation
from fedjaxprune.experiment.config.flat.sections import RunConfig, UserError
from fedjaxprune.experiment.run import launch
from fedjaxprune.experiment.sweeps import flat_plan as plan
from fedjaxprune.experiment.sweeps.flat_plan import Member, Sweep

# Each process keeps to cores of its own.
_LAUNCH = """
import os
if {cores} and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {cores})
from fedjaxprune.experiment.cli import main
main()
"""


def one_by_one(sweep: Sweep, *, trackers: launch.Openers) -> dict[str, str]:
    """Play what is missing in this process; return what failed, by name, and why."""
    missing = [member for member in sweep.members if not plan.is_finished(member)]
    failed = {}
    if missing:
        import jax

        with launch.jax_set_up(_widest(missing)):
            jax.devices()  # from here on their number is fixed, for members of all sizes
            for number, member in enumerate(missing, start=1):
                click.echo(f"run {number} of {len(missing)}: {member.name}")
                if (why := attempt(member, trackers=trackers)) is not None:
                    failed[member.name] = why
                    click.echo(f"failed: {member.name}: {why}", err=True)
                jax.clear_caches()  # else compiled rounds pile up in memory
    return failed


def _widest(members: Sequence[Member]) -> RunConfig:
    """Choose the config that wants most devices."""
    from fedjaxprune.experiment.run import build

    def wanted(config: RunConfig) -> int:
        return min(config.devices or build.num_cores(), config.cohort_size)

    return max((member.config for member in members), key=wanted)


def attempt(member: Member, *, trackers: launch.Openers) -> str | None:
    """Begin a member or go on with it; return why it failed, or None."""
    from fedjaxprune.experiment.folder import record

    folder = pathlib.Path(str(member.config.out))
    try:
        if (folder / record.CONFIG).exists():
            given = validation.validate_each({})
            launch.resume(folder, {}, given, trackers=trackers, show=_show_nothing)
        else:
            launch.start(member.config, trackers=trackers, show=_show_nothing)
    except UserError as error:
        return str(error)
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {said}".rstrip(": ")
    return None


def _show_nothing(folder: pathlib.Path, config: RunConfig, lines: list[Any]) -> None:
    """Leave the end of a run to the comparison at the end of the sweep."""


def side_by_side(sweep: Sweep, *, jobs: int, track: Sequence[str]) -> dict[str, str]:
    """Play what is missing in `jobs` processes, each on its share of the cores."""
    missing = [member for member in sweep.members if not plan.is_finished(member)]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares: queue.Queue[set[int]] = queue.Queue()
    for number in range(jobs):
        shares.put(set(cores[number::jobs]))
    at_work: set[subprocess.Popen[str]] = set()
    is_over = threading.Event()

    def play(member: Member) -> str | None:
        share = shares.get()
        try:
            if is_over.is_set():
                return None
            arguments = ["sweep", sweep.source, "--out", str(sweep.folder), "--member", member.name]
            for name in track:
                arguments += ["--track", name]
            process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCH.format(cores=share or None), *arguments],
                stdin=subprocess.PIPE,  # ends with this process, and the other one with it
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            at_work.add(process)
            assert process.stderr is not None
            said = process.stderr.read()
            status = process.wait()
            at_work.discard(process)
            if status == 0 or is_over.is_set():
                return None
            told = f"failed: {member.name}: "
            lines = [line for line in said.splitlines() if line.startswith((told, "error: "))]
            last = lines[-1] if lines else f"it ended with status {status}"
            return last.removeprefix("error: ").removeprefix(told)
        finally:
            shares.put(share)

    failed = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        coming = {pool.submit(play, member): member for member in missing}
        try:
            for number, done in enumerate(concurrent.futures.as_completed(coming), start=1):
                member, why = coming[done], done.result()
                if why is not None:
                    failed[member.name] = why
                    click.echo(f"failed: {member.name}: {why}", err=True)
                else:
                    click.echo(f"finished {number} of {len(missing)}: {member.name}")
        except BaseException:
            is_over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(at_work):
                with contextlib.suppress(OSError):
                    process.terminate()
            raise
    return failed


def only(sweep: Sweep, name: str, *, trackers: launch.Openers) -> str | None:
    """Play one member for a sweep that works side by side; end when that one does."""
    member = next((member for member in sweep.members if member.name == name), None)
    if member is None:
        raise UserError(f"the sweep {sweep.source} has no member {name!r}.")

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):  # a buffered reader would hinder Python's end
            pass
        os._exit(launch.INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()
    return attempt(member, trackers=trackers)
