"""What the commands that run something share: trackers, progress on the terminal, interruptions."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

INTERRUPTED = 130  # exit status

TRACK = click.option(
    "--track",
    multiple=True,
    metavar="TRACKER",
    help="Follow the run elsewhere, too: tensorboard, wandb, mlflow, or a function of a line of "
    "the record as MODULE:NAME or FILE.py:NAME; may be given more than once.",
)


def trackers(names: Sequence[str]) -> Mapping[str, Any]:
    """Look up trackers by name; without any, nothing is imported."""
    if not names:
        return {}
    from fedjaxprune.experiment.tracking import tracker

    return tracker.find(names)


@contextlib.contextmanager
def progress(*, details: bool, is_member: bool) -> Iterator[Any]:
    """Set JAX up, and open a listener that prints how a run goes.

    Args:
      details: whether its last table has everything that was measured.
      is_member: whether it is one of a sweep, whose results are compared at the end.
    """
    from rich.console import Console

    from fedjaxprune.experiment.execution import compilation_cache
    from fedjaxprune.experiment.tracking import progress as shown

    with (
        compilation_cache.kept(),
        shown.report(Console(), Console(stderr=True), details=details) as listener,
    ):
        yield listener._replace(finish=lambda *run: None) if is_member else listener


@contextlib.contextmanager
def interruptible(folder: pathlib.Path) -> Iterator[None]:
    """Say how to continue a run that its user interrupts."""
    try:
        yield
    except KeyboardInterrupt:
        if not (folder / "config.yaml").exists():
            raise
        click.echo(f"interrupted; continue with `fedjaxprune run --resume {folder}`.", err=True)
        raise SystemExit(INTERRUPTED) from None
