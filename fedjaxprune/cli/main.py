"""The command ``fedjaxprune``, put together from its commands.

Whatever the user gets wrong is one sentence on stderr and exit status 2. JAX is imported only by
the commands that need it, when they are at work.
"""

import os
import sys
from collections.abc import Sequence

import click

from fedjaxprune import __version__
from fedjaxprune.cli import compare, conformance, export, run, running, show, sweep
from fedjaxprune.cli.options import explain_option
from fedjaxprune.errors import FedJaxPruneError, near_miss, visible

USAGE = 2  # exit status


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fedjaxprune")
def cli() -> None:
    """Train and prune federated models, one compiled round at a time."""


for _command in (
    run.run,
    sweep.sweep,
    show.list_,
    show.describe,
    show.validate,
    show.schema,
    conformance.conformance,
    compare.compare,
    compare.report,
    export.export,
):
    cli.add_command(_command)


def _sentence(error: click.ClickException, args: Sequence[str]) -> str:
    """Turn click's complaint about `args` into one sentence."""
    context = getattr(error, "ctx", None)
    command = "fedjaxprune " + args[0] if args and args[0] in cli.commands else "fedjaxprune"
    if isinstance(error, click.NoSuchOption):
        return explain_option(error, command)
    if args and context and context.command is cli:  # click's own hint would be a second sentence
        hint = near_miss(args[0], cli.commands)
        return f"unknown command {args[0]!r}: must be one of {', '.join(cli.commands)}{hint}"
    text = error.format_message().rstrip(".")
    return f"{text[:1].lower()}{text[1:]}: see `{command} --help`."


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; the entry point of the package."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when JAX is imported
    try:
        cli.main(args=args, prog_name="fedjaxprune", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        text = error.format_message()
    except click.ClickException as error:
        text = f"error: {_sentence(error, sys.argv[1:] if args is None else args)}"
    except FedJaxPruneError as error:
        text = f"error: {error}"
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted before the run began.", err=True)
        sys.exit(running.INTERRUPTED)
    else:
        return
    click.echo(visible(text), err=True)
    sys.exit(USAGE)
