"""Begin a run or go on with one: set JAX up, train, and leave the folder whole.

This is what ``fedjaxprune run`` does once its options are read, and what a sweep does for each of
its members. JAX is imported only when a run is about to be put together.
"""

import contextlib
import logging
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from fedjaxprune.experiment import methods
from fedjaxprune.experiment.config.flat import files
from fedjaxprune.experiment.config.flat.sections import RunConfig, Settings, UserError
from fedjaxprune.experiment.folder import failure

ShowFn = Callable[[pathlib.Path, RunConfig, list[Any]], None]  # (folder, config, lines)
INTERRUPTED = 130  # exit status
Openers = Mapping[str, Any]  # trackers by name, as `tracker.find` gives them


def path(text: str) -> pathlib.Path:
    """Read a path, where ``~`` is the user's home."""
    return pathlib.Path(os.path.expanduser(text))  # pathlib's may raise


def start(config: RunConfig, *, trackers: Openers, show: ShowFn) -> pathlib.Path:
    """Begin a new run, play it to its end and return its folder.

    Raises:
      UserError: the folder is taken, the settings do not make a run, or it cannot be finished.
    """
    from fedjaxprune.experiment.folder import record

    folder = path(config.out) if config.out else record.default_folder(config)
    record.check_free(folder)
    with jax_set_up(config):
        from fedjaxprune.experiment.execution import chunk_size
        from fedjaxprune.experiment.run import build

        config = build.resolve(config)
        with _memory(config):
            parts = build.build(config, warn=_warn)
        if parts.chunk is not None:
            click.echo(parts.chunk.sentence)
            config = config.model_copy(update={"chunk_size": parts.chunk.size})
        record.create(folder, config)
        if parts.chunk is not None:
            with _said(folder):
                chunk_size.write(parts.chunk, folder)
        _train(folder, config, parts, trackers, show)
    return folder


def resume(
    folder: pathlib.Path,
    values: Mapping[str, Any],
    given: Settings,
    *,
    trackers: Openers,
    show: ShowFn,
) -> None:
    """Continue the run in `folder`, if the explicitly given settings agree with it.

    Args:
      folder: of the run.
      values: the settings that were given, by name.
      given: the same, validated.
      trackers: that follow it.
      show: tells how it ended.

    Raises:
      UserError: there is no run, it has another config, or it cannot be finished.
    """
    from fedjaxprune.experiment.folder import record

    config, made_with = record.stored(folder)
    if different := files.differences(config, values, given):
        raise UserError(
            f"resume: the run in {str(folder)!r} has another config: {'; '.join(different)}. "
            "Leave these out, or start a new run."
        )
    _check_untouched(folder, config)
    if "data_dir" in values:
        config = config.model_copy(update={"data_dir": given.data_dir})
    with jax_set_up(config):
        from fedjaxprune.experiment.run import build

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
        with _memory(config):
            parts = build.build(config)
        _train(folder, config, parts, trackers, show)


@contextlib.contextmanager
def _memory(config: RunConfig) -> Iterator[None]:
    """Turn what JAX and Python say of memory that is not there into a sentence."""
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        chunk = f"--chunk-size (here {config.chunk_size}), "
        raise UserError(
            "there is not enough memory for this run; start a new one with a smaller "
            f"{'' if config.chunk_size == 1 else chunk}--batch-size (here {config.batch_size}) or "
            "--model, or with fewer clients if each keeps a state, as with --error-feedback."
        ) from None


def _warn(sentence: str) -> None:
    """Warn before there is a run."""
    click.echo(f"warning: {sentence}", err=True)


def _check_untouched(folder: pathlib.Path, config: RunConfig) -> None:
    """Refuse to go on from what another config made, and from a record that is not whole."""
    from fedjaxprune.experiment.folder import checkpoints, record

    with _said(folder):
        found = checkpoints.fingerprints(folder / record.CHECKPOINTS)
        record.read(folder)
    if other := [n for n, value in found.items() if value != files.fingerprint(config)]:
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


def _train(
    folder: pathlib.Path, config: RunConfig, parts: Any, trackers: Openers, show: ShowFn
) -> None:
    """Run what is left to run, and tell how it went; what ends it early is marked in the folder."""
    from rich.console import Console

    from fedjaxprune.experiment.analysis import plots
    from fedjaxprune.experiment.folder import record
    from fedjaxprune.experiment.run import loop
    from fedjaxprune.experiment.tracking import progress, tracker

    console, errors = Console(), Console(stderr=True)
    num_rounds = sum(stage.num_rounds for stage in parts.algorithm.stages)
    try:
        with _memory(config), _said(folder), record.hold(folder):
            lines = record.read(folder)
            if len(lines) == num_rounds and (folder / record.SUMMARY).exists():
                console.print("this run is finished; there is nothing left to do.")
            else:
                with (
                    failure.marked(folder),
                    progress.report(console, errors, num_rounds=num_rounds) as told,
                    tracker.follow(told, trackers, folder=folder, config=config) as report,
                ):
                    loop.train(
                        parts,
                        seed=config.seed,
                        folder=folder,
                        eval_every=config.eval_every,
                        eval_from=config.eval_from,
                        checkpoint_every=config.checkpoint_every,
                        keep_checkpoints=config.keep_checkpoints,
                        fingerprint=files.fingerprint(config),
                        report=report,
                    )
                lines = record.read(folder)
                plots.accuracy(lines, folder / record.PICTURE, title=title(config))
                record.write_summary(folder, record.summarize(lines))
            show(folder, config, lines)
    except KeyboardInterrupt:
        click.echo(f"interrupted; continue with `fedjaxprune run --resume {folder}`.", err=True)
        raise SystemExit(INTERRUPTED) from None


def title(config: RunConfig) -> str:
    """Name a run for a human."""
    return f"{config.algorithm} on {config.dataset} with {config.model}"


def show_table(folder: pathlib.Path, config: RunConfig, lines: list[Any]) -> None:
    """Print the table at the end of a run, and where its folder is."""
    from rich.console import Console

    from fedjaxprune.experiment.folder import record
    from fedjaxprune.experiment.tracking import progress

    console = Console()
    target = config.sparsity if config.algorithm in methods.PRUNING else None
    console.print(title(config), style="italic", highlight=False)
    console.print(progress.table(record.summarize(lines), target=target))
    console.print(f"results: {folder}", soft_wrap=True, highlight=False)


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
        from fedjaxprune.experiment.execution import chunk_size

        with contextlib.suppress(OSError):
            cache = chunk_size.folder() / "jax"
            cache.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(cache))
    if config is not None:
        from fedjaxprune.experiment.run import build

        wanted = config.devices or min(build.num_cores(), config.cohort_size)
        with contextlib.suppress(RuntimeError):  # JAX is in use already, with devices of its own
            jax.config.update("jax_num_cpu_devices", min(wanted, config.cohort_size))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Error (reading|writing) persistent")
        yield
