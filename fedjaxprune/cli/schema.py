"""The command ``fedjaxprune schema``."""

import json

import click


@click.command()
def schema() -> None:
    """Write the JSON schema of configurations with the parts that are installed, for editors."""
    from fedjaxprune.experiment.config import json_schema

    click.echo(json.dumps(json_schema.schema(), indent=2))
