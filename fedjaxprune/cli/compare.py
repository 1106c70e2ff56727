"""The commands ``fedjaxprune compare`` and ``fedjaxprune report``: runs in a table, or a page."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import click

from fedjaxprune.errors import ConfigError, visible
from fedjaxprune.experiment.folder.layout import path_of

_WIDE = 200  # columns of a table that goes into a file


def _finite(context: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Refuse nan and inf, which click takes for numbers within limits."""
    del context
    if value is not None and not math.isfinite(value):
        raise ConfigError(f"{param.opts[0]} must be a finite number, got {value}.")
    return value


def options(command: Any) -> Any:
    """Give a command the options of a comparison."""
    command = click.option(
        "--to-accuracy",
        type=click.FloatRange(0, 100, min_open=True),
        callback=_finite,
        metavar="NUMBER",
        help="Accuracy to which bytes and rounds are counted, in %  [default: what every run "
        "reached at its end, rounded down]",
    )(command)
    return click.option(
        "--at-mib",
        type=click.FloatRange(0, min_open=True),
        callback=_finite,
        metavar="NUMBER",
        help="Traffic at which accuracies are compared, in MiB of both ways and all clients  "
        "[default: the least that a run sent, or more if a run's first test came later]",
    )(command)


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@options
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "markdown", "csv"]),
    default="table",
    help="How to write it; markdown and csv have all numbers.",
)
def compare(
    runs: tuple[str, ...], at_mib: float | None, to_accuracy: float | None, style: str
) -> None:
    """Compare runs in a table: accuracy at equal bytes, bytes and rounds to an accuracy.

    A RUN is a run folder, or a folder of run folders. Runs that differ only in their seed are
    averaged.
    """
    show(runs, at_mib=at_mib, to_accuracy=to_accuracy, style=style)


def show(
    runs: Sequence[str | pathlib.Path],
    *,
    at_mib: float | None = None,
    to_accuracy: float | None = None,
    style: str = "table",
) -> None:
    """Print the comparison of runs, and notes on stderr; the accuracy is in per cent."""
    from rich.console import Console

    from fedjaxprune.experiment.analysis import compare as comparison
    from fedjaxprune.experiment.analysis import groups, headline, tables

    compared, notes = comparison.of_folders(runs, at_mib=at_mib, to_accuracy=_fraction(to_accuracy))
    for note in notes:
        click.echo(f"note: {visible(note)}", err=True)
    if style != "table":
        write = tables.markdown if style == "markdown" else tables.comma_separated
        click.echo(write(compared), nl=False)
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    for table in tables.terminal(compared, width=console.width):
        console.print(table)
    lines = [*compared.notes]
    if any(len(several) > 1 for several in compared.measures):
        lines.insert(0, "mean ± deviation over seeds.")
    states = {members.label: groups.states(members) for members in compared.groups}
    lines += [f"* {label}: {state}" for label, state in states.items() if state]
    for line in (*lines, headline.sentence(compared)):
        console.print(
            visible(line), soft_wrap=not console.is_terminal, highlight=False, markup=False
        )


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@options
@click.option(
    "--out",
    default="report.html",
    show_default=True,
    metavar="FILE",
    help="The page; an existing file is replaced.",
)
def report(
    runs: tuple[str, ...], at_mib: float | None, to_accuracy: float | None, out: str
) -> None:
    """Write one HTML page about runs: tables, pictures, the configs. It needs no network.

    A RUN is a run folder, or a folder of run folders. Runs that differ only in their seed are one
    curve, their mean, with a band. Running, interrupted and failed runs are shown, too.
    """
    try:
        from fedjaxprune.experiment.analysis.report import page
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "plotly":
            raise
        raise ConfigError(
            "report needs the package plotly: install it with `pip install 'fedjaxprune[report]'`."
        ) from None
    if not out:
        raise ConfigError("--out must be a text that is not empty, got ''.")
    path = path_of(out)
    for note in page.of_folders(runs, path, at_mib=at_mib, to_accuracy=_fraction(to_accuracy)):
        click.echo(f"note: {visible(note)}", err=True)
    click.echo(f"report: {path}")


def _fraction(percent: float | None) -> float | None:
    return None if percent is None else percent / 100
