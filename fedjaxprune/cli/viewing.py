"""The commands that look at runs, ``report`` and ``compare``, and ``sweep``, which makes many.

As in `cli`, what is heavy is imported only when a command is at work.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import click

from fedjaxprune.experiment.config.flat.sections import UserError
from fedjaxprune.experiment.run import launch

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
    from fedjaxprune.experiment.tracking import tracker

    return tracker.find(names)


def _finite(context: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Refuse what passes as a number, and within limits, but is none: nan and inf."""
    del context
    if value is not None and not math.isfinite(value):
        raise UserError(f"--{param.name} must be a finite number, got {value}.")
    return value


def _measured(command: Any) -> Any:
    """Give a command the options of a comparison."""
    for decorate in (
        click.option(
            "--accuracy",
            type=click.FloatRange(0, 100, min_open=True),
            callback=_finite,
            metavar="NUMBER",
            help="Accuracy to which bytes and rounds are counted, in per cent; unset: what all "
            "reach, rounded down.",
        ),
        click.option(
            "--mib",
            type=click.FloatRange(0, min_open=True),
            callback=_finite,
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

    from fedjaxprune.experiment.analysis import compare as comparison
    from fedjaxprune.experiment.analysis import tables
    from fedjaxprune.experiment.folder import load as runs_

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
        from fedjaxprune.experiment.analysis.report import page
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "plotly":
            raise
        raise UserError(
            "report needs the package plotly: install it with `pip install 'fedjaxprune[report]'`."
        ) from None
    from fedjaxprune.experiment.folder import load as runs_

    if not out:
        raise UserError("out must be a text that is not empty, got ''.")
    path = launch.path(out)
    found, notes = runs_.read_all(runs)
    target = None if accuracy is None else accuracy / 100
    text, more = page.make(found, budget=mib, target=target)
    for note in (*notes, *more):
        click.echo(f"note: {note}", err=True)
    page.write(path, text)
    click.echo(f"report: {path}")


@click.command()
@click.argument("file")
@click.option(
    "--out",
    default=None,
    metavar="FOLDER",
    help="Folder of the run folders; unset: the file's `out`, or runs/ and the file's name.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="INTEGER",
    help="Processes that play runs side by side, each on its share of the cores.",
)
@TRACK
@_measured
@click.option("--member", default=None, hidden=True)  # what a process of --jobs is to play
def sweep(
    file: str,
    out: str | None,
    jobs: int,
    track: tuple[str, ...],
    mib: float | None,
    accuracy: float | None,
    member: str | None,
) -> None:
    """Make many runs from one FILE and compare them.

    FILE is a YAML file of settings as for `run`, where a list stands for a run with each of its
    values; docs/report.md explains it. What has been run is not run again, and what was broken off
    goes on, so the command can be repeated until everything is there. A run that fails does not
    stop the others.
    """
    from fedjaxprune.experiment.sweeps import execute
    from fedjaxprune.experiment.sweeps import flat_plan as sweeps

    plan = sweeps.read(file, out=launch.path(out) if out else None)
    openers = trackers(track)
    if member is not None:
        if (why := execute.only(plan, member, trackers=openers)) is not None:
            click.echo(f"failed: {member}: {why}", err=True)
            raise SystemExit(1)
        return
    try:
        if jobs == 1:
            failed = execute.one_by_one(plan, trackers=openers)
        else:
            failed = execute.side_by_side(plan, jobs=jobs, track=track)
    except (KeyboardInterrupt, SystemExit):
        click.echo(f"the sweep goes on with `fedjaxprune sweep {file}`.", err=True)
        raise SystemExit(launch.INTERRUPTED) from None
    folders = [plan.folder / one.name for one in plan.members]
    made = [folder for folder in folders if folder.is_dir()]
    try:
        if made:
            show_comparison(made, mib=mib, accuracy=accuracy)
    except UserError as error:  # different data sets, say: the runs are there all the same
        click.echo(f"note: {error}", err=True)
    click.echo(f"results: {plan.folder}")
    if failed:
        names = "; ".join(f"{name} ({why})" for name, why in failed.items())
        click.echo(f"error: {len(failed)} of {len(plan.members)} runs failed: {names}", err=True)
        raise SystemExit(1)


COMMANDS = (report, compare, sweep)
