"""Many runs from one file: which runs it stands for, and where each is.

::

    preset: NAME                       # or a YAML file; its settings come first
    federation.num_rounds: 100         # settings of all runs, nested or by full path
    seed: [0, 1, 2]                    # a list stands for a run with each of its values
    cases:                             # one after the other, each with lists of its own
      - method: NAME
      - method: {name: NAME/VARIANT, sparsity: [0.8, 0.9]}

Every combination is a member with a folder of its own, named by what the file varies. Members that
differ in nothing that matters to their numbers are one.
"""

import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from fedjaxprune.errors import ConfigError, shown
from fedjaxprune.experiment.config import files, identity, resolve
from fedjaxprune.experiment.config.sections import PLACES, RunConfig, plain
from fedjaxprune.experiment.folder import layout
from fedjaxprune.settings import takes_list

PRESET, CASES, FOLDER = "preset", "cases", "folder"
_METHOD = "method.name"


class Member(NamedTuple):
    """One run of a sweep."""

    name: str
    config: RunConfig
    folder: pathlib.Path


class Sweep(NamedTuple):
    """A file, read."""

    source: str  # its name, for messages
    folder: pathlib.Path  # of the members' folders
    members: tuple[Member, ...]  # in the order in which they are run
    notes: tuple[str, ...]  # what the user should know before they run, a sentence each


def is_sweep(values: Mapping[str, Any]) -> bool:
    """Tell the file of a sweep from that of one run."""
    if CASES in values or PRESET in values or any(map(_settings_in, values.values())):
        return True
    given = resolve.read(values)
    lists = {path: value for path, value in given.values.items() if isinstance(value, list)}
    if not lists or any(path.endswith(".name") for path in lists):
        return bool(lists)
    known = resolve.paths(resolve.find_parts(given).type)
    return any(
        path not in known or not takes_list(*known[path]) or isinstance((value or [""])[0], list)
        for path, value in lists.items()
    )


def read(given: str | Mapping[str, Any], *, folder: pathlib.Path | None) -> Sweep:
    """Read a sweep, the path of a YAML file or its content, and check all of its members.

    Without a `folder` its members are in the file's own, or in ``runs/`` and its name.
    """
    if isinstance(given, str):
        source, stem = given, pathlib.Path(given).stem
        if pathlib.Path(given).suffix not in (".yaml", ".yml"):
            raise ConfigError(f"{given!r} is no sweep: expected is the path of a .yaml file.")
        values = files.load_source(given)
    else:
        source, stem, values = "a mapping", "sweep", dict(given)
    cases = values.pop(CASES, [{}])
    are_settings = isinstance(cases, list) and all(isinstance(case, dict) for case in cases)
    if not cases or not are_settings or not all(isinstance(n, str) for case in cases for n in case):
        raise ConfigError(
            f"{CASES} must be a list of settings such as `- {{method: NAME}}`, each as "
            f"`name: value` (from {source})."
        )
    preset = values.pop(PRESET, None)
    if preset is not None and not isinstance(preset, str):
        raise ConfigError(f"{PRESET} must be a preset or a .yaml file (from {source}).")
    common = resolve.Given({}) if preset is None else files.read_source(preset)
    named = values.pop(FOLDER, None)
    if named is not None and (not isinstance(named, str) or not named):
        raise ConfigError(
            f"{FOLDER} must be a text that is not empty, got {named!r} (from {source})."
        )
    folder = folder or pathlib.Path(os.path.expanduser(named or pathlib.Path("runs") / stem))
    if (folder / "config.yaml").exists():
        raise ConfigError(
            f"{str(folder)!r} is the folder of a single run; give the sweep another --folder."
        )
    for path, value in ((path, value) for one in (values, *cases) for path, value in one.items()):
        _check_items(path, value, source)
    first, *others = [resolve.read(one, source=source) for one in (values, *cases)]
    members = tuple(_members(source, common, first, others, folder))
    for member in members:
        _check_folder(member, source)
    return Sweep(source, folder, members, tuple(_notes(members, common, [first, *others])))


