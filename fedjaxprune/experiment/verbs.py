"""What Python users call: `fjp.run`, `resume`, `sweep`, `load`, `compare`, `report`, `export`, ...

Each takes names, files or values, does what the command of its name does, and prints nothing.
"""

import functools
import inspect
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

from fedjaxprune import registry
from fedjaxprune.errors import ConfigError, near_miss
from fedjaxprune.experiment.config import describe as describe_lib
from fedjaxprune.experiment.config import files, resolve
from fedjaxprune.experiment.config.resolve import Given
from fedjaxprune.experiment.config.sections import PLACES, RunConfig, plain
from fedjaxprune.experiment.folder import layout
from fedjaxprune.experiment.result import Run, quiet
from fedjaxprune.experiment.run import launch
from fedjaxprune.experiment.run.listener import Listener
from fedjaxprune.registry import Found, Origin, Part

__all__ = [
    "Run",
    "Sweep",
    "compare",
    "describe",
    "export",
    "find",
    "load",
    "report",
    "resume",
    "run",
    "sweep",
    "task",
]

Folder = str | os.PathLike[str]
find = registry.find
describe = describe_lib.describe


class Sweep(NamedTuple):
    """What a sweep has come to.

    Attributes:
      folder: of the members' folders.
      runs: those that have a record, in the order of the file.
      failed: by name, why a member failed.
    """

    folder: pathlib.Path
    runs: tuple[Run, ...]
    failed: Mapping[str, str]


def run(
    config: str | Mapping[str, Any] | RunConfig | None = None,
    /,
    *,
    method: Any = None,
    model: Any = None,
    data: Any = None,
    folder: Folder | None = None,
    listener: Listener | None = None,
    trackers: Sequence[str] = (),
    **settings: Any,
) -> Run:
    """Run an experiment and write its folder.

    ::

        fjp.run("quick")
        fjp.run({"method": {"name": "feddip", "sparsity": 0.9}, "seed": 1}, folder="runs/a")
        fjp.run(method="feddip", model=my_module, data=(x, y), num_clients=10, num_rounds=50)

    Args:
      config: a preset, a YAML file, settings (nested or by dotted path), or a resolved config.
      method: a name, a `Method`, a function, or an `Algorithm` that is built already.
      model: a name, a `Model`, a flax or Equinox module, or a function that makes one of these.
      data: a name, a file, arrays, a mapping of arrays (with client ids, by which examples are
        dealt out unless a partition or `num_clients` is given), a `Dataset`, or settings of the
        section `data`.
      folder: to be made; None chooses one under ``runs/``.
      listener: is told how the run goes; None shows progress in a notebook, and nothing elsewhere.
      trackers: names or references of trackers that follow the run.
      **settings: sections of the config, or single settings by the short names of the command.

    Raises:
      FedJaxPruneError: what is wrong, in one sentence.
    """
    if isinstance(config, RunConfig):
        base = resolve.read(plain(config))
    elif isinstance(config, str | os.PathLike):
        base = files.read_source(os.fspath(config))
    else:
        base = resolve.read(config or {})
    given = _with_values(resolve.merge(base, _values(method=method, model=model, data=data)))
    given = resolve.merge(given, _settings(given, settings))
    made = resolve.resolve(given)
    place = None if folder is None else layout.path_of(folder)
    openers = _trackers(trackers)
    with _listening(listener) as listens, quiet():
        place = launch.start(made, folder=place, listener=listens, trackers=openers)
    return Run(place, model=_given_model(given))


def resume(
    folder: Folder,
    *,
    method: Any = None,
    model: Any = None,
    data: Any = None,
    listener: Listener | None = None,
    trackers: Sequence[str] = (),
) -> Run:
    """Continue a run with the config that its folder holds, to the same bits.

    Args:
      folder: of the run.
      method: the value that the run was given in Python, if it was.
      model: likewise.
      data: likewise.
      listener: as for `run`.
      trackers: as for `run`.

    Raises:
      FedJaxPruneError: what is wrong, in one sentence.
    """
    place = layout.path_of(folder)
    given = _with_values(_values(method=method, model=model, data=data), is_new=False)
    with _listening(listener) as listens, quiet():
        launch.resume(place, given, listener=listens, trackers=_trackers(trackers))
    return Run(place, model=_given_model(given))


