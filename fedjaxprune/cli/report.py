"""The command ``fedjaxprune report``: a page about runs."""

import click

from fedjaxprune.cli import compare
from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.folder.layout import path_of


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@compare.options
@click.option(
    "--out",
    default="report.html",
    show_default=True,
    metavar="FILE",
    help="The page; an existing file is replaced.",
)
def report(
    runs: tuple[str, ...], at_mib: float | None, to_accuracy: float | None, out: str
) -> None:
    """Write one HTML page about runs: tables, pictures, the configs. It needs no network.

    A RUN is a run folder, or a folder of run folders. Runs that differ only in their seed are one
    curve, their mean, with a band. Running, interrupted and failed runs are shown, too.
    """
    try:
        from fedjaxprune.experiment.analysis.report import page
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "plotly":
            raise
        raise ConfigError(
            "report needs the package plotly: install it with `pip install 'fedjaxprune[report]'`."
        ) from None
    if not out:
        raise ConfigError("--out must be a text that is not empty, got ''.")
    path = path_of(out)
    target = None if to_accuracy is None else to_accuracy / 100
    for note in page.of_folders(runs, path, at_mib=at_mib, to_accuracy=target):
        click.echo(f"note: {note}", err=True)
    click.echo(f"report: {path}")
