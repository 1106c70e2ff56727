"""What a part is, in words: summary, paper, settings, needs, variants and a command."""

import contextlib
import inspect
import sys
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedjaxprune import registry
from fedjaxprune.errors import ConfigError, near_miss
from fedjaxprune.experiment.config.sections import PLACES
from fedjaxprune.registry import Found, listing
from fedjaxprune.registry.imports import refer
from fedjaxprune.registry.listing import split_variant
from fedjaxprune.settings import Row, Settings

_NEEDS: Mapping[str, str] = {
    "batch_norm": "a network with BatchNorm",
    "convolutions": "a network with convolutions",
    "gates": "a network with gates",
    "products": "kernels whose products with what comes of the examples can be followed",
    "server_examples": "examples at the server (server.data_fraction)",
}
_WIDTH = 100
_FOR_CALLERS = ("Args:", "Returns:", "Raises:")  # paragraphs that a doc-string has for callers


class Description(NamedTuple):
    """A part in words; `str` gives the text that ``fedjaxprune describe`` prints."""

    kind: str  # such as ``"method"``; empty for a value whose kind cannot be told
    name: str  # as the user wrote it
    summary: str
    origin: str  # whose code it is, such as ``"built in"`` or ``"fedprune-lab 0.1"``
    paper: str  # authors, year, title and where it is; empty without one
    settings: tuple[Row, ...]  # rows of `describe_settings`
    needs: tuple[str, ...]  # of network and data, one phrase for each
    variants: Mapping[str, Mapping[str, Any]]  # settings of each variant by its full name
    default_model: str  # network of a method that is run without one
    text: str
    command: str
    namesakes: tuple[str, ...]  # parts of other kinds with this name, as ``kind/name``

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def describe(name: Any) -> Description:
    """Describe a part and import nothing but its module.

    Args:
      name: of a part of any kind, ``kind/name``, ``module:NAME``, ``file.py:NAME``, or a value.

    Raises:
      ConfigError: there is no such part; in one sentence.
    """
    found, namesakes = _find(name)
    part = found.part
    summary, text = _texts(part)
    listed = registry.names(found.kind).get(found.name) if found.kind else None
    return Description(
        kind=found.kind,
        name=found.name,
        summary=(listed.summary if listed else "") or getattr(part, "summary", "") or summary,
        origin=_origin(found),
        paper=_paper(getattr(part, "paper", None)),
        settings=tuple(registry.describe_settings(part.settings)),
        needs=_needs(part),
        variants={
            f"{split_variant(found.name)[0]}/{n}": v
            for n, v in getattr(part, "variants", {}).items()
        },
        default_model=getattr(part, "default_model", ""),
        text=text,
        command=_command(found),
        namesakes=namesakes,
    )


def _find(name: Any) -> tuple[Found, tuple[str, ...]]:
    """Find a part whose kind is not given, and its namesakes of other kinds."""
    if not isinstance(name, str):
        return registry.find(_kind_of(name), name), ()
    head, _, rest = name.partition("/")
    if head in registry.KINDS and rest:
        return registry.find(head, rest), ()
    if ".py" in name or ":" in name:
        place, _, inside = name.rpartition(":")
        if name.endswith(".py"):
            return registry.find("method", name), ()
        value, _ = refer(place, inside.partition("/")[0], f"{name!r}")
        return registry.find(_kind_of(value), name), ()
    listed = {kind: registry.names(kind) for kind in registry.KINDS}
    kinds = [kind for kind, names in listed.items() if name in names or (head in names and rest)]
    if not kinds:
        known = [one for names in listed.values() for one in names]
        raise ConfigError(
            f"there is no part {name!r}: `fedjaxprune list` names all, and others are "
            f"file.py:NAME or module:NAME{near_miss(name, known)}"
        )
    return registry.find(kinds[0], name), tuple(f"{kind}/{name}" for kind in kinds[1:])


