"""The run folder: what lies in it, making one, and reading its config.

::

    config.yaml     complete config, whose code ran, and versions of the packages
    network.json    shapes of the network, and how stored examples become its inputs
    metrics.jsonl   a header, then one line a round
    summary.json    written at the end
    checkpoints/
    accuracy.png    written at the end
    failed.json     if an error ended the run: see `failure`
"""

import contextlib
import datetime
import importlib.metadata
import itertools
import os
import pathlib
import platform
import re
import shutil
import threading
from collections.abc import Mapping

from fedjaxprune import __version__
from fedjaxprune.errors import ConfigError, RunFolderError
from fedjaxprune.experiment import reading
from fedjaxprune.experiment.config import files, yaml_text
from fedjaxprune.experiment.config.sections import RunConfig

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
NETWORK, CHECKPOINTS, PICTURE = "network.json", "checkpoints", "accuracy.png"
SKIPPED = "checkpoints-skipped"  # those that could not be used, put aside
# What a run writes to, and must not be a link that leads out of its folder.
OWN = (CONFIG, METRICS, SUMMARY, NETWORK, PICTURE, CHECKPOINTS, SKIPPED)
OWN += ("failed.json", "chunk_size.json", "tensorboard")
SCHEMA = 2  # of metrics.jsonl, summary.json and network.json
_PACKAGES = (
    "jax jaxlib flax optax numpy orbax-checkpoint scikit-learn tensorflow-datasets array_record "
    "pydantic"
)


def versions() -> dict[str, str]:
    """List the versions of what a run is made with."""
    packages = {}
    for name in _PACKAGES.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "fedjaxprune": __version__,
        **packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def path_of(text: str | os.PathLike[str]) -> pathlib.Path:
    """Read a path, where ``~`` is the user's home."""
    return pathlib.Path(os.path.expanduser(text))  # pathlib's may raise


def default_folder(config: RunConfig) -> pathlib.Path:
    """Name a new folder under ``runs/`` by method, data and time."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{as_name(config.method.name)}-{as_name(config.data.dataset.name)}-{now}"
    return free(pathlib.Path("runs") / name)


def free(path: pathlib.Path) -> pathlib.Path:
    """Add a number to a path that is taken."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(one for one in itertools.chain([path], numbered) if not one.exists())


def as_name(text: str) -> str:
    """Make the name of a part, which may be a file, fit for the name of a folder."""
    short = pathlib.PurePath(text).name if text.endswith(("/", ".py")) or ".py:" in text else text
    return re.sub(r"[^A-Za-z0-9.+_]+", "-", short).strip("-.") or "own"


def replace(path: pathlib.Path, text: str) -> None:
    """Write a file so that it is never seen half written, whoever else writes it."""
    draft = path.with_name(f".{path.name[:200]}.{os.getpid()}-{threading.get_ident()}.new")
    try:
        reading.write_new(draft, text.encode())
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError, ValueError):
            draft.unlink(missing_ok=True)
        raise


def check_free(folder: pathlib.Path) -> None:
    """Check early that a run may start in `folder`, without touching anything."""
    try:
        if (folder / CONFIG).exists():
            raise RunFolderError(
                f"the folder {str(folder)!r} holds a run already; continue it with "
                f"`fedjaxprune run --resume {folder}` or give a folder that does not exist."
            )
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunFolderError(
                f"{str(folder)!r} exists and is no run; give a folder that is empty or does not "
                "exist."
            )
        parent = folder.absolute()
        while not parent.exists():
            parent = parent.parent
    except OSError as error:
        raise _unwritable(folder, error) from None
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        reason = "is not writable" if parent.is_dir() else "is no folder"
        raise RunFolderError(
            f"cannot make the run folder {str(folder)!r}, as {str(parent)!r} {reason}; "
            "give a folder that can be written to."
        )


def _unwritable(folder: pathlib.Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"cannot make the run folder {str(folder)!r} ({error.strerror or error}); "
        "give a folder that can be written to."
    )


def create(folder: pathlib.Path, config: RunConfig, texts: Mapping[str, str]) -> None:
    """Make the run folder in one step, with its config and other files: all of it or nothing."""
    check_free(folder)
    draft = folder.absolute().with_name(f".{folder.absolute().name}.new")
    texts = {**texts, CONFIG: files.to_yaml(config, versions=versions())}
    try:
        shutil.rmtree(draft, ignore_errors=True)  # left by a run that was killed in this moment
        draft.mkdir(parents=True)
        for name, text in texts.items():
            (draft / name).write_text(text, encoding="utf-8")
        draft.rename(folder.absolute())
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise _unwritable(folder, error) from None


def stored(folder: pathlib.Path) -> files.Stored:
    """Read a run's config, the versions and the code that it was made with; imports no part."""
    path = folder / CONFIG
    try:
        text = reading.text(path, may_link=False, largest=yaml_text.LARGEST)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RunFolderError(
            f"{str(folder)!r} holds no run (no readable {CONFIG} in it: {why})."
        ) from None
    try:
        return files.read_stored(text, source=str(path))
    except ConfigError as error:
        raise RunFolderError(str(error)) from None
