"""Import a file or a module that a user names, and say in one sentence why that failed."""

import contextlib
import contextvars
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

from fedjaxprune.errors import ConfigError, first_line, near_file, near_miss
from fedjaxprune.registry.listing import Origin

_STARTED_IN: contextvars.ContextVar[str] = contextvars.ContextVar("started_in", default="")


@contextlib.contextmanager
def as_started_in(folder: str) -> Iterator[None]:
    """Read relative paths and names of modules as in another working folder, that of a run."""
    token = _STARTED_IN.set(folder)
    try:
        yield
    finally:
        _STARTED_IN.reset(token)


def locate(text: str) -> pathlib.Path:
    """Find what a user's path names: seen from where a run was started, else from here."""
    here = pathlib.Path(os.path.expanduser(text))
    there = _STARTED_IN.get() / here
    return there if os.path.exists(there) else here


def refer(place: str, name: str, what: str) -> tuple[Any, Origin]:
    """Import a file or a module and give one of its names, and whose code it is."""
    if place.endswith(".py"):
        module, origin = _import_file(place, what)
    else:
        _see(_STARTED_IN.get() or os.getcwd())
        module = load(lambda: importlib.import_module(place), what)
        origin = _origin_of(module, place)
    if not hasattr(module, name):
        public = [one for one in vars(module) if one[0] != "_"]
        raise ConfigError(f"{what} does not exist: {place} has no {name}{near_miss(name, public)}")
    return getattr(module, name), origin


def _import_file(place: str, what: str) -> tuple[types.ModuleType, Origin]:
    """Import a file under a name of its path and content; a changed file is imported again."""
    file = locate(place).resolve()
    try:
        content = file.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"{what} cannot be read ({reason}){near_file(file)}") from None
    checksum = hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256(f"{file}:{checksum}".encode()).hexdigest()[:12]
    module_name = f"fedjaxprune_file_{file.stem}_{digest}"
    if module_name not in sys.modules:
        _see(str(file.parent))
        load(lambda: _execute(module_name, file), what)
    return sys.modules[module_name], Origin("file", path=str(file), sha256=checksum)


def _execute(module_name: str, file: pathlib.Path) -> None:
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # where pydantic looks up a class's annotations
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise


def _see(folder: str) -> None:
    """Let imports find the modules of a folder, after all others."""
    if folder not in sys.path:
        sys.path.append(folder)


def _origin_of(module: types.ModuleType, place: str) -> Origin:
    """Say which package a module is of, or which file it is."""
    owners = importlib.metadata.packages_distributions().get(place.partition(".")[0], [])
    if owners:
        return Origin("package", package=owners[0], version=importlib.metadata.version(owners[0]))
    file = getattr(module, "__file__", None)
    if not file or not os.path.isfile(file):
        return Origin("package", package=place.partition(".")[0])
    checksum = hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()
    return Origin("file", path=file, sha256=checksum)


def load(import_it: Callable[[], Any], what: str) -> Any:
    """Import something."""
    try:
        return import_it()
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {first_line(error)}{_line_of(error)}"
        raise ConfigError(f"{what} cannot be imported ({reason}).") from error


def _line_of(error: BaseException) -> str:
    """Say in which line of which file an error arose, as far as that is known."""
    if isinstance(error, SyntaxError):
        return ""  # its text says where
    frames = traceback.extract_tb(error.__traceback__)
    ours = ("<", __file__, os.path.dirname(importlib.__file__))
    frames = [one for one in frames if not one.filename.startswith(ours)]
    return f", {os.path.basename(frames[-1].filename)} line {frames[-1].lineno}" if frames else ""