def sweep(
    source: str | Mapping[str, Any],
    *,
    folder: Folder | None = None,
    jobs: int = 1,
    listener: Listener | None = None,
    trackers: Sequence[str] = (),
) -> Sweep:
    """Make many runs from one file or mapping; what has been run is not run again.

    Args:
      source: path of a YAML file, or its content; a list stands for a run with each of its values.
      folder: of the run folders; None for the file's own.
      jobs: processes that run members side by side.
      listener: is told how each run goes, with one job.
      trackers: as for `run`.

    Raises:
      FedJaxPruneError: what is wrong with the sweep; a member that fails is in the result.
    """
    from fedjaxprune.experiment.sweeps import execute, plan

    read = plan.read(source, folder=None if folder is None else layout.path_of(folder))
    audience = execute.Audience(listen=lambda: _listening(listener))
    with quiet():
        if jobs > 1:
            failed = execute.side_by_side(read, audience, jobs=jobs, track=trackers)
        else:
            failed = execute.one_by_one(read, audience, trackers=_trackers(trackers))
    there = [one.folder for one in read.members if (one.folder / layout.METRICS).exists()]
    return Sweep(read.folder, tuple(Run(one) for one in there), failed)


def load(folder: Folder, *, model: Any = None) -> Run:
    """Read a run, finished or not; imports no part that it names.

    Args:
      folder: of the run.
      model: the value that the run was given in Python, for `Run.model` and `Run.predict`.

    Raises:
      RunFolderError: there is no run, or it has no round on record.
    """
    return Run(layout.path_of(folder), model=_as_found("model", model))


def compare(
    runs: Sequence[Folder | Run] | Folder | Run,
    *,
    at_mib: float | None = None,
    to_accuracy: float | None = None,
) -> Any:
    """Compare runs: accuracy at equal bytes, bytes and rounds to an accuracy.

    Args:
      runs: run folders, or folders of run folders; runs that differ only in their
        seed are averaged.
      at_mib: traffic at which accuracies are compared, MiB.
      to_accuracy: accuracy to which bytes and rounds are counted, in [0, 1].

    Raises:
      RunFolderError: a folder is no run, or the runs cannot be compared.
    """
    from fedjaxprune.experiment.analysis import compare as comparison

    folders = _folders(runs)
    return comparison.of_folders(folders, at_mib=at_mib, to_accuracy=to_accuracy)[0]


def report(
    runs: Sequence[Folder | Run] | Folder | Run,
    path: Folder = "report.html",
    *,
    at_mib: float | None = None,
    to_accuracy: float | None = None,
) -> pathlib.Path:
    """Write one HTML page about runs, and return its path; arguments are those of `compare`."""
    from fedjaxprune.experiment.analysis.report import page

    place = layout.path_of(path)
    page.of_folders(_folders(runs), place, at_mib=at_mib, to_accuracy=to_accuracy)
    return place


def export(run: Folder | Run, out: Folder | None = None, *, model: Any = None) -> Any:
    """Write the network of a run's newest checkpoint, with dead channels removed.

    Args:
      run: a run or its folder.
      out: folder to be made; None for ``export`` in the run folder.
      model: the value that the run was given in Python, if it was.

    Returns:
      The exported network: `predict`, `params`, `masks`, `state` and `folder`.
    """
    from fedjaxprune.experiment.exporting import export as exporting

    folder = run.folder if isinstance(run, Run) else layout.path_of(run)
    place = folder / "export" if out is None else layout.path_of(out)
    given = _as_found("model", model)
    if given is None and isinstance(run, Run):
        given = run._given
    with quiet():
        exporting.export(folder, place, model=given)
        return exporting.read(place)


def task(
    model: Any,
    population: Any,
    protocol: Any,
    *,
    batch_size: int = 16,
    preprocess: Any = None,
    server_examples: Sequence[int] = (),
    num_epochs: int = 1,
) -> Any:
    """Make a method's `Task` of a network, clients' examples and a protocol of one's own.

    Args:
      model: a `Model`.
      population: a `Population`.
      protocol: a `Protocol`.
      batch_size: of the local steps that a method makes beside those of the protocol.
      preprocess: ``(key, inputs) -> inputs`` of these; None takes them as stored.
      server_examples: rows of the population's examples that the server holds.
      num_epochs: passes over its examples that a client makes in a round.
    """
    from fedjaxprune.experiment.run import composing

    return composing.task(
        model,
        population,
        protocol,
        batch_size=batch_size,
        preprocess=preprocess,
        server_examples=server_examples,
        num_epochs=num_epochs,
    )


def _values(**given: Any) -> Given:
    """Put parts that were given by keyword under their paths."""
    paths = {"method": "method", "model": "model", "data": "data.dataset"}
    found: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name == "data" and isinstance(value, Mapping) and not _is_data(value):
            found |= resolve.read({"data": value}).values
        elif isinstance(value, Mapping) and name != "data":
            found |= resolve.read({name: value}).values
        else:
            found[f"{paths[name]}.name"] = value
    return Given(found)