def _members(
    source: str,
    common: resolve.Given,
    values: resolve.Given,
    cases: Sequence[resolve.Given],
    folder: pathlib.Path,
) -> Iterator[Member]:
    """Make the members in order: case by case, the lists that stand last in the file fastest."""
    seen: set[str] = set()
    names: set[str] = set()
    for case in cases:
        given = {**values.values, **case.values}
        varied = [p for p, value in given.items() if isinstance(value, list) or p in case.values]
        for path, value in given.items():
            if isinstance(value, list) and not value:
                raise ConfigError(
                    f"{path.removesuffix('.name')} is a list without a value (from {source})."
                )
            _check_items(path.removesuffix(".name"), value, source)
        choices = [value if isinstance(value, list) else [value] for value in given.values()]
        for chosen in itertools.product(*choices):
            config = _config(common, values, case, dict(zip(given, chosen, strict=True)), source)
            settings = plain(config)
            key = json.dumps([config.seed, identity.configuration(settings)], sort_keys=True)
            if key in seen:
                continue
            name = _name(varied, identity.flat(settings))
            if name in names:
                raise ConfigError(
                    f"two members of the sweep {source} would have the folder {name!r}; give each "
                    "case a setting that tells it from the others."
                )
            seen.add(key)
            names.add(name)
            yield Member(name, config, folder / name)


def _check_items(path: str, value: Any, source: str) -> None:
    """Refuse settings in a list, which would have to be told from the others'."""
    if items := _settings_in(value):
        raise ConfigError(
            f"{path} has settings in its list, {shown(items[0])}: a list holds single values, so "
            f"give each as one of the {CASES}, such as `- {path}: {{...}}` (from {source})."
        )


def _settings_in(value: Any) -> list[Any]:
    """List the mappings in a list, except those of arrays."""
    items = value if isinstance(value, list) else []
    return [one for one in items if isinstance(one, Mapping) and not resolve.holds_arrays(one)]


def _config(
    common: resolve.Given,
    values: resolve.Given,
    case: resolve.Given,
    chosen: Mapping[str, Any],
    source: str,
) -> RunConfig:
    """Make the config of one combination; a case goes before what is common to all."""

    def part(of: resolve.Given) -> resolve.Given:
        inside = {path: chosen[path] for path in of.values}
        return resolve.Given(inside, dict.fromkeys(inside, source))

    shared = {p: value for p, value in values.values.items() if p not in case.values}
    return resolve.resolve(
        resolve.merge(resolve.merge(common, part(resolve.Given(shared))), part(case))
    )


def _name(varied: Sequence[str], settings: Mapping[str, Any]) -> str:
    """Name a member by its method, by what else the file varies, and by its seed."""
    own = [path for path in varied if path not in (_METHOD, identity.SEED)]
    parts = []
    for path in dict.fromkeys([_METHOD, *own, identity.SEED]):
        if path in settings and (identity.matters(path) or path == identity.SEED):
            value = yaml.safe_dump(settings[path]).splitlines()[0]
            is_part = path.removesuffix(".name") in PLACES
            parts.append(value if is_part else f"{path.rpartition('.')[2]}-{value}")
    return re.sub(r"[^A-Za-z0-9.+]+", "-", "-".join(parts)).strip("-.")


def _check_folder(member: Member, source: str) -> None:
    """Refuse a folder that another configuration made."""
    if not (member.folder / layout.CONFIG).exists():
        return
    there = layout.stored(member.folder).values
    different = [
        f"{name.removesuffix('.name')} is {old!r} there and {new!r} in {source}"
        for name, old, new in identity.differences(there, plain(member.config))
        if (name == identity.SEED or identity.matters(name))
        and not (name == "data.num_clients" and new is None)  # one for each key of the data
    ]
    if different:
        raise ConfigError(
            f"the folder {str(member.folder)!r} holds another run: {'; '.join(different)}; "
            "give the sweep another --folder."
        )


def _notes(
    members: Sequence[Member], common: resolve.Given, given: Sequence[resolve.Given]
) -> Iterator[str]:
    """Say that methods are compared on different networks, where nobody asked for that."""
    if any("model.name" in one.values for one in (common, *given)):
        return
    models: dict[str, list[str]] = {}
    for member in members:
        methods = models.setdefault(member.config.model.name, [])
        if member.config.method.name not in methods:
            methods.append(member.config.method.name)
    if len(models) > 1:
        each = "; ".join(f"{model} for {', '.join(methods)}" for model, methods in models.items())
        yield f"no model is given, so the networks differ: {each}; set `model` to compare on one."
