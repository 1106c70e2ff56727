"""Find the part that a name, a reference or a Python value stands for; imports that part alone."""

import difflib
import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedjaxprune.errors import ConfigError, beside, first_line, near_file, near_miss, shown
from fedjaxprune.registry import listing
from fedjaxprune.registry.imports import load, locate, refer
from fedjaxprune.registry.listing import KINDS, Origin
from fedjaxprune.registry.parts import a_kind, as_part, name_of

_REFERENCE = re.compile(r"(?P<place>.+\.py|[^\W\d][\w.]*):(?P<name>[^\W\d]\w*)")
_TFDS_NAME = re.compile(r"[A-Za-z]\w*(/[\w.-]+)*(:[\w.]+)?")


class Found(NamedTuple):
    """A part that was looked up.

    Attributes:
      kind: such as ``"method"``.
      name: as the user wrote it.
      part: a `Part`, or a `Method` for the kind ``method``.
      variant: settings that the name sets: those of a method's variant, by name or full path.
      origin: whose code it is.
    """

    kind: str
    name: str
    part: Any
    variant: Mapping[str, Any]
    origin: Origin


def find(kind: str, name: Any, *, path: str = "") -> Found:
    """Look up one part and import its module, and no other.

    Args:
      kind: one of `KINDS`.
      name: a name, ``method/variant``, ``file.py:NAME``, ``module:NAME``, a `Part`, a `Method`, or
        a plain function (see `part`).
      path: of the setting that names it, such as ``"client.optimizer"``, for errors.

    Raises:
      ConfigError: one sentence that says what was given and what is allowed.
    """
    listing.check_kind(kind)
    label = path or kind
    if isinstance(name, Found):
        return name
    if not isinstance(name, str):
        given = f"the function {name_of(name)!r}" if inspect.isroutine(name) else shown(name)
        made = as_part(kind, name, f"{label}: {given}")
        return Found(kind, name_of(name), made, {}, Origin("value"))
    base, variant = listing.split_variant(name) if kind == "method" else (name, "")
    value, origin, settings = _look_up(kind, base, name, label)
    made = as_part(kind, value, f"{label}: {base!r}")
    is_variant = bool(variant) or (kind == "method" and name.endswith("/"))
    if is_variant and not made.variants:
        raise ConfigError(f"{label}: {base!r} has no variants, got {variant!r}.")
    if is_variant and variant not in made.variants:
        raise ConfigError(
            f"{label}: the variant of {base!r} must be one of {', '.join(made.variants)}, "
            f"got {variant!r}{near_miss(variant, made.variants)}"
        )
    return Found(kind, name, made, made.variants[variant] if variant else settings, origin)


def _look_up(kind: str, base: str, name: str, label: str) -> tuple[Any, Origin, Mapping[str, Any]]:
    """Find the value that a name stands for, whose it is, and what the name sets."""
    if base.endswith(".py"):
        base = f"{base}:{_only_name(kind, base, label)}"
    if reference := _REFERENCE.fullmatch(base):
        return *refer(reference["place"], reference["name"], f"{label}: {base!r}"), {}
    places = listing.built_in(kind)
    if base in places:
        return _built_in(kind, base, places[base].module, label), Origin("built-in"), {}
    points = listing.entry_points(kind).get(base, [])
    if len(points) > 1:
        offers = " and ".join(f"{o.package} {o.version}" for o in map(listing.origin, points))
        raise ConfigError(
            f"{label}: {base!r} is offered by {offers}: write "
            f"{' or '.join(point.value for point in points)}."
        )
    if points:
        value = load(points[0].load, f"{label}: {base!r} of {listing.origin(points[0]).package}")
        return value, listing.origin(points[0]), {}
    fallback, near = KINDS[kind].fallback, difflib.get_close_matches(name, places, cutoff=0.8)
    other = next((k for k in KINDS if k != kind and name in listing.built_in(k)), "")
    is_free = not other and not near and _TFDS_NAME.fullmatch(name)
    if fallback and fallback[0] in places and is_free:
        part_name, setting = fallback
        module = places[part_name].module
        return _built_in(kind, part_name, module, label), Origin("built-in"), {setting: name}
    raise ConfigError(_unknown(kind, name, other, label))


def _unknown(kind: str, name: str, other: str, label: str) -> str:
    other = other or next((k for k in KINDS if k != kind and name in listing.entry_points(k)), "")
    if other:
        return f"{label}: {name!r} is {a_kind(other)}, not {a_kind(kind)}."
    listed = listing.names(kind)
    every = [*listed, *(f"{base}/{one}" for base in listed for one in listed[base].variants)]
    known = "".join(f"{one}, " for one in listed)
    return (
        f"{label} must be one of {known}path/to/file.py:NAME or package.module:NAME, "
        f"got {shown(name)}{(kind == 'dataset' and beside(name)) or ''}{near_miss(name, every)}"
    )


def _built_in(kind: str, name: str, module: str, label: str) -> Any:
    value = load(lambda: importlib.import_module(module), f"{label}: {name!r}")
    return value.METHOD if kind == "method" else value.PARTS[name]


def _only_name(kind: str, place: str, label: str) -> str:
    """Find what a file without ``:NAME`` means: its ``METHOD``, for a method."""
    try:
        found = listing.top_names(locate(place))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        near = near_file(locate(place))
        raise ConfigError(f"{label}: {place!r} cannot be read ({reason}){near}") from None
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{label}: {place!r} is no Python file ({first_line(error)}).") from None
    if kind == "method" and "METHOD" in found:
        return "METHOD"
    raise ConfigError(
        f"{label} must be {place}:NAME, got {place!r} (its names are {', '.join(found) or 'none'})."
    )
