"""From what users give to a `RunConfig`: find the parts, make one type of their settings, validate.

Settings are kept by full path on the way (``{"client.optimizer.name": "sgd"}``), so that layers
(a variant's settings, a file, options) are merged by path and an error can say where each is from.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pydantic

from fedjaxprune import registry
from fedjaxprune.data.sources import source_for_path
from fedjaxprune.errors import ConfigError, shown
from fedjaxprune.experiment.config import errors
from fedjaxprune.experiment.config.sections import PLACES, SCHEMA, Parts, RunConfig, Uplink, plain
from fedjaxprune.registry import Found, Part
from fedjaxprune.registry.listing import Origin, split_variant
from fedjaxprune.settings import Settings, nested

CLIENTS, COHORT = 20, 10  # where the user says nothing
_SECTIONS = frozenset(n for n, field in RunConfig.model_fields.items() if nested(field.annotation))


class Given(NamedTuple):
    """Settings as somebody gave them."""

    values: Mapping[str, Any]  # by full path; the name of a part is ``PATH.name``
    sources: Mapping[str, str] = {}  # where each came from (``"--num-rounds"``, a file), for errors


def read(values: Mapping[str, Any], *, source: str = "") -> Given:
    """Read nested settings, or settings by dotted path, or both."""
    origin = f" (from {source})" if source else ""
    found: dict[str, Any] = {}
    for path, value in _flat(values, "", origin):
        if path in found:
            raise ConfigError(f"{path} is set twice{origin}.")
        found[path] = value
    schema = found.pop("schema", SCHEMA)
    if schema != SCHEMA:
        raise ConfigError(
            f"schema must be {SCHEMA} for this version of fedjaxprune, got {schema!r}{origin}."
        )
    return Given(found, dict.fromkeys(found, source) if source else {})


def _flat(values: Mapping[str, Any], prefix: str, origin: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if not isinstance(key, str):
            raise ConfigError(f"{prefix}{key} must be a text, as names of settings are{origin}.")
        path = prefix + key
        value = value.model_dump(exclude_unset=True) if isinstance(value, Settings) else value
        is_nested = isinstance(value, Mapping) and not holds_arrays(value)
        if path in PLACES and not is_nested:
            yield f"{path}.name", value
        elif path in PLACES or path in _SECTIONS:
            if value is not None and not is_nested:
                given = shown(value)
                raise ConfigError(f"{path} must be settings as `name: value`, got {given}{origin}.")
            yield from _flat(value or {}, f"{path}.", origin)
        else:
            yield path, value


def holds_arrays(value: Mapping[Any, Any]) -> bool:
    """Tell a data set, a mapping of arrays, from settings."""
    return any(hasattr(one, "shape") for one in value.values())


def merge(first: Given, then: Given) -> Given:
    """Put settings over others; where they name another part, the old one's settings go."""
    values = dict(first.values)
    for path, place in PLACES.items():
        new = then.values.get(f"{path}.name")
        old = values.get(f"{path}.name", place.default)
        if new is not None and old is not None and not _is_same(place.kind, new, old):
            kept = Uplink.model_fields if path == "uplink" else {}
            for one in [one for one in values if one.startswith(f"{path}.")]:
                if one.removeprefix(f"{path}.") not in kept:
                    del values[one]
    return Given({**values, **then.values}, {**first.sources, **then.sources})


def _is_same(kind: str, new: Any, old: Any) -> bool:
    """Tell whether two names are of one part, such as two variants of a method."""
    if kind == "method" and isinstance(new, str) and isinstance(old, str):
        return split_variant(new)[0] == split_variant(old)[0]
    return new is old or (isinstance(new, str) and new == old)


class Resolved(NamedTuple):
    """Settings with the parts that they name, not validated yet."""

    given: Given  # all settings, those that names of parts set included
    parts: dict[str, Found]  # by the path of their section
    type: type[RunConfig]  # of a config with these parts


def find_parts(given: Given) -> Resolved:
    """Look up the parts that settings name; imports their modules."""
    default = PLACES["method"].default
    method = _find("method", given.values.get("method.name", default), given)
    layer = {"method.name": method.name, **by_path(method.variant, "method")}
    base = read(layer, source=f"method {method.name!r}")
    full = merge(base, given)
    parts, values = {"method": method}, dict(full.values)
    for path in PLACES:
        if path == "method":
            continue
        name = values.get(f"{path}.name", PLACES[path].default)
        found = _find(path, method.part.default_model if name is None else name, full)
        parts[path] = found
        values = by_path(found.variant, path) | values
    values |= {f"{path}.name": found.name for path, found in parts.items()}
    types = tuple(found.part.settings for found in parts.values())
    return Resolved(Given(values, full.sources), parts, _type_of(tuple(parts), types))


