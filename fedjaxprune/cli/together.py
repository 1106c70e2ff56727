"""Options of a command that is one of several processes of a run."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from fedjaxprune.experiment.execution.channel import HEARTBEAT_S

if TYPE_CHECKING:
    from fedjaxprune.experiment.execution.joining import Membership

_OPTIONS = (
    click.option(
        "--coordinator",
        metavar="HOST:PORT|auto",
        help="Be one of several processes: where number 0 is.",
    ),
    click.option("--num-processes", type=int, metavar="INTEGER", help="How many processes."),
    click.option(
        "--process-id",
        type=int,
        metavar="INTEGER",
        help="Which one this is; 0 writes and prints.",
    ),
    click.option(
        "--heartbeat",
        type=float,
        default=HEARTBEAT_S,
        show_default=True,
        metavar="SECONDS",
        help="How long one may be silent.",
    ),
)


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def membership(values: dict[str, Any]) -> "Membership | None":
    """Take what the options say out of `values`; None for a run of one process."""
    from fedjaxprune.experiment.execution import joining

    names = ("coordinator", "num_processes", "process_id", "heartbeat")
    return joining.membership(*(values.pop(name) for name in names))
