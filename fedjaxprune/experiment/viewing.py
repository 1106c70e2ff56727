"""The commands that look at runs, ``report`` and ``compare``, and ``sweep``, which makes many.

As in `cli`, what is heavy is imported only when a command is at work.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import click

from fedjaxprune.experiment import launch
from fedjaxprune.experiment.config import UserError

_WIDE = 200  # columns of a table that goes into a file

TRACK = click.option(
    "--track",
    multiple=True,
    metavar="TRACKER",
    help="Follow the run elsewhere, too: tensorboard, wandb, mlflow, or a function of a line of "
    "the record as module:function; may be given more than once.",
)


def trackers(names: Sequence[str]) -> launch.Openers:
    """Look up trackers by name; without any, nothing is imported."""
    if not names:
        return {}
    from fedjaxprune.experiment import tracking

    return tracking.find(names)


def _measured(command: Any) -> Any:
    """Give a command the options of a comparison."""
    for decorate in (
        click.option(
            "--accuracy",
            type=click.FloatRange(0, 100, min_open=True),
            metavar="NUMBER",
            help="Accuracy to which bytes and rounds are counted, in per cent; unset: what all "
            "reach, rounded down.",
        ),
        click.option(
            "--mib",
            type=click.FloatRange(0, min_open=True),
            metavar="NUMBER",
            help="Traffic at which accuracies are compared, in MiB of both ways and all clients; "
            "unset: the least that a run has sent in all.",
        ),
    ):
        command = decorate(command)
    return command


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@_measured
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "markdown", "csv"]),
    default="table",
    help="How to write it.",
)
def compare(runs: tuple[str, ...], mib: float | None, accuracy: float | None, style: str) -> None:
    """Compare runs in a table: accuracy at equal bytes, bytes and rounds to an accuracy.

    A RUN is a run folder, or a folder of run folders. Runs that differ in nothing but the seed are
    one row: the mean, and the deviation over the seeds.
    """
    show_comparison(runs, mib=mib, accuracy=accuracy, style=style)


def show_comparison(
    runs: Sequence[str | pathlib.Path],
    *,
    mib: float | None = None,
    accuracy: float | None = None,
    style: str = "table",
) -> None:
    """Print the comparison of runs, and on stderr what must be known of it."""
    from rich.console import Console

    from fedjaxprune.experiment import comparison, tables
    from fedjaxprune.experiment import runs as runs_

    found, notes = runs_.read_all(runs)
    groups, more = comparison.group(found)
    target = None if accuracy is None else accuracy / 100
    compared = comparison.compare(groups, budget=mib, target=target)
    for note in (*notes, *more):
        click.echo(f"note: {note}", err=True)
    if style == "markdown":
        click.echo(tables.markdown(compared), nl=False)
    elif style == "csv":
        click.echo(tables.comma_separated(compared), nl=False)
    else:
        console = Console()
        if not console.is_terminal:
            console = Console(width=_WIDE)
        for table in tables.terminal(compared):
            console.print(table)
        if any(len(members.runs) > 1 for members in groups):
            console.print("mean ± deviation over seeds", style="italic", highlight=False)
        for members in groups:
            if state := comparison.states(members):
                console.print(f"* {members.label}: {state}", soft_wrap=True, highlight=False)


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@_measured
@click.option(
    "--out",
    default="report.html",
    show_default=True,
    metavar="FILE",
    help="The page; one that is there already is replaced.",
)
def report(runs: tuple[str, ...], mib: float | None, accuracy: float | None, out: str) -> None:
    """Write one HTML page about runs: pictures, a table, the configs. It needs no network.

    A RUN is a run folder, or a folder of run folders. Runs that differ in nothing but the seed are
    one curve, their mean with a band. Runs that are still going, or that failed, can be looked at,
    too.
    """
    try:
        from fedjaxprune.experiment.report import page
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "plotly":
            raise
        raise UserError(
            "report needs the package plotly: install it with `pip install 'fedjaxprune[report]'`."
        ) from None
    from fedjaxprune.experiment import runs as runs_

    path = launch.path(out)
    found, notes = runs_.read_all(runs)
    target = None if accuracy is None else accuracy / 100
    text, more = page.make(found, budget=mib, target=target)
    for note in (*notes, *more):
        click.echo(f"note: {note}", err=True)
    page.write(path, text)
    click.echo(f"report: {path}")


COMMANDS = (report, compare)
