"""Drive a headless Chromium through its debugging pipe, with nothing but the standard library."""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

# Chromium reads commands from 3 and writes to 4. A process of its own sees to that, as JAX warns of
# a fork in the process that has loaded it.
HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find() -> str | None:
    """Find a browser."""
    return shutil.which("chromium") or shutil.which("google-chrome")


@contextlib.contextmanager
def opened(*, width: int) -> Iterator[Callable[..., Any]]:
    """Start Chromium with an empty page; give a function that sends it a command."""
    program = find()
    assert program is not None
    pipes = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for _ in range(2) for end in os.pipe()]
    theirs, ours = (pipes[0], pipes[3]), (pipes[2], pipes[1])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [sys.executable, "-c", HAND_OVER, *map(str, theirs), program,
             "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--remote-debugging-pipe",
             f"--user-data-dir={profile}", f"--window-size={width},900", "about:blank"],
            pass_fds=theirs, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in theirs:
            os.close(end)
        with os.fdopen(ours[0], "rb") as answers, os.fdopen(ours[1], "wb") as commands:
            session: dict[str, str] = {}
            numbers = itertools.count(1)

            def send(method: str, **params: Any) -> Any:
                number = next(numbers)
                message = {"id": number, "method": method, "params": params, **session}
                commands.write(json.dumps(message).encode() + b"\0")
                commands.flush()
                while True:
                    text = b""
                    while not text.endswith(b"\0"):
                        text += answers.read(1)
                    answer = json.loads(text[:-1])
                    if answer.get("id") == number:
                        return answer.get("result", {})

            pages = send("Target.getTargets")["targetInfos"]
            (page,) = [one["targetId"] for one in pages if one["type"] == "page"]
            attached = send("Target.attachToTarget", targetId=page, flatten=True)
            session["sessionId"] = attached["sessionId"]
            try:
                yield send
            finally:
                process.terminate()
                process.wait()
