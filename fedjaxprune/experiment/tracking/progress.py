"""Show how a run goes: a bar on a terminal, a bounded number of plain lines elsewhere."""

import contextlib
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedjaxprune.experiment.config.sections import RunConfig, plain
from fedjaxprune.experiment.folder.record import Line, numbers_of, value
from fedjaxprune.experiment.run.listener import Listener
from fedjaxprune.traffic import BITS_PER_MIB

NUM_LINES = 20  # plain lines of a whole run, about
_PASSES = ("forward", "input_gradient", "weight_gradient")


class _Rounds(NamedTuple):
    """How the rounds of a run are counted, from the header of its record.

    Attributes:
      by_stage: rounds of each stage, in order.
      main: the last stage, which need not be named; those before it prepare it.
    """

    by_stage: dict[str, int]
    main: str

    @property
    def total(self) -> int:
        """Rounds of all stages."""
        return sum(self.by_stage.values())

    def text(self, line: Line) -> str:
        """Write how far the run is, in rounds of the line's stage."""
        stage, number = line["stage"], line["stage_round"]
        name = "" if stage == self.main else f"{stage}: "
        return f"{name}round {number}/{self.by_stage.get(stage, number)}"


def _rounds_of(header: Mapping[str, Any]) -> _Rounds:
    by_stage = {one["name"]: one["num_rounds"] for one in header["stages"]}
    return _Rounds(by_stage, [*by_stage][-1])


@contextlib.contextmanager
def report(console: Console, errors: Console, *, details: bool) -> Iterator[Listener]:
    """Open a report of a run: a bar if `console` is a terminal, else lines; a table at its end."""

    def say(sentence: str) -> None:
        console.print(sentence, soft_wrap=True, highlight=False, markup=False)

    def warn(sentence: str) -> None:
        text = f"warning: {sentence}"
        errors.print(text, style="yellow", soft_wrap=True, highlight=False, markup=False)

    def begin(config: RunConfig, folder: pathlib.Path) -> None:
        say(f"{_what(config)}; folder {folder}")

    def finish(config: RunConfig, folder: pathlib.Path, summary: Mapping[str, Any]) -> None:
        for one in bars:
            one.stop()
        console.print(table(summary, config, details=details))
        say(f"results: {folder}")

    kept: dict[str, Any] = {"rounds": _Rounds({}, ""), "score": "accuracy -"}
    look = _rejections(warn)
    bars: list[Progress] = []  # at most one

    def describe(line: Line) -> str:
        kept["score"] = _score(line["test"]) or kept["score"]
        sparsity = f"{100 * line['mask']['sparsity']:.2f} %"
        return f"loss {_loss(line)}, {kept['score']}, sparsity {sparsity}"

    if not console.is_terminal:

        def start_plain(header: Mapping[str, Any], lines: list[Line]) -> None:
            kept["rounds"] = _rounds_of(header)
            if lines:
                say(f"resuming after {kept['rounds'].text(lines[-1])}")
            if len(lines) < kept["rounds"].total:
                say("compiling the first round")

        def round_plain(line: Line) -> None:
            look(line)
            total, number = kept["rounds"].total, line["round"]
            text = describe(line)
            if number % max(1, math.ceil(total / NUM_LINES)) == 0 or number in (1, total):
                say(f"{kept['rounds'].text(line)}: {text}")

        yield Listener(begin, start_plain, round_plain, say, warn, finish)
        return

    bar = Progress(
        BarColumn(bar_width=8),  # all columns fit a terminal of 80
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
    )
    bars.append(bar)
    with bar:
        task = bar.add_task("reading data", total=None)

        def start_bar(header: Mapping[str, Any], lines: list[Line]) -> None:
            rounds = kept["rounds"] = _rounds_of(header)
            if lines:
                describe(lines[-1])
            done = len(lines)
            bar.reset(task, total=rounds.total, completed=done, description="compiling")

        def round_bar(line: Line) -> None:
            look(line)
            text = f"{kept['rounds'].text(line)}: {describe(line)}"
            bar.update(task, completed=line["round"], description=text)

        yield Listener(begin, start_bar, round_bar, say, warn, finish)


def _what(config: RunConfig) -> str:
    """Say what is run, in one line."""
    clients = config.data.num_clients
    size = config.federation.cohort_size
    each = f"{size} of {clients} clients in each" if clients else "the clients by key"
    rounds = config.federation.num_rounds
    return (
        f"{config.method.name} on {config.data.dataset.name} with {config.model.name}: "
        f"{rounds} round{'s' * (rounds != 1)}, {each}"
    )


def _rejections(warn: Callable[[str], object]) -> Callable[[Line], None]:
    """Warn of clients that were left out, once, and once more if nobody remained."""
    warned: set[bool] = set()

    def look(line: Line) -> None:
        rejected, number = line["clients"]["rejected"], line["clients"]["participating"]
        is_all = rejected == number
        if not rejected or is_all in warned:
            return
        warned.add(is_all)
        if is_all:
            warn(
                f"in round {line['round']} no client's message was finite, so the round changed "
                "nothing; a smaller client.optimizer.learning_rate may help."
            )
        else:
            warn(
                f"in round {line['round']} the messages of {rejected} of {number} clients were not "
                "finite and were left out; the table at the end counts them."
            )

    return look


