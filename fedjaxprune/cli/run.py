"""The command ``fedjaxprune run``: a run from a preset or a file and options.

Its options are the settings of this very run: the parts that the arguments name are looked up
first, then options are made of their settings. Help that names no part imports none.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import click

from fedjaxprune import registry
from fedjaxprune.cli import running, together
from fedjaxprune.cli.options import is_flag, options, read_options, settings_of
from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.config import files, resolve
from fedjaxprune.experiment.config.sections import PLACES, RunConfig
from fedjaxprune.experiment.folder import layout

# Sections with hardly more than a part stand under one heading.
_HEADINGS = {
    "method": "Method and network",
    "model": "Method and network",
    "uplink": "Messages",
    "downlink": "Messages",
}


class Command(click.Command):
    """``run``: reads which parts are named before it knows its options."""

    config_type: type[RunConfig] = RunConfig
    parts: Mapping[str, registry.Found] = MappingProxyType({})

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> click.Context:
        """Look up the parts that the arguments name, and read the arguments with their settings."""
        seen = _scan(args)
        has_help = bool({"-h", "--help"} & set(args))
        command = Command(self.name, callback=self.callback, help=self.help)
        if seen.names.values or seen.source or not has_help:
            base, started_in = _base(seen)
            with registry.as_started_in(started_in):
                found = resolve.find_parts(resolve.merge(base, seen.names))
            command.config_type, command.parts = found.type, found.parts
        command.params = [*options(command.config_type), *self.params]
        return click.Command.make_context(command, info_name, args, parent, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read options with dashes or underscores alike; of one given again the last counts."""
        ctx.token_normalize_func = lambda text: text.replace("_", "-")
        words = {arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")}
        for param in self.params:
            names = [name for name in (*param.opts, *param.secondary_opts) if name in words]
            if len(names) > 1:
                raise ConfigError(
                    f"one of {' and '.join(names)} must be left out: they set the same."
                )
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the settings by section, then the command's own options."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            row = None if isinstance(param, click.Argument) else param.get_help_record(ctx)
            if row is None:
                continue
            heading, names = "Command", row[0]
            if (one := getattr(param, "setting", None)) is not None:
                section, short = str(one.path.partition(".")[0]), min(param.opts, key=len)
                heading = _HEADINGS.get(section, section.capitalize())
                last = f"/ --no-{short[2:]}" if param.secondary_opts else names.rpartition(" ")[2]
                names = f"{short} {last}"
            groups.setdefault(heading, []).append((names, row[1]))
        for heading, rows in groups.items():
            with formatter.section(heading):
                formatter.write_dl(rows, col_max=28)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Say where the settings of parts are described."""
        name = self.parts["method"].name if self.parts else PLACES["method"].default
        formatter.write_paragraph()
        formatter.write_text(
            "Each setting may also be given by its full path, as --client.batch-size."
        )
        formatter.write_text(f"settings of the chosen parts: `fedjaxprune describe {name}`")


class _Seen(NamedTuple):
    """What arguments say at first sight: the source, names of parts, and folder to resume."""

    source: str
    names: resolve.Given
    resumed: str


def _scan(args: Sequence[str]) -> _Seen:
    """Find the source and the names of parts in arguments whose options are not known yet."""
    parts = {f"--{one.replace('_', '-')}": one for one in PLACES}
    parts |= {f"--{place.kind.replace('_', '-')}": path for path, place in PLACES.items()}
    flags = {"-h", "--help", "--details"}
    for one in settings_of(RunConfig):
        if is_flag(one):
            flags |= {f"--{name.replace('_', '-')}" for name in (one.name, one.path)}
    names, sources, source, folder, is_resumed, resumed = {}, {}, "", "", False, ""
    rest = list(args)
    while rest:
        token = rest.pop(0)
        option, has_value, value = token.partition("=")
        option = option.replace("_", "-").removesuffix(".name")
        if not token.startswith("-"):
            source = source or token
            continue
        stands_alone = option in flags or option.startswith("--no-")
        if not has_value and rest and not stands_alone and not rest[0].startswith("--"):
            is_source = option not in parts and rest[0].endswith((".yaml", ".yml"))
            value = "" if is_source else rest.pop(0)
        if option in parts and value:
            path = f"{parts[option]}.name"
            names[path], sources[path] = value, option
        elif option == "--folder":
            folder = value
        elif option == "--resume":
            is_resumed, resumed = True, value
    given = resolve.Given(names, sources)
    return _Seen(source, given, (resumed or folder) if is_resumed else "")


def _base(seen: _Seen) -> tuple[resolve.Given, str]:
    """Read what comes before the options: a preset or file, or the config of a run to resume.

    And where that run was started.
    """
    base, started_in = resolve.Given({}), ""
    if seen.resumed:
        path = layout.path_of(seen.resumed) / layout.CONFIG
        if os.path.isfile(path):  # else resuming says what is wrong
            stored = layout.stored(path.parent)
            base, started_in = resolve.read(stored.values, source=str(path)), stored.started_in
    if seen.source:
        base = resolve.merge(base, files.read_source(seen.source))
    return base, started_in


@click.command(cls=Command)
@click.argument("source", required=False, metavar="[PRESET or FILE.yaml]")
@click.option("--folder", metavar="FOLDER", help="New run folder  [default: one in runs/]")
@click.option(
    "--resume",
    is_flag=False,
    flag_value="",
    default=None,
    metavar="[FOLDER]",
    help="Continue the run in FOLDER, or in --folder, with its config, to the same bits as if it "
    "had never stopped.",
)
@click.option(
    "--allow",
    type=click.Choice(["restart", "environment"]),
    multiple=True,
    help="With --resume: restart at round 1 without a checkpoint, or continue with other bits "
    "under other options of JAX or XLA.",
)
@click.option("--details", is_flag=True, help="Show everything that was measured at the end.")
@running.TRACK
@together.options
@click.pass_context
def run(
    context: click.Context,
    source: str | None,
    folder: str | None,
    resume: str | None,
    allow: tuple[str, ...],
    **values: Any,
) -> None:
    """Run one experiment and write its folder.

    Settings come from the defaults, then from the preset or YAML file, then from the options.
    `fedjaxprune list` names presets and parts; a part is also FILE.py:NAME or MODULE:NAME.
    """
    command: Any = context.command
    membership = together.membership(values)
    given = read_options(command, values)
    if allow and resume is None:
        raise ConfigError(f"--allow {allow[0]} needs --resume.")
    if source:
        given = resolve.merge(files.read_source(source), given)
    from fedjaxprune.experiment.tracking import tracker

    trackers, details = tracker.find(values.pop("track")), values.pop("details")
    for name, text in {"--folder": folder, "--resume": resume}.items():
        if text == "" and not (name == "--resume" and folder):
            raise ConfigError(f"{name} must be a folder, got none.")
    if resume and folder and layout.path_of(resume) != layout.path_of(folder):
        raise ConfigError(
            f"--resume names the folder {resume!r} and --folder {folder!r}; give one."
        )
    from fedjaxprune.experiment.execution import joining
    from fedjaxprune.experiment.execution import processes as processes_lib
    from fedjaxprune.experiment.run import launch

    config = None if resume is not None else resolve.resolve(given)
    named = resume or folder
    place = layout.path_of(named) if named else None

    def begin(config: RunConfig, folder: pathlib.Path) -> None:
        nonlocal place
        place = folder

    def how_to_continue() -> str:
        """Say how to continue a run that ended early; empty where it has not."""
        if place is None or not (place / layout.CONFIG).exists():
            return "the run had not begun"
        if (place / layout.SUMMARY).exists():
            return ""
        return f"continue with `fedjaxprune run --resume {place}`"

    try:
        with (
            running.watched(how_to_continue) as watch,
            running.progress(details=details, is_member=False, begin=begin) as listener,
        ):
            processes = joining.join(membership)
            stop = processes_lib.together(processes, watch.stop, watch.heard)
            common: Any = {"listener": listener, "trackers": trackers, "stop": stop}
            common |= {"processes": processes}
            if config is None:
                assert place is not None
                launch.resume(place, given, **common, allow=allow)
            else:
                launch.start(config, folder=place, **common)
    except KeyboardInterrupt:
        if place is None or not (place / layout.CONFIG).exists():
            raise
        click.echo(f"interrupted; continue with `fedjaxprune run --resume {place}`.", err=True)
        raise SystemExit(running.INTERRUPTED) from None
