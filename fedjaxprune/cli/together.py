"""Options of a command that is one of several processes of a run."""

from collections.abc import Callable
from typing import Any

import click

from fedjaxprune.experiment.execution import joining
from fedjaxprune.experiment.execution.joining import Membership
from fedjaxprune.experiment.execution.processes import HEARTBEAT_S

_OPTIONS = (
    click.option(
        "--coordinator",
        metavar="HOST:PORT|auto",
        help="Run in several processes, each started with this command: where process 0 listens, "
        "or auto where SLURM, Open MPI, Kubernetes or a TPU pod says it.",
    ),
    click.option(
        "--num-processes", type=int, metavar="INTEGER", help="With --coordinator: how many."
    ),
    click.option(
        "--process-id",
        type=int,
        metavar="INTEGER",
        help="With --coordinator: which one this is, from 0. Process 0 writes the folder and "
        "prints.",
    ),
    click.option(
        "--heartbeat",
        type=float,
        default=HEARTBEAT_S,
        show_default=True,
        metavar="SECONDS",
        help="With --coordinator: how long a process may be silent before the others end.",
    ),
)


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def membership(values: dict[str, Any]) -> Membership | None:
    """Take what the options say out of `values`; None for a run of one process."""
    names = ("coordinator", "num_processes", "process_id", "heartbeat")
    return joining.membership(*(values.pop(name) for name in names))
