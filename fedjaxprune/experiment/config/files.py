"""Configurations as text: YAML files, presets, the config of a run folder, the shortest command."""

import json
import os
import pathlib
import shlex
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

import fedjaxprune
from fedjaxprune.errors import ConfigError, first_line, near_file, near_miss
from fedjaxprune.experiment import reading
from fedjaxprune.experiment.config import identity, rebase, resolve, yaml_text
from fedjaxprune.experiment.config.sections import PLACES, SCHEMA, RunConfig, plain
from fedjaxprune.registry import Found
from fedjaxprune.settings import INT_MAX, nested

# Keys of a run folder's config.yaml that are no settings.
VERSIONS, ENVIRONMENT, PARTS, COMMAND = "versions", "environment", "parts", "command"
STARTED_IN = "started_in"
_NOTES = (VERSIONS, ENVIRONMENT, PARTS, COMMAND, STARTED_IN)
_ALWAYS = ("method", "model", "data.dataset")  # parts without which there is no run
# "auto" leaves them to the run.
_DEVICES, _CHUNK = "execution.devices", "execution.chunk_size"
_PLACES = ("execution.examples", "execution.client_rows")
_CHOSEN_HERE = (_DEVICES, _CHUNK, "execution.convolutions", *_PLACES)


class Stored(NamedTuple):
    """The config of a run folder, as it stands in the file."""

    values: dict[str, Any]  # nested settings
    versions: dict[str, str]  # of packages that the run was made with
    # whose code ran, by the path of a part's section; built-in parts are not in it
    parts: dict[str, dict[str, str]]
    command: str  # the shortest command that makes such a run
    started_in: str  # the working folder, from which relative paths are seen
    environment: dict[str, str]  # what else decides the bits, such as options of JAX


def load_yaml(text: str, *, source: str) -> dict[str, Any]:
    """Read a mapping of names to values."""
    try:
        values = yaml_text.read(text)
    except yaml.constructor.ConstructorError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{source} cannot be used{where}: {error.problem}.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{source} is not valid YAML{where}, or just before.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid YAML: {first_line(error)}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        given = str(values)[:80]
        raise ConfigError(f"{source} must hold settings as `name: value`, got {given!r}.")
    return values


def read_stored(text: str, *, source: str) -> Stored:
    """Read the config of a run folder; imports none of its parts."""
    values = load_yaml(text, source=source)
    _check_keys(values, source)
    schema = values.pop("schema", None)
    if schema != SCHEMA:
        raise ConfigError(
            f"schema must be {SCHEMA} for this version of fedjaxprune, got "
            f"{'none' if schema is None else repr(schema)} (from {source})."
        )
    versions = values.pop(VERSIONS, None)
    parts, command = values.pop(PARTS, {}), values.pop(COMMAND, "")
    started_in = str(values.pop(STARTED_IN, ""))
    environment = values.pop(ENVIRONMENT, {})
    lost = [
        name
        for name, field in RunConfig.model_fields.items()
        if name not in values or (nested(field.annotation) and not isinstance(values[name], dict))
    ]
    notes = {VERSIONS: versions, PARTS: parts}
    lost += [name for name, note in notes.items() if not isinstance(note, dict)]
    lost += [] if _are_texts(environment) else [ENVIRONMENT]
    if not lost:
        lost = [f"{PARTS}.{name}" for name, one in parts.items() if not _are_texts(one)]
        lost += _nameless(values)
    if lost:
        raise ConfigError(
            f"{source} is not the whole config of a run: it lacks {', '.join(lost[:3])}"
            f"{' and more' if len(lost) > 3 else ''}."
        )
    return Stored(values, versions, parts, str(command), started_in, environment)


def _check_keys(values: Any, source: str) -> None:
    """Refuse names that are no texts, at any depth."""
    inner = values.values() if isinstance(values, dict) else values
    for key in values if isinstance(values, dict) else ():
        if not isinstance(key, str):
            raise ConfigError(f"{source} must hold settings as `name: value`, got {key!r}.")
    for one in inner:
        if isinstance(one, dict | list):
            _check_keys(one, source)