def _loss(line: Line) -> str:
    """Write a loss that may not be finite, or that no client reported."""
    loss = line["train"]["loss"]
    if loss is None:
        return "not finite" if line["clients"]["participating"] else "-"
    return f"{loss:.3f}"


def _score(test: Mapping[str, Any]) -> str:
    """Write what a test measured; empty where there was none."""
    if test.get("accuracy") is not None:
        return f"accuracy {100 * test['accuracy']:.2f} %"
    return f"error {test['error']:.4g}" if test.get("error") is not None else ""


def _percent(number: float | None) -> str:
    return "-" if number is None else f"{100 * number:.2f} %"


def _mib(bits: float) -> str:
    return f"{bits / BITS_PER_MIB:,.2f} MiB"


def _of_dense(part: float, dense: float) -> str:
    """Give a ratio to what a dense network takes, where that is known."""
    return f" ({100 * part / dense:.1f} % of dense)" if dense else ""


def table(summary: Mapping[str, Any], config: RunConfig, *, details: bool) -> Table:
    """Lay out the end of a run.

    Args:
      summary: of the run, as ``summary.json`` has it.
      config: of the run, for the sparsity that was asked for.
      details: whether to show all numbers.
    """
    test, mask, traffic = summary["test"], summary["mask"], summary["traffic"]
    averaged = test["num_tests_averaged"]
    rows: dict[str, str] = {}
    if test["accuracy"] is not None:
        rows["test accuracy, last"] = _percent(test["accuracy"])
        if averaged > 1:
            name = f"test accuracy, mean of the last {averaged} tests"
            rows[name] = _percent(test["accuracy_mean_last_10"])
    elif test["error"] is not None:
        rows["test error, last (mean absolute)"] = f"{test['error']:.4g}"
    elif test["loss"] is not None:
        rows["test loss, last"] = f"{test['loss']:.4g}"
    asked = value(plain(config), "method.sparsity")
    rows["sparsity"] = _percent(mask["sparsity"]) + (
        f" ({_percent(asked)} asked for)" if isinstance(asked, int | float) else ""
    )
    rows["live weights"] = f"{mask['num_live']:,} of {mask['num_prunable']:,} prunable"
    for way in ("up", "down"):
        bits = traffic[way].get("total_bits", 0)
        dense = traffic["dense"].get(f"{way}_bits", 0)
        rows[f"sent {way} *"] = _mib(bits) + _of_dense(bits, dense)
    if flops := summary["compute"]["training_flops"]:
        sparse = sum(flops.get(name, 0) for name in _PASSES)
        dense = sum(flops.get(f"dense_{name}", 0) for name in _PASSES)
        rows["training FLOPs, modeled *"] = f"{sparse:.3g}{_of_dense(sparse, dense)}"
    if number := summary["clients"]["rejected"]:
        rows["messages left out (not finite) *"] = f"{number:,}"
    rows["time"] = f"{summary['time_s']:,.1f} s"
    if details:
        rows |= _details(summary)
    grid = Table(show_header=False, caption="* summed over rounds and clients")
    grid.add_column()
    grid.add_column(justify="right")
    for name, text in rows.items():
        grid.add_row(name, text)
    return grid


def _details(summary: Mapping[str, Any]) -> dict[str, str]:
    """Give the rest of a summary."""
    traffic, compute = summary["traffic"], summary["compute"]
    rows = {
        "rounds": ", ".join(f"{number} {stage}" for stage, number in summary["stages"].items()),
        "train loss, last": _number(summary["train"]["loss"]),
        "test loss, last": _number(summary["test"]["loss"]),
        "mask entries unchanged in a round, mean": _percent(summary["mask"]["unchanged_fraction"]),
        "clients that trained a weight, mean *": _number(summary["mask"]["clients_per_weight"]),
    }
    for way in ("up", "down"):
        for kind, bits in traffic[way].items():
            if bits and kind != "total_bits":
                rows[f"sent {way}: {kind} *"] = _mib(bits)
    if len(traffic["by_stage"]) > 1:
        for stage, bits in traffic["by_stage"].items():
            rows[f"sent in stage {stage} *"] = _mib(bits["up_bits"] + bits["down_bits"])
    clients = traffic["by_client"]
    if clients["mean_bits"] is not None:
        rows["sent to and from a client, mean"] = _mib(clients["mean_bits"])
        rows["sent to and from a client, most"] = _mib(clients["largest_bits"])
    for name, bits in traffic["published"].items():
        rows[f"sent by the formula of {name} *"] = _mib(bits["up_bits"] + bits["down_bits"])
    flops = {"training_flops": compute["training_flops"] or {}}
    for name, number in numbers_of(flops):
        rows[f"{name.removeprefix('training_flops.').replace('_', ' ')} FLOPs *"] = f"{number:.3g}"
    if found := compute.get("inference_flops"):
        share = found["gated"] / found["without_gates"] if found["without_gates"] else math.nan
        rows["inference FLOPs of an example, gated"] = (
            f"{found['gated']:.3g} ({100 * share:.1f} % of a network without gates)"
        )
    return rows


def _number(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}"
