"""What the commands that run something share: trackers and progress on the terminal."""

import contextlib
from collections.abc import Iterator
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


@contextlib.contextmanager
def progress(*, details: bool, is_member: bool) -> Iterator[Any]:
    """Set JAX up, and open a listener that prints how a run goes.

    With details its last table has everything that was measured; a member of a sweep has no such
    table, as the results are compared at the end.
    """
    from rich.console import Console

    from fedjaxprune.experiment.execution import compilation_cache
    from fedjaxprune.experiment.tracking import progress as shown

    with (
        compilation_cache.kept(),
        shown.report(Console(), Console(stderr=True), details=details) as listener,
    ):
        yield listener._replace(finish=lambda *run: None) if is_member else listener
