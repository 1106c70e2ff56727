"""How fast a browser opens the page about a run of 1,000 rounds and 50 layers.

Chromium is driven through its debugging pipe. Times are of the wall, in milliseconds since the
page was asked for, as the page notes them (`shown`: the pictures on the first screen are drawn,
`drawn`: all of them) and the browser (`text`: the first paint); `processor` is the page's main
thread alone.

    python -m benchmarks.report_page [--repeats N] [--width PIXELS]
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

from tests import browser, folders

TARGET_MS = 2000
_TIMES = """JSON.stringify({
  ...document.documentElement.dataset,
  text: Math.round(performance.getEntriesByName("first-contentful-paint")[0]?.startTime),
})"""


def measure(path: pathlib.Path, *, width: int) -> dict[str, int]:
    """Open a page once in a new browser."""
    with browser.opened(width=width) as send:
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
    from fedjaxprune.experiment.analysis.report import page

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=1300)
    args = parser.parse_args()
    if browser.find() is None:
        raise SystemExit("there is no chromium or google-chrome in the PATH.")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "report.html"
        run = folders.big(pathlib.Path(folder) / "run")
        page.of_folders([run], path)
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