def _nameless(values: Mapping[str, Any]) -> list[str]:
    """List the parts without a name; of those that every run has, all, and of others if given."""
    lost = []
    for path in PLACES:
        found: Any = values
        for step in path.split("."):
            found = found.get(step) if isinstance(found, dict) else None
        name = found.get("name") if isinstance(found, dict) else None
        if not isinstance(name, str) and (found is not None or path in _ALWAYS):
            lost.append(f"{path}.name")
    return lost


def _are_texts(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(one, str) for one in values.values())


def read_source(name: str) -> resolve.Given:
    """Read the settings of a preset by its name or of a YAML file by its path.

    A run folder's config.yaml is such a file, too.
    """
    values = load_source(name)
    return resolve.read({k: v for k, v in values.items() if k not in _NOTES}, source=name)


def load_source(name: str) -> dict[str, Any]:
    """Read a preset or a YAML file; relative paths in it become such as are seen from here."""
    path = pathlib.Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            text = reading.text(path.expanduser(), largest=yaml_text.LARGEST, may_link=True)
        except (OSError, UnicodeDecodeError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            near = near_file(path.absolute())
            raise ConfigError(f"cannot read the YAML file {name!r}: {reason}{near}") from None
        values = load_yaml(text, source=name)
        begun = values.get(STARTED_IN)  # of a run folder's config: where its paths are seen from
        folders = [pathlib.Path(begun)] if isinstance(begun, str) and begun else []
        return rebase.rebase(values, [*folders, path.expanduser().parent])
    texts = preset_texts()
    if name in texts:
        return load_yaml(texts[name], source=f"preset {name}")
    if "/" in name or path.suffix or path.exists():
        raise ConfigError(
            f"{name!r} is neither a preset nor a .yaml file: the name of a file must end in .yaml."
        )
    known = f"expected is a preset ({', '.join(texts)}) or the path of a .yaml file"
    raise ConfigError(f"unknown preset {name!r}: {known}{near_miss(name, texts)}")


def preset_texts() -> dict[str, str]:
    """Read every preset that ships with the package: name to YAML text, in order.

    They lie beside the parts that they are of, in folders called ``presets``.
    """
    files = pathlib.Path(fedjaxprune.__path__[0]).glob("*/presets/*.yaml")
    return {
        one.stem: one.read_text(encoding="utf-8") for one in sorted(files, key=lambda one: one.name)
    }


def to_yaml(
    config: RunConfig,
    *,
    versions: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Write a complete config, and for a run folder what else decides its bits, and a command."""
    values: dict[str, Any] = {"schema": SCHEMA, **plain(config)}
    if versions is not None:
        values |= {PARTS: whose_code(config), COMMAND: command(config)}
        values |= {STARTED_IN: os.getcwd(), VERSIONS: dict(versions)}
        values[ENVIRONMENT] = dict(environment or {})
    return yaml_text.write(values)


def whose_code(config: RunConfig) -> dict[str, dict[str, str]]:
    """Say whose code the parts of a config are, by the path of their section.

    A package with its version, a file with its checksum, or a value; nothing for built-in parts.
    """
    found = {path: getattr(config.parts, place.kind) for path, place in PLACES.items()}
    return {path: noted for path, part in found.items() if (noted := origin_of(part))}


def origin_of(part: Found) -> dict[str, str]:
    """Say whose code a part is; nothing for a built-in one."""
    if part.origin.source == "built-in":
        return {}
    return {"name": part.name, **{name: one for name, one in part.origin._asdict().items() if one}}


def code_changes(
    then: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]
) -> str:
    """Say which parts of a stored run have other code now, in a sentence; empty if none has."""
    changes = []
    for path in dict.fromkeys([*then, *now]):
        old, new = _code(then.get(path)), _code(now.get(path))
        if old != new:
            changes.append(f"{path} was {old} then and is {new} now")
    return f"the run was made with other code: {'; '.join(changes)}." if changes else ""


def _code(origin: Mapping[str, str] | None) -> str:
    if not origin:
        return "built in"
    if origin.get("package"):
        return f"{origin['package']} {origin.get('version', '')}".rstrip()
    checksum = origin.get("sha256", "")
    return f"a file with checksum {checksum[:8]}" if checksum else "a value given in Python"


def fingerprint(config: RunConfig) -> int:
    """Sum up all that decides a run's bits, so that a checkpoint can tell which run it is of."""
    values = identity.flat(plain(config))
    values.pop(identity.DATA_DIR, None)
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def differences(stored: RunConfig, given: resolve.Given) -> list[str]:
    """List how explicitly given settings differ from a stored run's.

    Where the data lie may differ; ``auto`` leaves devices and chunks to the run, and a number of
    them is compared at most as large as a run takes of its cohort.
    """
    there = resolve.read(plain(stored))
    same = {path: old for path, old in there.values.items() if path in given.values}
    same = {path: old for path, old in same.items() if rebase.is_same(old, given.values[path])}
    given = given._replace(values={**given.values, **same})
    found = {path: getattr(stored.parts, place.kind) for path, place in PLACES.items()}
    own = {f"{path}.name": one for path, one in found.items() if one.origin.source == "value"}
    base = there._replace(values={**there.values, **own})
    merged = resolve.resolve(resolve.merge(base, given))
    here = identity.flat(plain(merged))
    size = stored.federation.cohort_size or INT_MAX
    most = {_DEVICES: size * stored.execution.model_devices, _CHUNK: size}
    different = []
    for path, value in there.values.items():
        new: Any = here.get(path)
        if path in _CHOSEN_HERE and new == "auto":
            new = value
        elif path in most:
            new = min(new, most[path])
        if path in given.values and path != identity.DATA_DIR and value != new:
            different.append(
                f"{path.removesuffix('.name')} is {value!r} in the run, {new!r} was given"
            )
    return different


def command(config: RunConfig) -> str:
    """Write the shortest command that makes such a run; devices, chunks and places are left out."""
    if any(found.origin.source == "value" for found in config.parts):
        return "fjp.run(...) with parts that are values in Python"
    values, usual = identity.flat(plain(config)), _defaults(config)
    given: dict[str, Any] = {"method": values["method.name"]}
    for path in PLACES:
        if path != "method" and values[f"{path}.name"] != usual[f"{path}.name"]:
            given[path] = values[f"{path}.name"]
    for path, value in values.items():
        is_told = identity.matters(path) or path.startswith("evaluation.") or path == identity.SEED
        if is_told and not path.endswith(".name") and value != usual.get(path):
            given[path] = value
    known = [path for path in values if not path.endswith(".name")]
    words = ["fedjaxprune", "run"]
    for path, value in given.items():
        option = short_option(path, known).replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", "none" if value is None else str(value)]
    return shlex.join(words)


def _defaults(config: RunConfig) -> dict[str, Any]:
    """Give what each setting is where only the parts are named."""
    known = resolve.paths(type(config))
    usual = {path: owner.model_fields[name].default for path, (owner, name) in known.items()}
    usual = {path: list(one) if isinstance(one, tuple) else one for path, one in usual.items()}
    usual |= {f"{path}.name": place.default for path, place in PLACES.items()}
    usual["model.name"] = config.parts.method.part.default_model
    for path, place in reversed(PLACES.items()):  # a method's variant may set other sections
        usual |= resolve.by_path(getattr(config.parts, place.kind).variant, path)
    if config.data.num_clients is not None:
        usual["data.num_clients"] = resolve.CLIENTS
        usual["federation.cohort_size"] = min(resolve.COHORT, config.data.num_clients)
    return usual


def short_option(path: str, known: list[str]) -> str:
    """Give the shortest option of a setting: its last word where no other setting ends in it.

    The option of a part is its kind.
    """
    if path in PLACES:
        return PLACES[path].kind
    last = path.rpartition(".")[2]
    kinds = [place.kind for place in PLACES.values()]
    is_unique = sum(one.rpartition(".")[2] == last for one in known) == 1
    return last if is_unique and last not in kinds else path
