"""Settings as text: YAML files, presets, and what differs between two configs."""

import difflib
import importlib.resources
import pathlib
from collections.abc import Mapping
from typing import Any

import yaml

from fedjaxprune.experiment.config import RunConfig, UserError

VERSIONS = "versions"  # the key of config.yaml that records packages and is no setting
PLACES = ("out", "data_dir")  # where things lie: they may differ when a run is resumed


def read_yaml(text: str, *, source: str) -> dict[str, Any]:
    """Read settings from YAML; the record of versions that a run adds is left out.

    Raises:
      UserError: the text is no YAML, or no mapping of names to values.
    """
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{source} is not valid YAML{where}: {problem}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{source} must hold settings as `name: value`, got {values!r}.")
    return {key: value for key, value in values.items() if key != VERSIONS}


def read_source(name: str) -> dict[str, Any]:
    """Read the settings of a preset by its name or of a YAML file by its path.

    Raises:
      UserError: there is no such preset or file, or it cannot be read.
    """
    path = pathlib.Path(name)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        try:
            return read_yaml(path.read_text(encoding="utf-8"), source=name)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"cannot read the YAML file {name!r}: {reason}.") from None
    texts = preset_texts()
    if name not in texts:
        close = difflib.get_close_matches(name, texts, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise UserError(
            f"unknown preset {name!r}: must be one of {', '.join(texts)}, "
            f"or the path of a .yaml file{hint}"
        )
    return read_yaml(texts[name], source=f"preset {name}")


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


def differences(stored: RunConfig, values: Mapping[str, Any], given: RunConfig) -> list[str]:
    """List how explicitly given `values` differ from a stored run's, but for where things lie."""
    return [
        f"{name} is {getattr(stored, name)!r} in the run, {getattr(given, name)!r} was given"
        for name in values
        if name not in PLACES and getattr(stored, name) != getattr(given, name)
    ]
