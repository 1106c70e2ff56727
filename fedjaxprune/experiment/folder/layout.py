"""The run folder: what lies in it, making one, and reading its config.

::

    config.yaml     complete config, whose code ran, and versions of the packages
    network.json    shapes of the network, and how stored examples become its inputs
    metrics.jsonl   a header, then one line a round
    summary.json    written at the end
    checkpoints/
    client_rows/    with checkpoints, where clients' rows are not on the device
    accuracy.png    written at the end
    failed.json     if an error ended the run: see `failure`
    environments.json   if the run was continued in another environment: see `environments`
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
from collections.abc import Iterator, Mapping

from fedjaxprune import __version__
from fedjaxprune.errors import ConfigError, RunFolderError
from fedjaxprune.experiment import reading
from fedjaxprune.experiment.config import files, yaml_text
from fedjaxprune.experiment.config.sections import RunConfig

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
NETWORK, CHECKPOINTS, PICTURE = "network.json", "checkpoints", "accuracy.png"
ENVIRONMENTS = "environments.json"
SKIPPED = "checkpoints-skipped"  # those that could not be used, put aside
ROWS = "client_rows"  # of all clients, where these are not on the device
# What a run writes to, and must not be a link that leads out of its folder.
OWN = (CONFIG, METRICS, SUMMARY, NETWORK, PICTURE, CHECKPOINTS, SKIPPED)
OWN += (ENVIRONMENTS, ROWS, "failed.json", "chunk_size.json", "tensorboard")
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


@contextlib.contextmanager
def claimed(config: RunConfig) -> Iterator[pathlib.Path]:
    """Make a new folder under ``runs/``, named by method, data and time, that no other run takes.

    It is taken away again if it is empty at the end.
    """
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{as_name(config.method.name)}-{as_name(config.data.dataset.name)}-{now}"
    path = folder = pathlib.Path("runs") / name
    check_free(free(path))
    is_first = not path.parent.exists()
    while True:
        try:
            folder = free(path)
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # another run was faster
            continue
        except OSError as error:
            raise _unwritable(folder, error) from None
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()
            if is_first:
                folder.parent.rmdir()


def free(path: pathlib.Path) -> pathlib.Path:
    """Add a number to a path that is taken."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(one for one in itertools.chain([path], numbered) if not one.exists())


def as_name(text: str) -> str:
    """Make the name of a part, which may be a file, fit for the name of a folder."""
    short = pathlib.PurePath(text).name if text.endswith(("/", ".py")) or ".py:" in text else text
    return re.sub(r"[^A-Za-z0-9.+_]+", "-", short).strip("-.") or "own"


def replace(path: pathlib.Path, text: str) -> None:
    """Write a file so that it is never seen half written, whoever else writes it, and durably."""
    draft = _draft(path)
    try:
        reading.write_new(draft, text.encode())
        sync(draft)
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError, ValueError):
            draft.unlink(missing_ok=True)
        raise
    sync_names(path.parent)


def _draft(path: pathlib.Path) -> pathlib.Path:
    """Name what becomes `path` once it is whole, apart from the drafts of all others."""
    return path.with_name(f".{path.name[:200]}.{os.getpid()}-{threading.get_ident()}.new")


def sync(path: pathlib.Path) -> None:
    """Make the contents of a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_names(folder: pathlib.Path) -> None:
    """Make durable which files a folder has, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_free(folder: pathlib.Path) -> None:
    """Check early that a run may start in `folder`, without touching anything."""
    if any("\ud800" <= one <= "\udfff" for one in str(folder)):
        raise RunFolderError(f"the name of a run folder must be UTF-8, got {str(folder)!r}.")
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


def create(
    folder: pathlib.Path,
    config: RunConfig,
    texts: Mapping[str, str],
    *,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Make the run folder in one step, with its config and other files: all of it or nothing."""
    check_free(folder)
    place = folder.absolute()
    draft = _draft(place)
    written = files.to_yaml(config, versions=versions(), environment=environment)
    try:
        draft.mkdir(parents=True)
        for name, text in {**texts, CONFIG: written}.items():
            (draft / name).write_text(text, encoding="utf-8")
            sync(draft / name)
        sync_names(draft)
        draft.rename(place)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        check_free(folder)  # another run may have been faster
        raise _unwritable(folder, error) from None
    sync_names(place.parent)


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
