"""One command after the other in a process that is killed if one takes too long."""

import contextlib
import gc
import json
import os
import pathlib
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

SECONDS = 10.0  # that a command may take, without those in which it waited for a core
MOST = 60.0  # that it may take with those
FIRST = 300.0  # that one may take with which the process begins: it imports and compiles
SPARE = 2 * 2**30  # bytes of address space beyond those that the first commands need


class Said(NamedTuple):
    """What a command came to; `status` is None where it was killed or ended the process."""

    status: int | None
    out: str
    err: str
    seconds: float
    bytes: int  # of memory at most, beyond that before it


class Worker:
    """A process that runs commands."""

    def __init__(
        self, folder: pathlib.Path, prepare: Callable[[], list[list[str]]] = lambda: []
    ) -> None:
        """Note where the process works, and what gives the commands with which it begins."""
        self.folder, self.prepare = folder, prepare
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, args: list[str]) -> Said:
        """Run one command, in a new process if the last one was killed."""
        if self.process is None:
            self._start()
            for one in self.prepare():
                said = self._ask(one, FIRST)
                assert said.status == 0, said
            assert self._ask([], FIRST).status == 0
        return self._ask(args, SECONDS)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()  # type: ignore[union-attr]
            self.process.stdout.close()  # type: ignore[union-attr]
            self.process = None

    def _start(self) -> None:
        source = pathlib.Path(__file__).parents[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.at_once"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(source), "COLUMNS": "200"},
        )

    def _ask(self, args: list[str], seconds: float) -> Said:
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(args).encode() + b"\n")
        process.stdin.flush()
        begin, before = time.monotonic(), _waits(process.pid)
        while not select.select([process.stdout], [], [], 0.1)[0]:
            wall = time.monotonic() - begin
            waits = (n - before.get(thread, 0) for thread, n in _waits(process.pid).items())
            if wall - max(waits, default=0) / 1e9 > seconds or wall > max(seconds, MOST):
                self.close()
                return Said(None, "", f"killed after {wall:.1f} s", wall, 0)
        answer = process.stdout.readline()
        if not answer:
            status = process.wait()
            self.close()
            return Said(None, "", f"ended with {status}", time.monotonic() - begin, 0)
        return Said(*json.loads(answer))


def _waits(process: int) -> dict[str, int]:
    """Give the nanoseconds that each thread of a process has waited for a core."""
    found = {}
    for path in pathlib.Path(f"/proc/{process}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError):
            found[path.parent.name] = int(path.read_text().split()[1])
    return found


def _peak() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return next(int(row.split()[1]) * 1024 for row in status.splitlines() if "VmHWM" in row)


def _size() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> None:
    """Run commands that come as lines of JSON, and answer each in a line."""
    answers = os.fdopen(os.dup(1), "w")
    from fedjaxprune.cli.main import main as command

    for row in sys.stdin:
        args: list[str] = json.loads(row)
        if not args:  # the first commands are done
            most = _size() + SPARE
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        status: Any = 0
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            old = [os.dup(1), os.dup(2)]
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            pathlib.Path("/proc/self/clear_refs").write_text("5")
            before, begin = _peak(), time.monotonic()
            try:
                with contextlib.suppress(BrokenPipeError):
                    command(args) if args else None
            except SystemExit as end:
                status = end.code
            except BaseException:
                status = 1
                traceback.print_exc()
            seconds, peak = time.monotonic() - begin, _peak()
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(old, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        print(json.dumps([status or 0, *texts, seconds, peak - before]), file=answers, flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
