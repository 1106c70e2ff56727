"""The command ``fedjaxprune``: ``run``, ``list`` and ``export``.

Options are made from the fields of `RunConfig`. Whatever the user gets wrong is one sentence on
stderr and exit status 2. JAX is imported only when a run is about to be put together.
"""

import contextlib
import difflib
import logging
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from fedjaxprune import __version__
from fedjaxprune.experiment import export_command, methods, reading, validation
from fedjaxprune.experiment.config import RunConfig, Settings, UserError

USAGE, INTERRUPTED = 2, 130  # exit statuses


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
            metavar = "|".join(validation.alternatives(name)) or _kind(name)
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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fedjaxprune")
def cli() -> None:
    """Train and prune federated models, one compiled round at a time."""


@cli.command(cls=_GroupedCommand)
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
def run(source: str | None, resume: str | None, **options: Any) -> None:
    """Run one experiment and write its folder.

    Settings come from the defaults, then from the preset or YAML file, then from the options; with
    none at all, FedDIP runs on the scanned digits that ship with scikit-learn. `fedjaxprune list`
    names the presets.
    """
    values, sources = _given(source, options)
    if resume is None:
        _start(validation.validate(values, sources=sources))
    else:
        given = validation.validate_each(values, sources=sources)
        if resume and given.out and _path(resume) != _path(given.out):
            raise UserError(
                f"resume: --resume names the folder {resume!r} and out {given.out!r}; give one."
            )
        folder = resume or given.out
        if not folder:
            raise UserError("resume: got no folder; give one as `--resume FOLDER`.")
        _resume(_path(folder), values, given)


def _path(text: str) -> pathlib.Path:
    """Read a path, where ``~`` is the user's home."""
    return pathlib.Path(os.path.expanduser(text))  # pathlib's may raise


def _given(source: str | None, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Collect what was set on the command line and in the source, and where each came from."""
    values = {} if source is None else reading.read_source(source)
    sources = {name: str(source) for name in values}
    for name, value in options.items():
        if value is not None:
            is_unset = validation.is_optional(name) and value == "none"
            values[name] = None if is_unset else value
            sources[name] = "--" + name.replace("_", "-")
    return values, sources


def _start(config: RunConfig) -> None:
    """Begin a new run."""
    from fedjaxprune.experiment import record

    folder = _path(config.out) if config.out else record.default_folder(config)
    record.check_free(folder)
    with jax_set_up(config):
        from fedjaxprune.experiment import catalog

        config = catalog.resolve(config)
        parts = catalog.build(config)
        record.create(folder, config)
        _train(folder, config, parts)


def _resume(folder: pathlib.Path, values: dict[str, Any], given: Settings) -> None:
    """Continue the run in `folder`, if what was given agrees with it."""
    from fedjaxprune.experiment import record

    config, made_with = record.stored(folder)
    if different := reading.differences(config, values, given):
        raise UserError(
            f"resume: the run in {str(folder)!r} has another config: {'; '.join(different)}. "
            "Leave these out, or start a new run."
        )
    _check_untouched(folder, config)
    if "data_dir" in values:
        config = config.model_copy(update={"data_dir": given.data_dir})
    with jax_set_up(config):
        from fedjaxprune.experiment import catalog

        changed = [
            f"{name} {made_with[name]} then and {version} now"
            for name, version in record.versions().items()
            if made_with.get(name, version) != version
        ]
        if changed:
            click.echo(
                f"warning: the run was made with other versions ({'; '.join(changed)}): "
                "the bits may differ.",
                err=True,
            )
        _train(folder, config, catalog.build(config))


def _check_untouched(folder: pathlib.Path, config: RunConfig) -> None:
    """Refuse to go on from what another config made, and from a record that is not whole."""
    from fedjaxprune.experiment import checkpoints, record

    with _said(folder):
        found = checkpoints.fingerprints(folder / record.CHECKPOINTS)
        record.read(folder)
    if other := [n for n, value in found.items() if value != reading.fingerprint(config)]:
        raise UserError(
            f"resume: {str(folder / record.CONFIG)!r} is not the config that made the run's "
            f"checkpoint of round {max(other)}: it was edited or replaced; put it back, or start a "
            "new run."
        )


@contextlib.contextmanager
def _said(folder: pathlib.Path) -> Iterator[None]:
    """Turn what the system says of files into a sentence."""
    try:
        yield
    except OSError as error:
        of_file = f": {str(error.filename)!r}" if error.filename else ""
        raise UserError(
            f"cannot work in the run folder {str(folder)!r} ({error.strerror or error}{of_file}); "
            f"put that right and continue with `fedjaxprune run --resume {folder}`."
        ) from None


def _train(folder: pathlib.Path, config: RunConfig, parts: Any) -> None:
    """Run what is left to run, and tell how it went."""
    import jax
    from rich.console import Console

    from fedjaxprune.experiment import plots, progress, record, runner

    console, errors = Console(), Console(stderr=True)
    title = f"{config.algorithm} on {config.dataset} with {config.model}"
    num_rounds = sum(stage.num_rounds for stage in parts.algorithm.stages)
    target = config.sparsity if config.algorithm in methods.PRUNING else None
    try:
        with _said(folder), record.hold(folder):
            lines = record.read(folder)
            if len(lines) == num_rounds and (folder / record.SUMMARY).exists():
                console.print("this run is finished; there is nothing left to do.")
            else:
                with progress.report(console, errors, num_rounds=num_rounds) as report:
                    runner.train(
                        parts,
                        seed=config.seed,
                        folder=folder,
                        eval_every=config.eval_every,
                        checkpoint_every=config.checkpoint_every,
                        keep_checkpoints=config.keep_checkpoints,
                        fingerprint=reading.fingerprint(config),
                        report=report,
                    )
                lines = record.read(folder)
                plots.accuracy(lines, folder / record.PICTURE, title=title)
                record.write_summary(folder, record.summarise(lines))
            console.print(title, style="italic", highlight=False)
            console.print(progress.table(record.summarise(lines), target=target))
            console.print(f"results: {folder}", soft_wrap=True, highlight=False)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"there is not enough memory for the run in {str(folder)!r}; start a new one with a "
            f"smaller model, batch_size or chunk_size ({config.chunk_size}), or fewer clients if "
            "each keeps a state, as with error_feedback."
        ) from None
    except KeyboardInterrupt:
        click.echo(f"interrupted; continue with `fedjaxprune run --resume {folder}`.", err=True)
        raise SystemExit(INTERRUPTED) from None


@contextlib.contextmanager
def jax_set_up(config: RunConfig | None = None) -> Iterator[None]:
    """Set up JAX for the command: compiled code is kept between runs, other people's logs are not.

    A CPU becomes as many devices as the config asks for, by default one a core.

    JAX's cache lies in ``JAX_COMPILATION_CACHE_DIR`` if that is set, else in the user's cache
    folder.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        cache = pathlib.Path(base) / "fedjaxprune" / "jax"
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(cache))
    if config is not None:
        from fedjaxprune.experiment import catalog

        wanted = config.devices or min(catalog.num_cores(), config.cohort_size)
        with contextlib.suppress(RuntimeError):  # JAX is in use already, with devices of its own
            jax.config.update("jax_num_cpu_devices", min(wanted, config.cohort_size))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Error (reading|writing) persistent")
        yield


