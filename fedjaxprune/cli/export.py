"""The command ``fedjaxprune export``."""

import click

from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.folder.layout import path_of


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--out", default=None, metavar="FOLDER", help="A new folder  [default: RUN/export].")
def export(run: str, out: str | None) -> None:
    """Take the network out of the run in the folder RUN.

    Writes the network of the newest checkpoint with dead channels removed: its weights and masks
    (safetensors), the whole network as a program for any batch (StableHLO), and a model card. The
    run is not touched, and may still be going on. The data set is not needed.
    """
    if "" in (run, out):
        raise ConfigError("RUN and --out must not be empty.")
    folder = path_of(run)
    target = path_of(out) if out else folder / "export"
    from fedjaxprune.experiment.execution import compilation_cache

    with compilation_cache.kept():
        from fedjaxprune.experiment.exporting import export as exporting
        from fedjaxprune.experiment.exporting import model_card

        facts = exporting.export(
            folder, target, warn=lambda text: click.echo(f"warning: {text}", err=True)
        )
    before, after = facts.num_weights
    completed, planned = facts.num_rounds
    if completed < planned:
        click.echo(f"the run is at round {completed} of {planned}.")
    if facts.small.changes:
        click.echo(f"dead channels removed: {before:,} parameters become {after:,}.")
    else:
        click.echo("no channel is dead everywhere it appears: the network is left as it is.")
    if facts.small.is_constant:
        click.echo(
            "warning: the masks cut the network off from its inputs; its outputs never change.",
            err=True,
        )
    for why, counts in model_card.by_reason(facts.small.remainders).items():
        places = ", ".join(f"{path} ({count})" for path, count in counts.items())
        click.echo(f"  pruned filters that stay: {places}: {why}")
    click.echo(
        f"largest difference on {facts.difference.num_checked} random inputs: "
        f"{facts.difference.relative:.1e} of the largest output"
    )
    for name, size in facts.sizes.items():
        if name != "dense":
            click.echo(f"  {name}: {size:,} bytes")
    click.echo(f"exported to: {target}")