def by_path(variant: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Give settings that the name of a part sets by full path."""
    named = {one if "." in one else f"{section}.{one}": v for one, v in variant.items()}
    return dict(read(named).values)


def _find(path: str, name: Any, given: Given) -> Found:
    """Find one part: by name, by the path of a file of data, or a value."""
    kind = PLACES[path].kind
    if kind == "dataset" and isinstance(name, str) and (source := source_for_path(name)):
        return registry.find(kind, source[0], path=path)._replace(name=name, variant=source[1])
    if name is None or isinstance(name, int | float | list):
        raise ConfigError(
            f"{path} must be a name, such as those of `fedjaxprune list {kind}`, got "
            f"{shown(name)}{errors.source_of(path, given.sources)}."
        )
    if own := as_found(kind, name):
        return own
    source = errors.source_of(path, given.sources)
    return registry.find(kind, name, path=path if "from --" in source else f"{path}{source}")


class _Ready:
    """A `build` that gives what is there already."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *settings: Any, **context: Any) -> Any:
        return self.value


def as_found(kind: str, value: Any) -> Found | None:
    """Make a part of the component that it would build: a network, data, an algorithm.

    None where the value is a part or a function, which the registry looks up.
    """
    is_part = hasattr(value, "build") and hasattr(value, "settings")
    is_function = inspect.isroutine(value) or isinstance(
        value, str | functools.partial | type | Found
    )
    if is_part or is_function or kind not in ("model", "dataset", "method"):
        return None
    if kind == "method":
        if not hasattr(value, "stages"):
            return None
        from fedjaxprune.method import Method

        made = Method(build=_Ready(value), settings=Settings)
        return Found(kind, "own_method", made, {}, Origin("value"))
    return Found(kind, f"own_{kind}", Part(_Ready(value)), {}, Origin("value"))


@functools.cache
def _type_of(paths: tuple[str, ...], settings: tuple[type[Settings], ...]) -> type[RunConfig]:
    """Make the type of a config in which the places of parts have the parts' own settings."""
    return _concrete(RunConfig, "", tuple(zip(paths, settings, strict=True)))


@functools.cache
def _concrete(
    kind: type[Any], prefix: str, chosen: tuple[tuple[str, type[Settings]], ...]
) -> type[Any]:
    """Make a section's type with the settings of its parts.

    Configs share the types of the sections in which they have the same parts: to make all of them
    takes 30 milliseconds.
    """
    own = dict(chosen)
    fields: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        path = prefix + name
        inner: Any = field.annotation
        if path in own:
            inner = _part_type(path, own[path])
        elif path in _SECTIONS:
            below = tuple(one for one in chosen if one[0].startswith(f"{path}."))
            inner = _concrete(inner, f"{path}.", below)
        if inner is not field.annotation:
            fields[name] = (inner, pydantic.Field(description=field.description))
    return pydantic.create_model(kind.__name__, __base__=kind, **fields) if fields else kind


@functools.cache
def _part_type(path: str, settings: type[Settings]) -> type[Any]:
    """Make the type of a part: its settings and its name."""
    base: Any = (Uplink, settings) if path == "uplink" else settings
    return pydantic.create_model(settings.__name__, __base__=base, name=(str, ...))


def resolve(values: Mapping[str, Any] | Given) -> RunConfig:
    """Make a config: find the parts that it names, fill in defaults, and check everything once.

    A part is a name (also ``METHOD/VARIANT``, ``file.py:NAME``, ``module:NAME``), a mapping with
    its ``name`` and settings, or a value: a `Part`, a `Method`, a function, a model, a data set.
    """
    found = find_parts(values if isinstance(values, Given) else read(values))
    check_names(found)
    settings = dict(found.given.values)
    if (
        settings.get("data.num_clients") is None
        and "key" not in found.parts["data.partition"].part.settings.model_fields
    ):
        settings["data.num_clients"] = CLIENTS
    key = settings.get("data.partition.key")
    if key is not None and "data.dataset.keys" in paths(found.type):
        settings.setdefault("data.dataset.keys", [key])
    by_kind = {PLACES[path].kind: one for path, one in found.parts.items()}
    return _make(found.type, settings, Parts(**by_kind), found.given.sources)


def check_names(found: Resolved) -> None:
    """Refuse a setting that a run with these parts does not have."""
    known = paths(found.type)
    for path in found.given.values:
        if path not in known:
            hint = errors.explain(path, known, found.parts)
            raise errors.unknown(path, hint, errors.source_of(path, found.given.sources))


def settings_of(found: Found, values: Mapping[str, Any], *, path: str, source: str) -> Settings:
    """Check the settings of one part alone, without its name."""
    kind, sources = found.part.settings, {f"{path}.{name}": source for name in values}
    known = [f"{path}.{one}" for one in kind.model_fields]
    for full in sources:
        if full not in known:
            hint = errors.explain(full, known, {path: found})
            raise errors.unknown(full, hint, errors.source_of(full, sources))
    fields: dict[str, Any] = {path: (kind, ...)}
    owner = pydantic.create_model("Section", __base__=Settings, **fields)
    try:
        return getattr(owner.model_validate({path: dict(values)}), path)
    except pydantic.ValidationError as error:
        raise errors.refuse(error, owner, sources) from None


def replace(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Change settings by path, not parts; the whole is checked again."""
    values = {**read(plain(config)).values, **read(changes).values}
    return _make(type(config), values, config.parts, {})


def _make(
    kind: type[RunConfig], values: Mapping[str, Any], parts: Parts, sources: Mapping[str, str]
) -> RunConfig:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *steps, name = path.split(".")
        inner = tree
        for step in steps:
            inner = inner.setdefault(step, {})
        inner[name] = value
    for section in _SECTIONS:
        tree.setdefault(section, {})
    try:
        config = kind.model_validate(tree)
    except pydantic.ValidationError as error:
        raise errors.refuse(error, kind, sources) from None
    if config.federation.cohort_size is None and config.data.num_clients is not None:
        size = min(COHORT, config.data.num_clients)
        federation = config.federation.model_copy(update={"cohort_size": size})
        config = config.model_copy(update={"federation": federation})
    config._parts = parts
    return config


@functools.cache
def paths(kind: type[Settings], prefix: str = "") -> dict[str, tuple[type[Settings], str]]:
    """List the settings of a config by full path: the section's type, and the name in it."""
    found = {}
    for name, field in kind.model_fields.items():
        if inner := nested(field.annotation):
            found |= paths(inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = (kind, name)
    return found
