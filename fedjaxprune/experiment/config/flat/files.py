"""Settings as text: YAML files, presets, and what differs between two configs."""

import importlib.resources
import json
import pathlib
import shlex
import zlib
from collections.abc import Mapping
from typing import Any

import yaml

from fedjaxprune.experiment.config.flat import identity
from fedjaxprune.experiment.config.flat.sections import RunConfig, Settings, UserError
from fedjaxprune.experiment.config.flat.validation import near_miss

VERSIONS = "versions"  # the key of config.yaml that records packages and is no setting
PLACES = ("out", "data_dir")  # where things lie: they may differ when a run is resumed


class _Loader(yaml.SafeLoader):
    """YAML's safe reader, but a key that comes twice is a mistake."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, unless a key comes twice."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is set twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _load(text: str, *, source: str) -> dict[str, Any]:
    """Read a mapping of names to values."""
    try:
        values = yaml.load(text, _Loader)  # as safe as SafeLoader, of which it is one
    except yaml.constructor.ConstructorError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{source} cannot be used{where}: {error.problem}.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{source} is not valid YAML{where}, or just before.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or ["it cannot be read"])[0]
        raise UserError(f"{source} is not valid YAML: {reason}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{source} must hold settings as `name: value`, got {str(values)[:80]!r}.")
    return values


def read_yaml(text: str, *, source: str) -> dict[str, Any]:
    """Read settings from YAML; the record of versions that a run adds is left out.

    Raises:
      UserError: the text is no YAML, or no mapping of names to values.
    """
    values = _load(text, source=source)
    return {key: value for key, value in values.items() if key != VERSIONS}


def read_versions(text: str, *, source: str) -> dict[str, str] | None:
    """Read the record of versions that a run adds to its config; None where there is none."""
    found = _load(text, source=source).get(VERSIONS)
    return found if isinstance(found, dict) else None


def read_source(name: str) -> dict[str, Any]:
    """Read the settings of a preset by its name or of a YAML file by its path.

    Raises:
      UserError: there is no such preset or file, or it cannot be read.
    """
    path = pathlib.Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            return read_yaml(path.expanduser().read_text(encoding="utf-8"), source=name)
        except (OSError, UnicodeDecodeError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"cannot read the YAML file {name!r}: {reason}.") from None
    texts = preset_texts()
    if name in texts:
        return read_yaml(texts[name], source=f"preset {name}")
    known = f"expected is a preset ({', '.join(texts)}) or the path of a .yaml file"
    if len(path.parts) != 1 or path.exists():
        raise UserError(f"{name!r} is neither a preset nor a .yaml file: {known}.")
    raise UserError(f"unknown preset {name!r}: {known}{near_miss(name, texts)}")


def preset_texts() -> dict[str, str]:
    """Read every preset that ships with the package: name to YAML text, in order."""
    folder = importlib.resources.files("fedjaxprune.experiment").joinpath("presets")
    files = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(files, key=lambda entry: entry.name)
    }


def to_yaml(config: RunConfig, *, versions: Mapping[str, str] | None = None) -> str:
    """Write a complete config; `out` is left out, as the folder that holds the file says it."""
    values: dict[str, Any] = config.model_dump(exclude={"out"})
    if versions is not None:
        values[VERSIONS] = dict(versions)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def fingerprint(config: RunConfig) -> int:
    """Sum up all that decides a run's bits, so that a checkpoint can tell whose it is."""
    values = config.model_dump(exclude=set(PLACES))
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def differences(stored: RunConfig, names: Any, given: Settings) -> list[str]:
    """List how the explicitly given settings `names` differ from a stored run's.

    Where things lie may differ; chunks and devices are compared as the run has them, at most the
    cohort, and "auto" and 0 leave them to the run.
    """
    different = []
    for name in names:
        there, here = getattr(stored, name), getattr(given, name)
        if name in ("chunk_size", "devices"):
            here = there if here in ("auto", 0) else min(here, stored.cohort_size)
        if name not in PLACES and there != here:
            different.append(f"{name} is {there!r} in the run, {here!r} was given")
    return different


def command(config: Mapping[str, Any]) -> str:
    """Write the shortest command that makes a run with this config.

    What does not matter to its numbers is left out, but for when it is tested.
    """
    given: dict[str, Any] = {}
    words = ["fedjaxprune", "run"]
    try:
        for name in Settings.model_fields:
            is_told = name in ("eval_every", "eval_from") or identity.matters(name, config)
            if name not in config or not is_told:
                continue
            value = config[name]
            if getattr(Settings(**given), name) != value:
                given[name] = value
                option = name.replace("_", "-")
                if isinstance(value, bool):
                    words.append(f"--{option}" if value else f"--no-{option}")
                else:
                    words += [f"--{option}", "none" if value is None else str(value)]
        Settings(**given)
    except ValueError:  # another version's config
        return "fedjaxprune run config.yaml"
    return shlex.join(words)