@cli.command(name="list")
@click.option("--data-dir", default=None, metavar="TEXT", help="Folder of prepared TFDS data.")
def list_(data_dir: str | None) -> None:
    """List algorithms, models, data sets and presets."""
    with jax_set_up():
        from fedjaxprune.data import datasets
        from fedjaxprune.experiment import catalog

        if data_dir == "":
            raise UserError("data_dir must be a text that is not empty, got ''.")
        prepared = datasets.prepared(data_dir)
        searched, named_by = datasets.folder_of(data_dir)
    names = {
        "algorithms": {name: catalog.SUMMARIES[name] for name in catalog.ALGORITHMS},
        "models": {name: catalog.SUMMARIES[name] for name in catalog.MODELS},
        f"data sets (prepared ones from {searched}, {named_by})": {
            "digits": "8x8 scanned digits inside scikit-learn; no download",
            **{name: "prepared TFDS set" for name in prepared if name != "digits"},
            "...": "any TFDS image-classification set, once prepared",
        },
        "presets": {
            name: text.splitlines()[0].lstrip("# ") for name, text in reading.preset_texts().items()
        },
    }
    for heading, rows in names.items():
        click.echo(f"{heading}:")
        width = max(len(name) for name in rows)
        for name, summary in rows.items():
            click.echo(f"  {name:<{width}}  {summary}")


cli.add_command(export_command.export)


def _sentence(error: click.ClickException, args: Sequence[str]) -> str:
    """Turn click's complaint about `args` into one sentence."""
    context = getattr(error, "ctx", None)
    command = "fedjaxprune " + args[0] if args and args[0] in cli.commands else "fedjaxprune"
    if isinstance(error, click.NoSuchOption):
        params = context.command.get_params(context) if context else []
        options = [option for param in params for option in [*param.opts, *param.secondary_opts]]
        close = difflib.get_close_matches(error.option_name, options, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        return f"unknown option {error.option_name!r}: `{command} --help` lists them{hint}"
    if args and context and context.command is cli:  # click's own hint would be a second sentence
        hint = validation.near_miss(args[0], cli.commands)
        return f"unknown command {args[0]!r}: must be one of {', '.join(cli.commands)}{hint}"
    text = error.format_message().rstrip(".")
    return f"{text[:1].lower()}{text[1:]}: see `{command} --help`."


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; the entry point of the package."""
    try:
        cli.main(args=args, prog_name="fedjaxprune", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(USAGE)
    except click.ClickException as error:
        click.echo(f"error: {_sentence(error, sys.argv[1:] if args is None else args)}", err=True)
        sys.exit(USAGE)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(USAGE)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted before the run began.", err=True)
        sys.exit(INTERRUPTED)
