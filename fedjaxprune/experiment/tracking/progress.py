"""Tell how the run goes: a bar on a terminal, a bounded number of plain lines elsewhere."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedjaxprune.experiment.folder.record import RoundRecord
from fedjaxprune.experiment.run import round_costs

NUM_LINES = 20  # plain lines of a whole run, about
BITS_PER_MIB = 8 * 2**20
TRAINING = "train"  # the stage that need not be named


class Listener(NamedTuple):
    """Where the runner tells how it goes.

    Attributes:
      start: takes the lines that the record holds already.
      round: takes a new line of the record.
      warn: takes a sentence.
    """

    start: Callable[[list[RoundRecord]], None]
    round: Callable[[RoundRecord], None]
    warn: Callable[[str], None]


@contextlib.contextmanager
def report(console: Console, errors: Console, *, num_rounds: int) -> Iterator[Listener]:
    """Open a report of a run of `num_rounds`: a bar if `console` is a terminal, else lines."""

    def warn(sentence: str) -> None:
        errors.print(f"warning: {sentence}", style="yellow", soft_wrap=True, highlight=False)

    accuracy: list[float] = []  # the newest one that was measured

    def describe(line: RoundRecord) -> str:
        accuracy[:] = accuracy if line.test_accuracy is None else [line.test_accuracy]
        shown = f"{100 * accuracy[0]:.2f}%" if accuracy else "-"
        sparsity = f"{100 * line.sparsity:.2f}%"
        return f"loss {_loss(line)} accuracy {shown} sparsity {sparsity}"

    def stage(line: RoundRecord) -> str:
        return "" if line.stage == TRAINING else f"{line.stage}: "

    warned: set[str] = set()

    def warn_once(kind: str, sentence: str) -> None:
        if kind not in warned:
            warned.add(kind)
            warn(sentence)

    def look(line: RoundRecord) -> None:
        """Warn of clients that were left out, once, and once more if nobody remained."""
        if line.num_rejected and line.num_rejected == line.num_participating:
            warn_once(
                "all",
                f"in round {line.round} every client's message was not finite: the round changed "
                "nothing, and nothing is learnt while this goes on; a smaller learning_rate may "
                "help.",
            )
        elif line.num_rejected:
            warn_once(
                "some",
                f"in round {line.round} the messages of {line.num_rejected} of "
                f"{line.num_participating} clients were not finite and were left "
                "out; the table at the end counts them.",
            )

    if not console.is_terminal:
        stride = max(1, math.ceil(num_rounds / NUM_LINES))

        def start_plain(lines: list[RoundRecord]) -> None:
            if lines:
                console.print(f"resuming after round {len(lines)}", highlight=False)
            if len(lines) < num_rounds:
                console.print("compiling the first round", highlight=False)

        def round_plain(line: RoundRecord) -> None:
            look(line)
            if line.round % stride == 0 or line.round in (1, num_rounds):
                text = f"round {line.round}/{num_rounds}  {stage(line)}{describe(line)}"
                console.print(text, soft_wrap=True, highlight=False)

        yield Listener(start=start_plain, round=round_plain, warn=warn)
        return

    bar = Progress(
        TextColumn("round {task.completed}/{task.total}"),
        BarColumn(bar_width=8),  # all of it fits 80 columns
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )
    with bar:
        task = bar.add_task("compiling", total=num_rounds)

        def start_bar(lines: list[RoundRecord]) -> None:
            if lines:
                describe(lines[-1])
                bar.reset(task, total=num_rounds, completed=len(lines), description="resuming")

        def round_bar(line: RoundRecord) -> None:
            look(line)
            bar.update(task, completed=line.round, description=stage(line) + describe(line))

        yield Listener(start=start_bar, round=round_bar, warn=warn)


def _loss(line: RoundRecord) -> str:
    """Write a loss that may not be finite, or that nobody reported."""
    if line.num_participating == 0 and line.train_loss is None:
        return "-"
    return "not finite" if line.train_loss is None else f"{line.train_loss:.3f}"


def table(summary: dict[str, Any], *, target: float | None) -> Table:
    """Lay out the end of a run for a human; `target` is the sparsity that was aimed at, if any."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}%"

    def mib(bits: int) -> str:
        return f"{bits / BITS_PER_MIB:,.2f} MiB"

    *before, (stage, own) = summary["stage_rounds"].items()
    averaged = f"{summary['num_tests_averaged']} tests" + (f" of {stage}" if before else "")
    rows = {
        "rounds": f"{own} of {stage}, {summary['num_rounds']} in all" if before else str(own),
        "test accuracy, last round": percent(summary["test_accuracy"]),
        f"test accuracy, mean of last {averaged}": percent(
            summary["test_accuracy_mean_of_last_10"]
        ),
        "sparsity": percent(summary["sparsity"])
        + ("" if target is None else f" (target {percent(target)})"),
        "prunable weights kept": f"{summary['num_kept']:,}",
        "sent up, measured": mib(summary["uplink_bits"]),
        "sent down, measured": mib(summary["downlink_bits"]),
    }
    for kind in ("values", "indices", "masks", "statistics", "framing"):
        bits = summary["uplink_parts"].get(kind, 0) + summary["downlink_parts"].get(kind, 0)
        if bits:
            rows[f"  of both: {kind}"] = mib(bits)
    for name, bits in summary["modeled_bits"].items():
        rows[f"both, modeled: {name}"] = mib(bits["uplink"] + bits["downlink"])
    if summary["num_rejected"]:
        rows["clients left out (not finite)"] = f"{summary['num_rejected']:,}"
    rows |= round_costs.rows(summary)
    rows["time"] = f"{summary['wall_s']:,.1f} s"
    grid = Table(show_header=False)
    grid.add_column()
    grid.add_column(justify="right")
    for name, text in rows.items():
        grid.add_row(name, text)
    return grid
