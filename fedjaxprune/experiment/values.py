"""Values that a Python user gives in the place of names: models, data, methods and settings."""

from collections.abc import Mapping
from typing import Any

from fedjaxprune import registry
from fedjaxprune.errors import ConfigError, near_miss
from fedjaxprune.experiment.config import errors, resolve
from fedjaxprune.experiment.config.resolve import Given
from fedjaxprune.experiment.config.sections import PLACES, Data, RunConfig
from fedjaxprune.registry import Found


def under_paths(**given: Any) -> Given:
    """Put parts that were given by keyword under their paths."""
    paths = {"method": "method", "model": "model", "data": "data.dataset"}
    found: dict[str, Any] = {}
    for name, value in given.items():
        is_data = name == "data" and isinstance(value, Mapping)
        # A mapping of arrays has names of its own; one of settings has those of the section.
        is_data = is_data and any(one.partition(".")[0] not in Data.model_fields for one in value)
        if isinstance(value, Mapping) and not is_data:
            found |= resolve.read({name: value}).values
        elif value is not None:
            found[f"{paths[name]}.name"] = value
    return Given(found)


def as_parts(given: Given, *, is_new: bool) -> Given:
    """Make parts of values; data with client ids are dealt out by them, if nothing else is said."""
    values = dict(given.values)
    for path, place in PLACES.items():
        name = f"{path}.name"
        if name in values and not isinstance(values[name], str):
            values[name] = as_found(place.kind, values[name], path=path)
    data = values.get("data.dataset.name")
    if is_new and isinstance(data, Found) and data.origin.source == "value":
        made = getattr(data.part.build, "value", None)
        if getattr(made, "clients", None) is not None:
            values.setdefault("data.num_clients", len(made.clients.sizes))  # pyright: ignore[reportOptionalMemberAccess]
        untold = not {"data.partition.name", "data.num_clients"} & set(values)
        keys = getattr(getattr(data.part.build, "value", None), "keys", None)
        if untold and isinstance(keys, Mapping) and len(keys) == 1:
            values["data.partition.name"] = "by_key"
    return given._replace(values=values)


def as_found(kind: str, value: Any, *, path: str = "") -> Found | None:
    """Make a part of a value: of a function or a `Part` what it builds, else the value itself."""
    if value is None or isinstance(value, Found):
        return value
    if kind == "dataset" and resolve.as_found(kind, value):
        from fedjaxprune.data import conversion

        value = conversion.as_dataset(value)
    return resolve.as_found(kind, value) or registry.find(kind, value, path=path)


def model_of(given: Given) -> Found | None:
    """Find the network among what was given, if it is a value."""
    found = given.values.get("model.name")
    return found if isinstance(found, Found) and found.origin.source == "value" else None


def keywords(given: Given, settings: Mapping[str, Any]) -> Given:
    """Read keywords that are sections of the config, or settings by their short or full names."""
    sections = {name: one for name, one in settings.items() if name in RunConfig.model_fields}
    named = dict(resolve.read(sections).values)
    rest = {name: one for name, one in settings.items() if name not in sections}
    parts = {place.kind: f"{path}.name" for path, place in PLACES.items()}
    by_name = parts | {path: f"{path}.name" for path in PLACES}
    named |= {by_name[name]: rest.pop(name) for name in list(rest) if name in by_name}
    named = dict(as_parts(Given(named), is_new=False).values)
    if rest:
        found = resolve.find_parts(resolve.merge(given, Given(named)))
        known = [path for path in resolve.paths(found.type) if not path.endswith(".name")]
        for name, value in rest.items():
            paths = [path for path in known if name in (path, path.rpartition(".")[2])]
            if len(paths) > 1:
                raise ConfigError(
                    f"{name} may be {' or '.join(paths)}: give it by its full path in the config."
                )
            if not paths:
                hint = errors.explain(name, known, found.parts)
                if hint.owners:
                    raise ConfigError(f"there is no setting {name!r} here: {errors.whose(hint)}.")
                near = hint.renamed or next(iter(hint.paths), "")
                end = f"; did you mean {near!r}?" if near else near_miss(name, parts)
                raise ConfigError(f"there is no setting {name!r} of this run{end}")
            named[paths[0]] = value
    return Given(named)