def _is_data(value: Mapping[str, Any]) -> bool:
    """Tell data from settings of the section `data`."""
    names = RunConfig.model_fields["data"].annotation.model_fields  # pyright: ignore[reportOptionalMemberAccess]
    return not all(name.partition(".")[0] in names for name in value)


def _with_values(given: Given, *, is_new: bool = True) -> Given:
    """Make parts of values; data with client ids are dealt out by them, if nothing else is said."""
    values = dict(given.values)
    for path, place in PLACES.items():
        name = f"{path}.name"
        if name in values and not isinstance(values[name], str):
            values[name] = _as_found(place.kind, values[name])
    data = values.get("data.dataset.name")
    if is_new and isinstance(data, Found) and data.origin.source == "value":
        untold = not {"data.partition.name", "data.num_clients"} & set(values)
        keys = getattr(getattr(data.part.build, "value", None), "keys", None)
        if untold and isinstance(keys, Mapping) and len(keys) == 1:
            values["data.partition.name"] = "by_key"
    return given._replace(values=values)


class _Ready:
    """A `build` that gives what is there already."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *settings: Any, **context: Any) -> Any:
        return self.value


def _as_found(kind: str, value: Any) -> Found | None:
    """Make a part of a value: of a function or a `Part` what it builds, else the value itself."""
    if value is None or isinstance(value, Found):
        return value
    if isinstance(value, str) or not _is_component(kind, value):
        return registry.find(kind, value)
    if kind == "dataset":
        from fedjaxprune.data import conversion

        value = conversion.as_dataset(value)
    name, part = f"own_{kind}", Part(_Ready(value))
    if kind == "method":
        from fedjaxprune.method import Method
        from fedjaxprune.settings import Settings

        return Found(
            kind, name, Method(build=_Ready(value), settings=Settings), {}, Origin("value")
        )
    return Found(kind, name, part, {}, Origin("value"))


def _is_component(kind: str, value: Any) -> bool:
    """Tell what a part would build from a part."""
    is_part = hasattr(value, "build") and hasattr(value, "settings")
    is_function = inspect.isroutine(value) or isinstance(value, functools.partial | type)
    if kind == "method":
        return hasattr(value, "stages")
    return kind in ("model", "dataset") and not is_part and not is_function


def _given_model(given: Given) -> Found | None:
    found = given.values.get("model.name")
    return found if isinstance(found, Found) and found.origin.source == "value" else None


def _settings(given: Given, settings: Mapping[str, Any]) -> Given:
    """Read keywords that are sections of the config, or single settings by their short names."""
    sections = {name: one for name, one in settings.items() if name in RunConfig.model_fields}
    named = dict(resolve.read(sections).values)
    rest = {name: one for name, one in settings.items() if name not in sections}
    parts = {place.kind: f"{path}.name" for path, place in PLACES.items()}
    named |= {parts[name]: rest.pop(name) for name in list(rest) if name in parts}
    named = dict(_with_values(Given(named), is_new=False).values)
    if rest:
        found = resolve.find_parts(resolve.merge(given, Given(named)))
        known = [path for path in resolve.paths(found.type) if not path.endswith(".name")]
        for name, value in rest.items():
            paths = [path for path in known if path.rpartition(".")[2] == name]
            if len(paths) > 1:
                raise ConfigError(
                    f"{name} may be {' or '.join(paths)}: give it by its full path in the config."
                )
            if not paths:
                names = [path.rpartition(".")[2] for path in known]
                raise ConfigError(
                    f"there is no setting {name!r} of this run{near_miss(name, [*names, *parts])}"
                )
            named[paths[0]] = value
    return Given(named)


def _folders(runs: Any) -> list[Any]:
    several = [runs] if isinstance(runs, str | os.PathLike | Run) else list(runs)
    return [one.folder if isinstance(one, Run) else os.fspath(one) for one in several]


def _trackers(names: Sequence[str]) -> Mapping[str, Any]:
    if not names:
        return {}
    from fedjaxprune.experiment.tracking import tracker

    return tracker.find(names)


def _listening(listener: Listener | None) -> AbstractContextManager[Listener]:
    """Choose who is told: the given listener, else progress in a notebook, else nobody."""
    if listener is not None or not _is_notebook():
        return nullcontext(listener or Listener())
    return _notebook()


@contextmanager
def _notebook() -> Iterator[Listener]:
    from rich.console import Console

    from fedjaxprune.experiment.tracking import progress

    with progress.report(Console(), Console(stderr=True), details=False) as listener:
        yield listener


def _is_notebook() -> bool:
    """Tell whether a Jupyter kernel runs this code."""
    shell = sys.modules.get("IPython")
    found = None if shell is None else shell.get_ipython()
    return type(found).__name__ == "ZMQInteractiveShell"