def _kind_of(value: Any) -> str:
    """Tell the kind of a part by what it says of itself, or by what it wants to be given."""
    if hasattr(value, "variants"):
        return "method"
    wanted: set[str] = set()
    with contextlib.suppress(TypeError, ValueError):
        wanted = set(inspect.signature(getattr(value, "build", value)).parameters)
    kinds = (kind for kind, one in registry.KINDS.items() if wanted & set(one.context))
    return next(kinds, "dataset")


def _texts(part: Any) -> tuple[str, str]:
    """Give the first line and the rest of the doc-string of a part's module, or of its settings."""
    build = inspect.unwrap(getattr(part.build, "func", part.build))
    module = sys.modules.get(getattr(build, "__module__", ""), None)
    is_method = hasattr(part, "variants") and getattr(build, "__name__", "") == "build"
    of = module if is_method and getattr(module, "__doc__", None) else build
    own = part.settings.__dict__.get("__doc__") if part.settings is not Settings else ""
    first, _, rest = (inspect.getdoc(of) or own or "").partition("\n")
    paragraphs = rest.strip().split("\n\n")
    return first, "\n\n".join(one for one in paragraphs if not one.startswith(_FOR_CALLERS))


def _origin(found: Found) -> str:
    origin = found.origin
    if origin.package:
        return f"{origin.package} {origin.version}".rstrip()
    return origin.path or {"built-in": "built in", "value": "a value"}.get(origin.source, "")


def _paper(paper: Any) -> str:
    if not paper:
        return ""
    where = [f"arXiv {paper.arxiv}"] if paper.arxiv else []
    where += [f"code {paper.code}"] if paper.code else []
    return ", ".join([f"{paper.authors}, {paper.title}, {paper.year}", *where])


def _needs(part: Any) -> tuple[str, ...]:
    """Say what a method needs under its default settings."""
    needs = getattr(part, "needs", ())
    needs = needs(part.settings()) if callable(needs) else needs
    wanted: dict[str, bool] = needs._asdict() if needs else {}
    return tuple(_NEEDS.get(name, name) for name, is_needed in wanted.items() if is_needed)


def _command(found: Found) -> str:
    is_named = any(place.kind == found.kind for place in PLACES.values())
    option = found.kind.replace("_", "-")
    if found.kind == "tracker":
        return f"fedjaxprune run --track {found.name}"
    if not is_named:
        return ""
    needed = [
        f"--{name.replace('_', '-')} ..."
        for name, field in found.part.settings.model_fields.items()
        if field.is_required() and name not in found.variant
    ]
    return " ".join([f"fedjaxprune run --{option} {found.name}", *needed])


def _lines(one: Description) -> list[str]:
    """Lay a description out as text."""
    kind = one.kind.replace("_", " ")
    lines = [f"{one.name}: {one.summary}".rstrip(": "), ""]
    facts = {
        "kind": f"{kind}, {one.origin}",
        "paper": one.paper,
        "needs": ", ".join(one.needs),
        "default model": one.default_model,
        "command": one.command,
        "also": ", ".join(one.namesakes),
    }
    lines += [f"  {name + ':':<15}{text}" for name, text in facts.items() if text]
    if one.settings:
        lines += ["", "settings:"]
        for row in one.settings:
            lines.append(f"  {row.name}  {in_words(row)}")
            lines += textwrap.wrap(
                row.meaning, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    if one.variants:
        lines += ["", "variants:"]
        for name, settings in one.variants.items():
            lines.append(f"  {name}  {listing.in_words(settings)}")
    if one.text:
        lines += ["", one.text]
    return lines


def in_words(row: Row) -> str:
    """Say what a setting may be, its unit and its default, in brackets."""
    kind = f"{row.type.removesuffix(' | none')} {row.bounds}".strip()
    notes = (kind, row.unit, f"default: {row.default}")
    return f"[{'; '.join(note for note in notes if note)}]"
