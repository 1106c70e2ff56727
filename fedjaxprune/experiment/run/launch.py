"""Begin a run or continue one: build it, train, and leave the folder whole.

This is what ``fedjaxprune run`` does once its options are read, what `fjp.run` does, and what a
sweep does for each of its members. Nothing is printed: a `Listener` receives events. JAX is
imported only when a run is about to be built.
"""

import contextlib
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from fedjaxprune.errors import ConfigError, RunFolderError, near_miss
from fedjaxprune.experiment import reading
from fedjaxprune.experiment.config import files, identity
from fedjaxprune.experiment.config import resolve as resolve_lib
from fedjaxprune.experiment.config.resolve import Given
from fedjaxprune.experiment.config.sections import RunConfig
from fedjaxprune.experiment.execution import processes as processes_lib
from fedjaxprune.experiment.execution.processes import ALONE, Processes
from fedjaxprune.experiment.folder import (
    environments,
    failure,
    layout,
    lock,
    record,
    summary,
)
from fedjaxprune.experiment.run import alike
from fedjaxprune.experiment.run.listener import SILENT, Listener
from fedjaxprune.registry import Found, as_started_in

INTERRUPTED = 130  # exit status of a command
Openers = Mapping[str, Any]  # trackers by name, as `tracker.find` gives them
MAY_BE_ALLOWED = ("restart", "environment")
StopFn = Callable[[], bool]  # asked once a round: whether the run ends after it


def never() -> bool:
    """Never ask a run to stop."""
    return False


def start(
    config: RunConfig,
    *,
    folder: pathlib.Path | None = None,
    listener: Listener | None = None,
    trackers: Openers | None = None,
    stop: StopFn = never,
    processes: Processes = ALONE,
) -> pathlib.Path:
    """Begin a new run, finish it and return its folder.

    It ends early, with a checkpoint, after a round in which `stop` says so. Of several processes
    the first makes the folder; listener and trackers of the others are not called.
    """
    place = folder
    if not processes.is_first:
        listener, trackers = SILENT, {}
    with processes_lib.at_work(processes, lambda: place):
        alike.check_settings(processes, config)
        with _claimed(config, folder, processes) as place:
            _start(
                config,
                place,
                listener or Listener(),
                trackers or {},
                stop=stop,
                processes=processes,
            )
    assert place is not None
    return place


@contextlib.contextmanager
def _claimed(
    config: RunConfig, folder: pathlib.Path | None, processes: Processes
) -> Iterator[pathlib.Path]:
    """Give the folder of a new run; one that is not named is made by the first process."""
    with contextlib.ExitStack() as stack:
        if folder is None and processes.is_first:
            folder = stack.enter_context(layout.claimed(config))
        where = processes_lib.decided(processes, lambda: str(folder and folder.absolute()))
        yield folder if folder is not None and processes.is_first else pathlib.Path(where)


def _start(
    config: RunConfig,
    folder: pathlib.Path,
    listener: Listener,
    trackers: Openers,
    *,
    stop: StopFn,
    processes: Processes,
) -> None:
    if processes.is_first:
        layout.check_free(folder)
    listener.begin(config, folder)
    parts = _build(config, listener.warn, processes)
    for sentence in parts.algorithm.notes:
        listener.warn(sentence)
    from fedjaxprune.experiment.folder import network

    alike.check_parts(processes, parts)
    texts = {layout.NETWORK: network.to_text(parts.network)}
    if parts.places:
        listener.note(parts.places)
    if parts.chunk is not None:
        from fedjaxprune.experiment.execution import chunk_size

        listener.note(parts.chunk.sentence)
        texts[chunk_size.FILE] = chunk_size.to_text(parts.chunk)
    from fedjaxprune.experiment.execution import environment

    if processes.is_first:
        layout.create(folder, parts.config, texts, environment=environment.here())
    _train(folder, parts, listener, trackers, stop=stop, processes=processes)


def resume(
    folder: pathlib.Path,
    given: Given | None = None,
    *,
    listener: Listener | None = None,
    trackers: Openers | None = None,
    stop: StopFn = never,
    allow: Collection[str] = (),
    processes: Processes = ALONE,
) -> pathlib.Path:
    """Continue the run in `folder`, if the explicitly given settings agree with it.

    Args:
      folder: of the run.
      given: settings that must agree with the run's.
      listener: receives the run's events.
      trackers: that follow it.
      stop: as for `start`.
      allow: what is refused without it: ``"restart"`` at round 1 if no checkpoint can be used, and
        another ``"environment"``, in which JAX computes otherwise than when the run began.
      processes: as for `start`; there may be more or fewer than when the run began.
    """
    if not processes.is_first:
        listener, trackers = SILENT, {}
    with processes_lib.at_work(processes, lambda: folder):
        if unknown := [word for word in allow if word not in MAY_BE_ALLOWED]:
            raise ConfigError(
                f"allow must be {' or '.join(MAY_BE_ALLOWED)}, got {unknown[0]!r}"
                f"{near_miss(unknown[0], MAY_BE_ALLOWED)}"
            )
        stored = layout.stored(folder)
        with as_started_in(stored.started_in):
            _resume(
                folder,
                stored,
                given or Given({}),
                listener or Listener(),
                trackers or {},
                stop=stop,
                allow=allow,
                processes=processes,
            )
    return folder


