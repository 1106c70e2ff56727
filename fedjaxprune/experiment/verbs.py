"""What Python users call: `fjp.run`, `resume`, `sweep`, `load`, `compare`, `report`, `export`, ...

Each takes names, files or values, does what the command of its name does, and prints nothing.
"""

import os
import pathlib
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

from fedjaxprune import registry
from fedjaxprune.experiment import values
from fedjaxprune.experiment.config import describe as describe_lib
from fedjaxprune.experiment.config import files, resolve
from fedjaxprune.experiment.config.sections import RunConfig, plain
from fedjaxprune.experiment.execution import joining
from fedjaxprune.experiment.execution import processes as processes_lib
from fedjaxprune.experiment.execution.processes import HEARTBEAT_S
from fedjaxprune.experiment.folder import layout
from fedjaxprune.experiment.result import Run, quiet
from fedjaxprune.experiment.run import launch
from fedjaxprune.experiment.run.listener import Listener

Folder = str | os.PathLike[str]
find = registry.find
describe = describe_lib.describe


class Sweep(NamedTuple):
    """What a sweep has come to.

    Attributes:
      folder: of the members' folders.
      runs: those that have a record, in the order of the file.
      failed: by name, why a member failed, or that another process is running it.
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
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat: float = HEARTBEAT_S,
    **settings: Any,
) -> Run:
    """Run an experiment and write its folder.

    ::

        fjp.run("quick")
        fjp.run({"method": {"name": METHOD, "sparsity": 0.9}, "seed": 1}, folder="runs/a")
        fjp.run(method=METHOD, model=my_module, data=(x, y), num_clients=10, num_rounds=50)

    Args:
      config: a preset, a YAML file, settings (nested or by dotted path), or a resolved config.
      method: a name, a `Method`, a function, or an `Algorithm` that is built already.
      model: a name, a `Model`, a flax or Equinox module, or a function that makes one of these.
      data: a name, a file, arrays, a mapping of arrays (with client ids, by which examples are
        dealt out unless a partition or `num_clients` is given), a `Dataset`, or settings of the
        section `data`.
      folder: to be made; None chooses one under ``runs/``.
      listener: receives the run's events; None shows progress in a notebook, and nothing elsewhere.
      trackers: names or references of trackers that follow the run.
      coordinator: to run in several processes that each make this call: ``"HOST:PORT"`` where
        process 0 listens, or ``"auto"`` where SLURM, Open MPI, Kubernetes or a TPU pod says it.
      num_processes: with a coordinator, how many there are.
      process_id: with a coordinator, which one this is, from 0; process 0 writes the folder.
      heartbeat: with a coordinator, how long a process may be silent before the others end,
        seconds. They end by leaving Python, since JAX cannot continue without it.
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
    parts = values.under_paths(method=method, model=model, data=data)
    given = values.as_parts(resolve.merge(base, parts), is_new=True)
    given = resolve.merge(given, values.keywords(given, settings))
    made = resolve.resolve(given)
    place = None if folder is None else layout.path_of(folder)
    openers = _trackers(trackers)
    membership = joining.membership(coordinator, num_processes, process_id, heartbeat)
    with _listening(listener) as listens, quiet():
        processes = joining.join(membership)
        stop = processes_lib.together(processes, launch.never)
        common: Any = {"listener": listens, "trackers": openers, "processes": processes}
        place = launch.start(made, folder=place, stop=stop, **common)
    return Run(place, model=values.model_of(given))


def resume(
    folder: Folder,
    *,
    method: Any = None,
    model: Any = None,
    data: Any = None,
    listener: Listener | None = None,
    trackers: Sequence[str] = (),
    allow: Collection[str] = (),
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat: float = HEARTBEAT_S,
) -> Run:
    """Continue a run with the config that its folder holds, to the same bits.

    Args:
      folder: of the run.
      method: the value that the run was given in Python, if it was.
      model: likewise.
      data: likewise.
      listener: as for `run`.
      trackers: as for `run`.
      allow: what else is an error: ``"restart"`` at round 1 if no checkpoint can be used, and
        another ``"environment"``, to continue with other bits under other options of JAX or XLA.
      coordinator: as for `run`; there may be more or fewer processes than when the run began.
      num_processes: as for `run`.
      process_id: as for `run`.
      heartbeat: as for `run`.

    Raises:
      FedJaxPruneError: what is wrong, in one sentence.
    """
    place = layout.path_of(folder)
    given = values.as_parts(values.under_paths(method=method, model=model, data=data), is_new=False)
    openers = _trackers(trackers)
    membership = joining.membership(coordinator, num_processes, process_id, heartbeat)
    with _listening(listener) as listens, quiet():
        processes = joining.join(membership)
        stop = processes_lib.together(processes, launch.never)
        common: Any = {"listener": listens, "trackers": openers, "processes": processes}
        launch.resume(place, given, stop=stop, allow=allow, **common)
    return Run(place, model=values.model_of(given))


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
      listener: receives the events of each run, with one job.
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
    return Run(layout.path_of(folder), model=values.as_found("model", model))


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
    given = values.as_found("model", model)
    if given is None and isinstance(run, Run):
        given = run._given
    with quiet():
        exporting.export(folder, place, model=given, warn=Listener().warn)
        return exporting.read(place)


def _folders(runs: Any) -> list[Any]:
    several = [runs] if isinstance(runs, str | os.PathLike | Run) else list(runs)
    return [one.folder if isinstance(one, Run) else os.fspath(one) for one in several]


def _trackers(names: Sequence[str]) -> Mapping[str, Any]:
    if not names:
        return {}
    from fedjaxprune.experiment.tracking import tracker

    return tracker.find(names)


def _listening(listener: Listener | None) -> AbstractContextManager[Listener]:
    """Choose who listens: the given listener, else progress in a notebook, else nobody."""
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
