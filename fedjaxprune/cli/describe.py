"""The command ``fedjaxprune describe``."""

import click


@click.command()
@click.argument("name")
def describe(name: str) -> None:
    """Describe a part: what it is, its settings, needs and variants, and a command.

    NAME is a method, model, data set or other part of `fedjaxprune list`, KIND/NAME, FILE.py:NAME
    or MODULE:NAME.
    """
    from fedjaxprune.experiment.config import describe as describing

    click.echo(str(describing.describe(name)))