def _resume(
    folder: pathlib.Path,
    stored: files.Stored,
    given: Given,
    listener: Listener,
    trackers: Openers,
    *,
    stop: StopFn,
    allow: Collection[str],
    processes: Processes,
) -> None:
    config = stored_config(folder, given)
    # Parts that are values have no settings to be compared.
    values = given.values.items()
    named = {path: v for path, v in values if isinstance(v, str) or not path.endswith(".name")}
    if different := files.differences(config, given._replace(values=named)):
        raise RunFolderError(
            f"the run in {str(folder)!r} has another config: {'; '.join(different)}; "
            "leave these out, or start a new run."
        )
    alike.check_settings(processes, config)
    if processes.is_first:
        _check_untouched(folder, config)
    if identity.DATA_DIR in given.values:
        config = resolve_lib.replace(config, {identity.DATA_DIR: given.values[identity.DATA_DIR]})
    listener.begin(config, folder)
    for sentence in changes(stored, config):
        listener.warn(sentence)
    _prepare(config, processes)
    if sentence := _other_environment(stored, folder, is_allowed="environment" in allow):
        listener.warn(sentence)
    parts = _build(config, None, processes)
    with _said(folder):
        from fedjaxprune.experiment.folder import network

        network.check_same(parts.network, folder)
    alike.check_parts(processes, parts)
    listener = _noting(listener, stored, folder)
    options: Any = {"stop": stop, "allow": allow, "processes": processes}
    _train(folder, parts, listener, trackers, **options)


def _noting(listener: Listener, stored: files.Stored, folder: pathlib.Path) -> Listener:
    """Note from which round on a run is computed in this environment, when rounds begin."""
    from fedjaxprune.experiment.execution import environment

    def start(header: Mapping[str, Any], lines: list[record.Line]) -> None:
        environments.note(folder, stored.environment, environment.here(), len(lines) + 1)
        listener.start(header, lines)

    return listener._replace(start=start)


def stored_config(folder: pathlib.Path, given: Given | None = None) -> RunConfig:
    """Resolve the config of a run folder; parts that were values are taken from `given`."""
    stored = layout.stored(folder)
    values = dict(resolve_lib.read(stored.values).values)
    given = given or Given({})
    for path, origin in stored.parts.items():
        if origin.get("source") != "value":
            continue
        value = given.values.get(f"{path}.name")
        if value is None or isinstance(value, str):
            kind = "data" if path == "data.dataset" else path
            raise RunFolderError(
                f"{path} of the run in {str(folder)!r} was a value given in Python "
                f"({origin.get('name')}): give it again, as fjp.resume({str(folder)!r}, "
                f"{kind}=...)."
            )
        is_found = isinstance(value, Found)  # under the name that the run knows it by
        values[f"{path}.name"] = value._replace(name=origin["name"]) if is_found else value
    return resolve_lib.resolve(Given(values, dict.fromkeys(values, str(folder / layout.CONFIG))))


def changes(stored: files.Stored, config: RunConfig) -> list[str]:
    """Say, a sentence each, what code is not that which a run was made with."""
    versions = [
        f"{name} {stored.versions[name]} then and {version} now"
        for name, version in layout.versions().items()
        if stored.versions.get(name, version) != version
    ]
    sentences = []
    if versions:
        sentences.append(
            f"the run was made with other versions ({'; '.join(versions)}): the bits may differ."
        )
    other = files.code_changes(stored.parts, files.whose_code(config))
    return [*sentences, other] if other else sentences


def _prepare(config: RunConfig, processes: Processes) -> None:
    """Make as many devices as a run wants of this process."""
    from fedjaxprune.experiment.execution import devices

    devices.prepare(config, num_processes=processes.number, process=processes.process)


def _other_environment(stored: files.Stored, folder: pathlib.Path, *, is_allowed: bool) -> str:
    """Refuse a change of bits unless that is allowed; say what else may change them."""
    from fedjaxprune.experiment.execution import environment

    changed = environments.read(folder)
    then = changed[-1].environment if changed else stored.environment
    now = environment.here()
    different = environment.differences(then, now)
    if different and not is_allowed:
        raise RunFolderError(
            f"the run in {str(folder)!r} would give other bits from here on, as JAX computes "
            f"otherwise here ({'; '.join(different)}): set this as it was, or give `--allow "
            "environment`."
        )
    different += environment.other_processor(then, now)
    return f"the bits may differ from here on: {'; '.join(different)}." if different else ""


