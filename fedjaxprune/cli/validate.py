"""The command ``fedjaxprune validate``."""

import click


@click.command()
@click.argument("file")
def validate(file: str) -> None:
    """Check a preset, the YAML file of a run, or that of a sweep, without running anything."""
    from fedjaxprune.experiment.config import files, resolve
    from fedjaxprune.experiment.sweeps import plan

    values = files.load_source(file)
    if plan.is_sweep(values):
        members = plan.read(file, folder=None).members
        click.echo(f"ok: {file} is a sweep of {len(members)} runs.")
        return
    config = resolve.resolve(files.read_source(file))
    names = [
        found.name for found in (config.parts.method, config.parts.model, config.parts.dataset)
    ]
    click.echo(f"ok: {file} runs {names[0]} with {names[1]} on {names[2]}.")
