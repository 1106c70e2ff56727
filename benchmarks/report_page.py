"""How fast a browser opens the page about a run of 1,000 rounds and 50 layers.

Chromium is driven through its debugging pipe. Times are of the wall, in milliseconds since the
page was asked for, as the page notes them (`shown`: the pictures on the first screen are drawn,
`drawn`: all of them) and the browser (`text`: the first paint); `processor` is the page's main
thread alone.

    python -m benchmarks.report_page [--repeats N] [--width PIXELS]
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

TARGET_MS = 2000
_TIMES = """JSON.stringify({
  ...document.documentElement.dataset,
  text: Math.round(performance.getEntriesByName("first-contentful-paint")[0]?.startTime),
})"""


@contextlib.contextmanager
def browser(*, width: int) -> Iterator[Callable[..., Any]]:
    """Start Chromium with an empty page; give a function that sends it a command."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("there is no chromium or google-chrome in the PATH.")
    pipes = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for _ in range(2) for end in os.pipe()]
    theirs, ours = (pipes[0], pipes[3]), (pipes[2], pipes[1])

    def hand_over() -> None:  # Chromium reads from 3 and writes to 4
        os.dup2(theirs[0], 3)
        os.dup2(theirs[1], 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--remote-debugging-pipe",
             f"--user-data-dir={profile}", f"--window-size={width},900", "about:blank"],
            close_fds=False, preexec_fn=hand_over, stderr=subprocess.DEVNULL,
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


def measure(path: pathlib.Path, *, width: int) -> dict[str, int]:
    """Open a page once in a new browser."""
    with browser(width=width) as send:
        send("Performance.enable", timeDomain="threadTicks")

        def processor() -> float:
            metrics = send("Performance.getMetrics")["metrics"]
            return next(one["value"] for one in metrics if one["name"] == "TaskDuration")

        before = processor()
        send("Page.navigate", url=path.as_uri())
        while True:
            time.sleep(0.1)
            found = send("Runtime.evaluate", expression=_TIMES).get("result", {})
            noted = json.loads(found.get("value", "{}"))
            if "drawn" in noted:
                break
        times = {name: int(noted[name]) for name in ("text", "shown", "drawn")}
        return {**times, "processor": round(1000 * (processor() - before))}


def main() -> None:
    """Print the median of several openings."""
    from fedjaxprune.experiment import runs
    from fedjaxprune.experiment.report import page
    from tests import folders

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=1300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "report.html"
        found, _ = runs.read_all([folders.big(pathlib.Path(folder) / "run")])
        page.write(path, page.make(found, budget=None, target=None)[0])
        print(f"size: {path.stat().st_size / 1e6:.2f} MB")
        several = [measure(path, width=args.width) for _ in range(args.repeats)]
    for name in several[0]:
        values = sorted(one[name] for one in several)
        print(
            f"{name}: {statistics.median(values):.0f} ms (from {values[0]} to {values[-1]})"
            + (f"; target: {TARGET_MS} ms" if name in ("shown", "drawn") else "")
        )


if __name__ == "__main__":
    main()
