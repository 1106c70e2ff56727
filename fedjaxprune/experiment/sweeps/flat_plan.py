"""Many runs from one file: what is missing is run, what was broken off goes on.

::

    preset: feddip-fashion-mnist    # or a YAML file; its settings come first
    rounds: 100                     # settings of all runs
    seed: [0, 1, 2]                 # a list stands for a run with each of its values
    cases:                          # one after the other, each with lists of its own
      - {algorithm: fedavg}
      - {algorithm: feddip, sparsity: [0.8, 0.9]}

Every combination is a member with a folder of its own, named by what the file varies. Members that
differ only in what does not matter to them (the sparsity of a dense method) are one.
"""

import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml

from fedjaxprune.experiment.config.flat import files, identity, validation
from fedjaxprune.experiment.config.flat.sections import RunConfig, UserError

PRESET, CASES = "preset", "cases"
_BARE = ("algorithm", "dataset", "model")  # whose values say what they are


class Member(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: of its folder.
      config: validated, with `out` set.
    """

    name: str
    config: RunConfig


class Sweep(NamedTuple):
    """A file, read.

    Attributes:
      source: its name, for messages.
      folder: of the members' folders.
      members: in the order in which they are run.
    """

    source: str
    folder: pathlib.Path
    members: tuple[Member, ...]


def read(source: str, *, out: pathlib.Path | None) -> Sweep:
    """Read a sweep and check all of its members, those that have been run included.

    Args:
      source: path of the YAML file.
      out: folder of the members' folders; None for the file's `out`, or ``runs/`` and its name.

    Raises:
      UserError: the file cannot be read, a member is no run that could be made, or a folder holds
        another run.
    """
    path = pathlib.Path(source)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{source!r} is no sweep: expected is the path of a .yaml file.")
    values = files.read_source(source)
    cases = values.pop(CASES, [{}])
    if not isinstance(cases, list) or not all(_is_settings(case) for case in cases) or not cases:
        raise UserError(
            f"{CASES} (from {source}) must be a list of settings such as "
            "`- {algorithm: fedavg}`, each as `name: value`."
        )
    preset = values.pop(PRESET, None)
    if preset is not None and not isinstance(preset, str):
        raise UserError(f"{PRESET} (from {source}) must be a preset or a .yaml file.")
    common = {} if preset is None else files.read_source(preset)
    named = values.pop("out", None)
    if named is not None and (not isinstance(named, str) or not named):
        raise UserError(f"out (from {source}) must be a text that is not empty, got {named!r}.")
    folder = out or pathlib.Path(os.path.expanduser(named or pathlib.Path("runs") / path.stem))
    members = tuple(_members(source, common, values, cases, folder))
    for member in members:
        _check_folder(folder / member.name, member, source)
    return Sweep(source=source, folder=folder, members=members)


def _is_settings(case: Any) -> bool:
    return isinstance(case, dict) and all(isinstance(name, str) for name in case)


def _members(
    source: str,
    common: Mapping[str, Any],
    values: Mapping[str, Any],
    cases: list[dict[str, Any]],
    folder: pathlib.Path,
) -> Iterator[Member]:
    """Make the members in order: case by case, the lists that stand last in the file fastest."""
    seen: dict[str, str] = {}
    names: set[str] = set()
    for case in cases:
        given = {**values, **case}
        varied = [name for name in given if isinstance(given[name], list) or name in case]
        for name, value in given.items():
            if isinstance(value, list) and not value:
                raise UserError(f"{name} (from {source}) is a list without a value.")
        choices = [value if isinstance(value, list) else [value] for value in given.values()]
        for chosen in itertools.product(*choices):
            settings = {**common, **dict(zip(given, chosen, strict=True))}
            config = validation.validate(settings, sources=dict.fromkeys(settings, source))
            plain = config.model_dump()
            key = json.dumps([config.seed, identity.configuration(plain)], sort_keys=True)
            name = _name(varied, plain)
            if key in seen:
                continue
            if name in names:
                raise UserError(
                    f"two members of the sweep {source} would have the folder {name!r}; give each "
                    "case a setting that tells it from the others."
                )
            seen[key] = name
            names.add(name)
            out = str(folder / name)
            yield Member(name=name, config=config.model_copy(update={"out": out}))


def _name(varied: list[str], config: Mapping[str, Any]) -> str:
    """Name a member by what the file varies, as far as it matters to it, and by its seed."""
    parts = []
    varied = [name for name in varied if name not in ("algorithm", identity.SEED)]
    for name in dict.fromkeys(["algorithm", *varied, identity.SEED]):
        if name == "algorithm" or identity.matters(name, config):
            value = yaml.safe_dump(config[name]).splitlines()[0]
            parts.append(value if name in _BARE else f"{name}-{value}")
    return re.sub(r"[^A-Za-z0-9.+]+", "-", "-".join(parts)).strip("-.")


def is_finished(member: Member) -> bool:
    """Tell whether nothing is left to do for a member."""
    from fedjaxprune.experiment.folder import failure, record

    folder = pathlib.Path(str(member.config.out))
    return (folder / record.SUMMARY).exists() and failure.read(folder) is None


def _check_folder(folder: pathlib.Path, member: Member, source: str) -> None:
    """Refuse a folder that another file made."""
    from fedjaxprune.experiment.folder import record

    if not (folder / record.CONFIG).exists():
        return
    there = record.stored(folder)[0].model_dump()
    here = member.config.model_dump()
    different = [
        f"{name} is {there.get(name)!r} there and {here[name]!r} in {source}"
        for name in here
        if (name == identity.SEED or identity.matters(name, here)) and there.get(name) != here[name]
    ]
    if different:
        raise UserError(
            f"the folder {str(folder)!r} holds another run: {'; '.join(different)}; "
            "give the sweep another folder with --out."
        )
