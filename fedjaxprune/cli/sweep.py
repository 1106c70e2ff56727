"""The command ``fedjaxprune sweep``: many runs from one file."""

from collections.abc import Mapping
from typing import Any

import click

from fedjaxprune.cli import compare, running
from fedjaxprune.errors import FedJaxPruneError
from fedjaxprune.experiment.folder.layout import path_of


@click.command()
@click.argument("file")
@click.option(
    "--folder",
    default=None,
    metavar="FOLDER",
    help="Folder of the run folders  [default: the file's `folder`, or runs/ and the file's name].",
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="INTEGER",
    help="Processes that run members side by side, each on its share of the cores.",
)
@running.TRACK
@compare.options
def sweep(
    file: str,
    folder: str | None,
    jobs: int,
    track: tuple[str, ...],
    at_mib: float | None,
    to_accuracy: float | None,
) -> None:
    """Make many runs from one FILE and compare them.

    FILE is a YAML file of settings as for `run`, where a list stands for a run with each of its
    values; docs/reference/report.md explains it. What has been run is not run again, and an
    interrupted run continues, so the command can be repeated until everything is there. A run that
    fails does not stop the others.
    """
    from fedjaxprune.experiment.sweeps import execute, plan
    from fedjaxprune.experiment.tracking import tracker

    read = plan.read(file, folder=path_of(folder) if folder else None)
    for note in read.notes:
        click.echo(f"note: {note}", err=True)
    trackers = tracker.find(track)

    def how_to_continue() -> str:
        if all(execute.is_finished(member) for member in read.members):
            return ""
        return f"continue the sweep with `fedjaxprune sweep {file}`"

    failed: dict[str, str] = {}  # also of a sweep that a signal met when its last run had ended
    with running.watched(how_to_continue) as watch:

        def listen() -> Any:
            watch.begin()
            return running.progress(details=False, is_member=True)

        audience = execute.Audience(
            listen=listen, note=click.echo, warn=lambda text: click.echo(text, err=True)
        )
        try:
            if jobs == 1:
                failed = execute.one_by_one(read, audience, trackers=trackers, stop=watch.stop)
            else:
                failed = execute.side_by_side(read, audience, jobs=jobs, track=track)
        except (KeyboardInterrupt, SystemExit):
            click.echo(f"continue the sweep with `fedjaxprune sweep {file}`.", err=True)
            raise SystemExit(running.INTERRUPTED) from None
    folders = [member.folder for member in read.members if member.folder.is_dir()]
    try:
        if folders:
            compare.show(folders, at_mib=at_mib, to_accuracy=to_accuracy)
    except FedJaxPruneError as error:  # different data sets, say: the runs are there all the same
        click.echo(f"note: {error}", err=True)
    click.echo(f"results: {read.folder}")
    _tell(failed, file, num_runs=len(read.members))
    if failed:
        raise SystemExit(1)


def _tell(failed: Mapping[str, str], file: str, *, num_runs: int) -> None:
    """Say which runs failed, and which are left to another process."""
    from fedjaxprune.experiment.sweeps import execute

    busy = [name for name, why in failed.items() if why == execute.BUSY]
    names = [f"{name} ({why})" for name, why in failed.items() if name not in busy]
    if names:
        said = f"{len(names)} of {num_runs} runs failed: {'; '.join(names)}"
        click.echo(f"error: {said}", err=True)
    if busy:
        click.echo(
            f"error: {len(busy)} of {num_runs} runs left to another process, such as another sweep "
            f"in this folder: {'; '.join(busy)}. Once it has ended, repeat `fedjaxprune sweep "
            f"{file}`.",
            err=True,
        )
