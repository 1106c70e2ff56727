"""What the commands that run something share: trackers and progress on the terminal."""

import contextlib
import pathlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import click

from fedjaxprune.experiment.config.sections import RunConfig
from fedjaxprune.experiment.execution import signals

INTERRUPTED = 130  # exit status

TRACK = click.option(
    "--track",
    multiple=True,
    metavar="TRACKER",
    help="Follow the run elsewhere, too: tensorboard, wandb, mlflow, or a function of a line of "
    "the record; may be repeated.",
)


@contextlib.contextmanager
def watched(how_to_continue: Callable[[], str]) -> Iterator[signals.Watch]:
    """Watch for signals that end a run early; say how to continue, and exit with their status."""

    def words(number: int) -> str:
        return f"stopped by {signal.Signals(number).name}; {how_to_continue()}."

    number = None
    try:
        with signals.watched(last_words=words) as watch:
            yield watch
            number = watch.came()
    except signals.Stopped as stopped:
        number = stopped.number
    if number is not None and how_to_continue():
        click.echo(words(number), err=True)
        raise SystemExit(signals.status(number))


@contextlib.contextmanager
def progress(
    *,
    details: bool,
    is_member: bool,
    begin: Callable[[RunConfig, pathlib.Path], object] = lambda config, folder: None,
) -> Iterator[Any]:
    """Set JAX up, and open a listener that prints how a run goes.

    With details its last table has everything that was measured; a member of a sweep has no such
    table, as the results are compared at the end. `begin` is called when a run begins.
    """
    from rich.console import Console

    from fedjaxprune.experiment.execution import compilation_cache
    from fedjaxprune.experiment.tracking import progress as shown

    with (
        compilation_cache.kept(),
        shown.report(Console(), Console(stderr=True), details=details) as listener,
    ):

        def tell(config: RunConfig, folder: pathlib.Path) -> None:
            begin(config, folder)
            listener.begin(config, folder)

        told = listener._replace(begin=tell)
        yield told._replace(finish=lambda *run: None) if is_member else told
