"""Follow a run elsewhere: a tracker is a function of one line of the record.

Anybody's own is five lines or less::

    # mine.py
    def track(line):
        print(line["round"], line["test"].get("accuracy"))

    # fedjaxprune run --track mine:track

A tracker that raises is warned of once and not called again; the run continues.
"""

import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from fedjaxprune import registry
from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.config.identity import flat
from fedjaxprune.experiment.config.sections import RunConfig, plain
from fedjaxprune.experiment.folder import failure
from fedjaxprune.experiment.folder.record import Line, numbers_of
from fedjaxprune.experiment.run.listener import Listener
from fedjaxprune.registry import Part
from fedjaxprune.settings import Settings

Tracker = Callable[[Line], object]


class Opened(NamedTuple):
    """A tracker at work."""

    track: Tracker
    close: Callable[[], None]


# (folder of the run, its config, rounds that its record holds already) -> tracker
OpenFn = Callable[[pathlib.Path, RunConfig, int], Opened]


def scalars(line: Line) -> dict[str, float]:
    """List the numbers of a line, such as ``test/accuracy``; lists are left out."""
    found = {path.replace(".", "/"): float(number) for path, number in numbers_of(line)}
    found.pop("round", None)
    return found


def tensorboard(
    settings: Settings, folder: pathlib.Path, config: RunConfig, num_rounds: int
) -> Opened:
    """Write event files for TensorBoard to ``tensorboard/`` in the run folder."""
    del settings
    import tensorboardX

    writer = tensorboardX.SummaryWriter(
        str(folder / "tensorboard"),
        purge_step=num_rounds + 1 if num_rounds else None,  # what an interrupted run wrote later
        flush_secs=10,
        filename_suffix=f".{num_rounds}",  # else a file of the same second is written over
    )
    if not num_rounds:
        rows = [f"| {name} | {value} |" for name, value in flat(plain(config)).items()]
        writer.add_text("config", "\n".join(["| setting | value |", "|---|---|", *rows]), 0)

    def track(line: Line) -> None:
        for name, value in scalars(line).items():
            writer.add_scalar(name, value, line["round"])

    return Opened(track=track, close=writer.close)


def wandb(settings: Settings, folder: pathlib.Path, config: RunConfig, num_rounds: int) -> Opened:
    """Log to Weights & Biases, in the project ``WANDB_PROJECT`` or ``fedjaxprune``.

    A resumed run is a new one there, in the same group, beginning at its round.
    """
    del settings, num_rounds
    import wandb as package

    run = package.init(
        project=os.environ.get("WANDB_PROJECT", "fedjaxprune"),
        name=folder.name,
        group=folder.name,
        dir=str(folder),
        config=plain(config),
    )
    return Opened(
        track=lambda line: run.log(scalars(line), step=line["round"]), close=lambda: run.finish()
    )


def mlflow(settings: Settings, folder: pathlib.Path, config: RunConfig, num_rounds: int) -> Opened:
    """Log to MLflow, where ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` say.

    A resumed run is a new one there, beginning at its round.
    """
    del settings, num_rounds
    import mlflow as package

    run = package.start_run(run_name=folder.name)
    package.log_params(flat(plain(config)))

    def track(line: Line) -> None:
        package.log_metrics(scalars(line), step=line["round"], run_id=run.info.run_id)

    return Opened(track=track, close=package.end_run)


PARTS = {
    "tensorboard": Part(build=tensorboard, summary="event files in the run folder"),
    "wandb": Part(build=wandb, summary="Weights & Biases"),
    "mlflow": Part(build=mlflow, summary="MLflow"),
}
_PACKAGES = {"tensorboard": "tensorboardX"}  # that a tracker of another name needs


def find(names: Sequence[str]) -> dict[str, OpenFn]:
    """Look up trackers by name, as ``module:NAME`` or as ``file.py:NAME``, before a run begins."""
    return {name: _find(name) for name in names}


def _find(name: str) -> OpenFn:
    found = registry.find("tracker", name, path="track")
    package = _PACKAGES.get(name, name)
    if found.origin.source == "built-in" and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"track: {name!r} needs the package {package}: install it with "
            f"`pip install 'fedjaxprune[{name}]'`."
        )

    def open_it(folder: pathlib.Path, config: RunConfig, num_rounds: int) -> Opened:
        """Open it; a plain function of a line is a tracker that needs no opening."""
        made = found.part.build(found.part.settings(), folder, config, num_rounds)
        return made if isinstance(made, Opened) else Opened(track=made, close=lambda: None)

    return open_it


@contextmanager
def follow(
    listener: Listener, openers: Mapping[str, OpenFn], *, folder: pathlib.Path, config: RunConfig
) -> Iterator[Listener]:
    """Make a listener that calls trackers, too; whatever they raise ends them, not the run."""
    at_work: dict[str, Opened] = {}

    @contextmanager
    def attempt(name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            at_work.pop(name, None)
            listener.warn(
                f"the tracker {name!r} failed and is left out from here on "
                f"({failure.describe(error)}); the run continues."
            )

    def start(header: Mapping[str, Any], lines: list[Line]) -> None:
        listener.start(header, lines)
        for name, opener in openers.items():
            with attempt(name):
                at_work[name] = opener(folder, config, len(lines))

    def tell(line: Line) -> None:
        listener.round(line)
        for name, opened in list(at_work.items()):
            with attempt(name):
                opened.track(line)

    try:
        yield listener._replace(start=start, round=tell)
    finally:
        for name, opened in list(at_work.items()):
            with attempt(name):
                opened.close()
