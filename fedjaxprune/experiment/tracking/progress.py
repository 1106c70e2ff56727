"""Show how a run goes: a bar on a terminal, a bounded number of plain lines elsewhere."""

import contextlib
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from fedjaxprune.errors import visible
from fedjaxprune.experiment.config.sections import RunConfig, plain
from fedjaxprune.experiment.folder.record import Line, numbers_of, value
from fedjaxprune.experiment.run.listener import Listener
from fedjaxprune.traffic import BITS_PER_MIB

NUM_LINES = 20  # plain lines of a whole run, about
_PASSES = ("forward", "input_gradient", "weight_gradient")


@contextlib.contextmanager
def report(console: Console, errors: Console, *, details: bool) -> Iterator[Listener]:
    """Open a report of a run: a bar if `console` is a terminal, else lines; a table at its end."""
    stages: dict[str, int] = {}  # rounds of each; the last one need not be named
    score, place = "accuracy -", ""
    bar = Progress(
        BarColumn(bar_width=8),  # all columns fit a terminal of 80
        TextColumn("{task.description}", markup=False),
        TimeRemainingColumn(),
        console=console,
    )
    task = bar.add_task("reading data", total=None)

    def say(sentence: str) -> None:
        console.print(visible(sentence), soft_wrap=True, highlight=False, markup=False)

    def warn(sentence: str) -> None:
        text = f"warning: {visible(sentence)}"
        errors.print(text, style="yellow", soft_wrap=True, highlight=False, markup=False)

    def where(line: Line) -> str:
        stage, number = line["stage"], line["stage_round"]
        name = "" if stage == [*stages][-1] else f"{stage}: "
        return f"{name}round {number}/{stages.get(stage, number)}"

    def describe(line: Line) -> str:
        nonlocal score
        score = _score(line["test"]) or score
        sparsity = _percent(line["mask"]["sparsity"])
        return f"{where(line)}: loss {_loss(line)}, {score}, sparsity {sparsity}"

    def begin(config: RunConfig, folder: pathlib.Path) -> None:
        nonlocal place
        say(_what(config))
        place = f"folder: {folder}"  # which is made once the run is put together

    def start(header: Mapping[str, Any], lines: list[Line]) -> None:
        stages.update({one["name"]: one["num_rounds"] for one in header["stages"]})
        total, done = sum(stages.values()), len(lines)
        if place:
            say(place)
        if console.is_terminal:
            if lines:
                describe(lines[-1])
            bar.reset(task, total=total, completed=done, description="compiling")
            return
        if lines:
            say(f"resuming after {where(lines[-1])}")
        if done < total:
            say("compiling the first round")

    look = _rejections(warn)

    def tell(line: Line) -> None:
        look(line)
        total, number, text = sum(stages.values()), line["round"], describe(line)
        if console.is_terminal:
            bar.update(task, completed=number, description=text)
        elif number % max(1, math.ceil(total / NUM_LINES)) == 0 or number in (1, total):
            say(text)

    def finish(config: RunConfig, folder: pathlib.Path, summary: Mapping[str, Any]) -> None:
        if console.is_terminal:
            bar.stop()
        console.print(table(summary, config, details=details))
        say(f"results: {folder}")

    with bar if console.is_terminal else contextlib.nullcontext():
        yield Listener(begin, start, tell, say, warn, finish)


def _what(config: RunConfig) -> str:
    """Say what is run, in one line."""
    clients, size = config.data.num_clients, config.federation.cohort_size
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
        what = (
            "no client's message was finite, so the round changed nothing; a smaller "
            "client.optimizer.learning_rate may help."
            if is_all
            else f"the messages of {rejected} of {number} clients were not finite, or too large, "
            "and were left out; the table at the end counts them."
        )
        warn(f"in round {line['round']} {what}")

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
    """Lay out the end of a run, with its summary as ``summary.json`` has it."""
    test, mask, traffic = summary["test"], summary["mask"], summary["traffic"]
    averaged = test["num_tests_averaged"]
    rows: dict[str, str] = {}
    if test["accuracy"] is not None:
        rows["test accuracy, last"] = _percent(test["accuracy"])
        if averaged > 1:
            mean = _percent(test["accuracy_mean_last_10"])
            rows[f"test accuracy, mean of the last {averaged} tests"] = mean
    elif test["error"] is not None:
        rows["test error, last (mean absolute)"] = f"{test['error']:.4g}"
    elif test["loss"] is not None:
        rows["test loss, last"] = f"{test['loss']:.4g}"
    rows["sparsity"] = _percent(mask["sparsity"])
    if isinstance(asked := value(plain(config), "method.sparsity"), int | float):
        rows["sparsity"] += f" ({_percent(asked)} asked for)"
    rows["live weights"] = f"{mask['num_live']:,} of {mask['num_prunable']:,} prunable"
    for way in ("up", "down"):
        bits = traffic[way].get("total_bits", 0)
        dense = traffic["dense"].get(f"{way}_bits", 0)
        rows[f"sent {way} *"] = _mib(bits) + _of_dense(bits, dense)
    if flops := summary["compute"]["training_flops"]:
        sparse = sum(flops.get(name, 0) for name in _PASSES)
        dense = sum(flops.get(f"dense_{name}", 0) for name in _PASSES)
        rows["training FLOPs, modeled *"] = f"{sparse:.3g}{_of_dense(sparse, dense)}"
    if modeled := summary["compute"].get("client_time"):
        rows["time of the clients' devices, modeled"] = f"{modeled['seconds']:,.4g} s"
    if number := summary["clients"]["rejected"]:
        rows["messages left out (not finite) *"] = f"{number:,}"
    rows["time"] = f"{summary['time_s']:,.1f} s"
    if details:
        rows |= _details(summary)
    sides = Column(), Column(justify="right")
    grid = Table(*sides, show_header=False, caption="* summed over rounds and clients")
    for row in rows.items():
        grid.add_row(*(Text(visible(cell)) for cell in row))
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
    if found := compute.get("client_time"):
        text = f"{found['overlapped_seconds']:,.4g} s"
        rows["time of the clients' devices, if all overlaps"] = text
    if found := compute.get("inference_flops"):
        share = found["gated"] / found["without_gates"] if found["without_gates"] else math.nan
        text = f"{found['gated']:.3g} ({100 * share:.1f} % of a network without gates)"
        rows["inference FLOPs of an example, gated"] = text
    return rows


def _number(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}"
