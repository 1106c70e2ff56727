"""Options of a command that is one of several processes of a run."""

from collections.abc import Callable
from typing import Any

import click

from fedjaxprune.errors import ConfigError
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
        default=None,
        metavar="SECONDS",
        help="With --coordinator: how long a process may be silent before the others end.  "
        f"[default: {HEARTBEAT_S:g}]",
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
    where, number, index, heartbeat_s = (values.pop(name) for name in names)
    if where is not None:
        seconds = HEARTBEAT_S if heartbeat_s is None else heartbeat_s
        return Membership(where, number, index, seconds)
    given = {"--num-processes": number, "--process-id": index, "--heartbeat": heartbeat_s}
    if unused := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"{unused[0]} needs --coordinator HOST:PORT.")
    return None