def _build(config: RunConfig, warn: Callable[[str], object] | None, processes: Processes) -> Any:
    """Put a run together, with as many devices as it wants."""
    _prepare(config, processes)
    from fedjaxprune.experiment.run import build

    with _memory(config):
        return build.build(config, warn=warn, processes=processes)


@contextlib.contextmanager
def _memory(config: RunConfig) -> Iterator[None]:
    """Turn what JAX and Python say of memory that is not there into a sentence."""
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        size = config.execution.chunk_size
        chunk = "" if size == 1 else f"execution.chunk_size (here {size}), "
        raise ConfigError(
            f"there is not enough memory for this run; start a new one with a smaller {chunk}"
            f"client.batch_size (here {config.client.batch_size}) or model, or with fewer clients "
            "if each keeps a state, as with uplink.error_feedback."
        ) from None


def _check_untouched(folder: pathlib.Path, config: RunConfig) -> None:
    """Refuse to continue from what another config made, and from a record that is not whole."""
    from fedjaxprune.experiment.folder import checkpoints

    with _said(folder):
        reading.check_own(folder, layout.OWN, checkpoints=layout.CHECKPOINTS)
        checkpoints.check_number(folder / layout.CHECKPOINTS, config.checkpoints.keep)
        found = checkpoints.fingerprints(folder / layout.CHECKPOINTS)
        record.read(folder)
    if other := [n for n, value in found.items() if value != files.fingerprint(config)]:
        raise RunFolderError(
            f"{str(folder / layout.CONFIG)!r} is not the config that made the run's checkpoint of "
            f"round {max(other)}: it was edited or replaced; put it back, or start a new run."
        )


@contextlib.contextmanager
def _said(folder: pathlib.Path) -> Iterator[None]:
    """Turn what the system says of files into a sentence."""
    try:
        yield
    except OSError as error:
        of_file = f": {str(error.filename)!r}" if error.filename else ""
        raise RunFolderError(
            f"cannot work in the run folder {str(folder)!r} ({error.strerror or error}{of_file}); "
            f"put that right and continue with `fedjaxprune run --resume {folder}`."
        ) from None


def _check_pruned(config: RunConfig, lines: Sequence[record.Line], listener: Listener) -> None:
    """Warn where an own method never pruned; built-in ones refuse settings that lead to that."""
    asked = getattr(config.method, "sparsity", 0.0)
    is_own = config.parts.method.origin.source != "built-in"
    heard = [line for line in lines if record.value(line, "train.loss") is not None]
    was_pruned = any(record.value(line, "mask.sparsity") for line in heard)
    if is_own and asked and heard and not was_pruned:
        listener.warn(
            f"method.sparsity is {asked}, but no weight was pruned in any of {len(lines)} rounds: "
            "the first revision of the masks may lie beyond the last round."
        )


def _train(
    folder: pathlib.Path,
    parts: Any,
    listener: Listener,
    trackers: Openers,
    *,
    processes: Processes,
    **options: Any,
) -> None:
    """Run what is left to run, with options of `loop.train`; an error is marked in the folder."""
    from fedjaxprune.experiment.analysis import plots
    from fedjaxprune.experiment.run import loop
    from fedjaxprune.experiment.tracking import tracker

    config = parts.config
    options = {"folder": folder, "processes": processes, **options}
    if not processes.is_first:
        with _memory(config):
            if not processes_lib.decided(processes, lambda: None):
                with processes_lib.patient(processes):
                    loop.train(parts, listener=listener, **options)
        return
    with _memory(config), _said(folder), lock.hold(folder):
        found = record.read(folder)
        is_finished = len(found.lines) == parts.num_rounds and (folder / layout.SUMMARY).exists()
        if processes_lib.decided(processes, lambda: is_finished):
            listener.note("this run is finished; there is nothing left to do.")
        else:
            with (
                failure.marked(folder),
                tracker.follow(listener, trackers, folder=folder, config=config) as followed,
                processes_lib.patient(processes),
            ):
                loop.train(parts, listener=followed, **options)
                found = record.read(folder)
                if len(found.lines) < parts.num_rounds:
                    return  # it was stopped
                title = (
                    f"{config.method.name} on {config.data.dataset.name} with {config.model.name}"
                )
                plots.accuracy(found.lines, folder / layout.PICTURE, title=title)
                summary.write(folder, summary.summarize(found.header, found.lines))
                _check_pruned(config, found.lines, listener)
        listener.finish(config, folder, summary.summarize(found.header, found.lines))
