"""The command ``fedjaxprune compare``: runs in a table."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import click

from fedjaxprune.errors import ConfigError

_WIDE = 200  # columns of a table that goes into a file


def _finite(context: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Refuse nan and inf, which click takes for numbers within limits."""
    del context
    if value is not None and not math.isfinite(value):
        raise ConfigError(f"{param.opts[0]} must be a finite number, got {value}.")
    return value


def options(command: Any) -> Any:
    """Give a command the options of a comparison."""
    for decorate in (
        click.option(
            "--to-accuracy",
            type=click.FloatRange(0, 100, min_open=True),
            callback=_finite,
            metavar="NUMBER",
            help="Accuracy to which bytes and rounds are counted, in %  [default: what every run "
            "reached at its end, rounded down]",
        ),
        click.option(
            "--at-mib",
            type=click.FloatRange(0, min_open=True),
            callback=_finite,
            metavar="NUMBER",
            help="Traffic at which accuracies are compared, in MiB of both ways and all clients  "
            "[default: the least that a run sent, or more if a run's first test came later]",
        ),
    ):
        command = decorate(command)
    return command


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

    target = None if to_accuracy is None else to_accuracy / 100
    compared, notes = comparison.of_folders(runs, at_mib=at_mib, to_accuracy=target)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    if style == "markdown":
        click.echo(tables.markdown(compared), nl=False)
        return
    if style == "csv":
        click.echo(tables.comma_separated(compared), nl=False)
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    for table in tables.terminal(compared, width=console.width):
        console.print(table)
    lines = [*compared.notes]
    if any(len(several) > 1 for several in compared.measures):
        lines.insert(0, "mean ± deviation over seeds.")
    lines += [
        f"* {members.label}: {state}"
        for members in compared.groups
        if (state := groups.states(members))
    ]
    for line in (*lines, headline.sentence(compared)):
        console.print(line, soft_wrap=not console.is_terminal, highlight=False, markup=False)
