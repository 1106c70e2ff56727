"""``run`` and ``list`` of the flat configuration, until they read the nested one.

Options are made from the fields of `RunConfig`. Whatever the user gets wrong is one sentence on
stderr and exit status 2. JAX is imported only when a run is about to be put together.
"""

from collections.abc import Callable, Sequence
from typing import Any

import click

from fedjaxprune.cli import viewing
from fedjaxprune.experiment import methods
from fedjaxprune.experiment.config.flat import files, identity, validation
from fedjaxprune.experiment.config.flat.sections import RunConfig, UserError
from fedjaxprune.experiment.run import launch


class _GroupedCommand(click.Command):
    """A command whose help lists options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the settings by group, then the command's own options."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, click.Argument):
                continue  # the usage line and the text speak of it
            row = param.get_help_record(ctx)
            field = RunConfig.model_fields.get(param.name or "")
            if row is not None:
                heading = "Command" if field is None else _extra(field)["group"]
                groups.setdefault(heading, []).append(row)
        for heading, rows in groups.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


def _extra(field: Any) -> dict[str, Any]:
    """Read the group and unit of a field."""
    return field.json_schema_extra


def _setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one option for every field of the config."""
    for name, field in reversed(RunConfig.model_fields.items()):
        option = "--" + name.replace("_", "-")
        notes = [_extra(field)["unit"], _range(name), f"default: {_default(field)}"]
        text = f"{field.description}  [{'; '.join(note for note in notes if note)}]"
        if validation.is_flag(name):
            declaration = f"{option}/--no-{name.replace('_', '-')}"
            decorate = click.option(declaration, name, default=None, help=text)
        else:
            instead = validation.word(name)
            kind = _kind(name) if instead is None else f"{instead}|{_kind(name)}"
            metavar = "|".join(validation.alternatives(name)) or kind
            decorate = click.option(option, name, default=None, metavar=metavar, help=text)
        command = decorate(command)
    return command


def _default(field: Any) -> str:
    """Say what a setting is if nobody sets it."""
    words = {True: "yes", False: "no", None: "none"}
    value = field.default
    text = words[value] if value is None or isinstance(value, bool) else f"{value}"
    return _extra(field)["default"] or text


def _range(name: str) -> str:
    """Say between what a number lies."""
    return validation.limits(name) if _kind(name) != "TEXT" else ""


def _kind(name: str) -> str:
    """Name the type of a setting for the help."""
    return {"an integer": "INTEGER", "a number": "NUMBER"}.get(validation.kind(name), "TEXT")


@click.command(cls=_GroupedCommand)
@click.argument("source", required=False, metavar="[PRESET or FILE.yaml]")
@_setting_options
@click.option(
    "--resume",
    is_flag=False,
    flag_value="",
    default=None,
    metavar="[FOLDER]",
    help="Continue the run in FOLDER (or in --out) with the config that it holds, to the same bits "
    "as if it had never stopped. Settings that are given besides must agree with that config, the "
    "number of rounds included.",
)
@viewing.TRACK
def run(source: str | None, resume: str | None, track: tuple[str, ...], **options: Any) -> None:
    """Run one experiment and write its folder.

    Settings come from the defaults, then from the preset or YAML file, then from the options; with
    none at all, FedDIP runs on the scanned digits that ship with scikit-learn. `fedjaxprune list`
    names the presets.
    """
    values, sources = _given(source, options)
    trackers = viewing.trackers(track)
    if resume is None:
        config = validation.validate(values, sources=sources)
        _say_what_is_idle([name for name, value in options.items() if value is not None], config)
        launch.start(config, trackers=trackers, show=launch.show_table)
    else:
        given = validation.validate_each(values, sources=sources)
        if resume and given.out and launch.path(resume) != launch.path(given.out):
            raise UserError(
                f"resume: --resume names the folder {resume!r} and out {given.out!r}; give one."
            )
        folder = resume or given.out
        if not folder:
            raise UserError("resume: got no folder; give one as `--resume FOLDER`.")
        launch.resume(launch.path(folder), values, given, trackers=trackers, show=launch.show_table)


def _given(source: str | None, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Collect what was set on the command line and in the source, and where each came from."""
    values = {} if source is None else files.read_source(source)
    sources = {name: str(source) for name in values}
    for name, value in options.items():
        if value is not None:
            is_unset = validation.is_optional(name) and value == "none"
            values[name] = None if is_unset else value
            sources[name] = "--" + name.replace("_", "-")
    return values, sources


def _say_what_is_idle(given: Sequence[str], config: RunConfig) -> None:
    """Warn of settings that were given and that nothing in this run reads."""
    settings = config.model_dump()
    idle = [n for n in given if n not in identity.NEUTRAL and not identity.matters(n, settings)]
    if idle:
        click.echo(
            f"warning: without effect in this run of {config.algorithm!r}: {', '.join(idle)} "
            "(`fedjaxprune list` names each method's own settings).",
            err=True,
        )


@click.command(name="list")
@click.option("--data-dir", default=None, metavar="TEXT", help="Folder of prepared TFDS data.")
def list_(data_dir: str | None) -> None:
    """List algorithms, models, data sets and presets."""
    with launch.jax_set_up():
        from fedjaxprune.data.sources import tfds
        from fedjaxprune.experiment import summaries
        from fedjaxprune.experiment.run import build

        if data_dir == "":
            raise UserError("data_dir must be a text that is not empty, got ''.")
        prepared = tfds.prepared(data_dir)
        searched, named_by = tfds.folder_of(data_dir)
    names = {
        "algorithms": {name: summaries.SUMMARIES[name] for name in build.ALGORITHMS},
        "models": {name: summaries.SUMMARIES[name] for name in build.MODELS},
        f"data sets (prepared ones from {searched}, {named_by})": {
            "digits": "8x8 scanned digits inside scikit-learn; no download",
            **{name: "prepared TFDS set" for name in prepared if name != "digits"},
            "...": "any TFDS image-classification set, once prepared",
        },
        "presets": {
            name: text.splitlines()[0].lstrip("# ") for name, text in files.preset_texts().items()
        },
    }
    for heading, rows in names.items():
        click.echo(f"{heading}:")
        width = max(len(name) for name in rows)
        for name, summary in rows.items():
            click.echo(f"  {name:<{width}}  {summary}")
            for more in _details(name) if heading == "algorithms" else ():
                click.echo(f"  {'':<{width}}    {more}")


def _details(algorithm: str) -> list[str]:
    """Say which settings are a method's own, what it needs, and what it gets."""
    parts = {
        "settings": ", ".join(identity.knobs(algorithm)),
        "needs": methods.needs(algorithm),
        "network by default": methods.default_network({"algorithm": algorithm}),
    }
    return [f"{name}: {text}" for name, text in parts.items() if text]
