"""Options of ``fedjaxprune run``, made from the settings of a run, and what unknown ones meant."""

import difflib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import click

from fedjaxprune import registry
from fedjaxprune.experiment.config import errors, files, resolve
from fedjaxprune.experiment.config.describe import in_words
from fedjaxprune.experiment.config.sections import PLACES, RunConfig
from fedjaxprune.settings import Row, Settings, describe_settings

_MOST_NAMES = 6  # that the help of a part's option lists


class Setting(NamedTuple):
    """One option of a run."""

    path: str  # of the setting; that of its section for a part's name
    owner: type[Settings]  # type of the section
    name: str  # of the setting in it
    kind: str  # of the part, for a part's name; else empty


def settings_of(config_type: type[RunConfig]) -> list[Setting]:
    """List the settings of a run in the order of its sections, a part's name first."""
    found = []
    for path, (owner, name) in resolve.paths(config_type).items():
        section = path.removesuffix(".name")
        place = PLACES.get(section)
        found.append(Setting(section if place else path, owner, name, place.kind if place else ""))
    order = [one.path for one in found]
    return sorted(found, key=lambda one: _rank(one.path, order))


def _rank(path: str, order: Sequence[str]) -> tuple[int, int, int]:
    """Sort by section, then a part's settings behind its name."""
    top = list(RunConfig.model_fields).index(path.partition(".")[0])
    place = next((one for one in PLACES if path == one or path.startswith(f"{one}.")), path)
    first = min(at for at, one in enumerate(order) if one == path or one.startswith(place))
    return top, first, -1 if path == place else order.index(path)


def options(config_type: type[RunConfig]) -> list[click.Option]:
    """Make an option for every setting: by full path, and by its last word where that is clear."""
    known = settings_of(config_type)
    paths = [one.path for one in known if not one.kind]
    return [_option(one, files.short_option(one.path, paths)) for one in known]


def _option(one: Setting, short: str) -> click.Option:
    paths = (short, one.path, *([f"{one.path}.name"] if one.kind else []))
    names = dict.fromkeys(path.replace("_", "-") for path in paths)
    key, row = one.path.replace(".", "__"), _row(one)
    text = _part_help(one) if one.kind else f"{row.meaning}  {in_words(row._replace(type=''))}"
    if is_flag(one):
        words, metavar = [f"--{name}/--no-{name}" for name in names], None
    else:
        words, metavar = [f"--{name}" for name in names], "NAME" if one.kind else _metavar(row.type)
    made = click.Option([key, *words], help=text, default=None, metavar=metavar)
    made.setting = one  # type: ignore[attr-defined]  # for the help and for errors
    return made


def is_flag(one: Setting) -> bool:
    """Tell whether a setting is true or false."""
    return one.owner.model_fields[one.name].annotation is bool


def _row(one: Setting) -> Row:
    return _rows(one.owner)[one.name]


@functools.cache
def _rows(owner: type[Settings]) -> dict[str, Row]:
    return {row.name: row for row in describe_settings(owner)}


def _metavar(kind: str) -> str:
    words = kind.removesuffix(" | none").split(" | ")
    known = {"integer": "INTEGER", "number": "NUMBER", "text": "TEXT"}
    known |= {word: "A,B,..." for word in words if word.startswith("list of")}
    return "|".join(known.get(word, word) for word in words)


def _part_help(one: Setting) -> str:
    section: Any = RunConfig
    *outer, last = one.path.split(".")
    for name in outer:
        section = section.model_fields[name].annotation
    field = section.model_fields[last]
    names = list(registry.names(one.kind))
    listed = f"{', '.join(names)}; " if 0 < len(names) <= _MOST_NAMES else ""
    default = field.default or field.json_schema_extra["unset"]
    return f"{field.description}  [{listed}default: {default}]"


def read_options(command: click.Command, values: dict[str, Any]) -> resolve.Given:
    """Collect the settings that options give, and which option gave each."""
    found, sources = {}, {}
    for param in command.params:
        one, value = getattr(param, "setting", None), values.get(param.name or "")
        if one is None or value is None:
            continue
        path, option = f"{one.path}.name" if one.kind else one.path, min(param.opts, key=len)
        if isinstance(value, str) and not one.kind:
            value = _read(value, _row(one).type, option)
        found[path], sources[path] = value, option
    return resolve.Given(found, sources)


def _read(text: str, kind: str, option: str) -> Any:
    """Read what may be none or a list; anything else is left to the settings."""
    if text == "none" and kind.endswith("| none"):
        return None
    if "list of" not in kind:
        return text
    text = text.strip("[]()")
    if kind.startswith("list of texts"):
        return [word.strip(" '\"") for word in text.split(",") if word.strip()]
    return files.load_yaml(f"value: [{text}]", source=option)["value"]


def explain_option(error: click.NoSuchOption, command: str) -> str:
    """Say what an unknown option may have meant, in one sentence."""
    start = f"unknown option {error.option_name!r}"
    context: Any = error.ctx
    if not hasattr(context and context.command, "config_type"):
        params = context.command.get_params(context) if context else []
        names = [name for param in params for name in [*param.opts, *param.secondary_opts]]
        close = difflib.get_close_matches(error.option_name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        return f"{start}: `{command} --help` lists them{hint}"
    given = error.option_name.lstrip("-").removeprefix("no-").replace("-", "_")
    if given in ("out", "output", "dir"):
        return f"{start}; did you mean --folder?"
    params = context.command.params
    by_path = {p.setting.path: min(p.opts, key=len) for p in params if hasattr(p, "setting")}
    known = list(resolve.paths(context.command.config_type))
    hint = errors.explain(given, known, context.command.parts)
    if hint.renamed:
        option = by_path.get(hint.renamed)  # None where this run has no such setting
        now = f"{option} ({hint.renamed})" if option else hint.renamed
        return f"{start}: since schema 2 it is {now}."
    if hint.owners:
        return f"{start}: {errors.whose(hint)}."
    if len(hint.paths) > 1:
        full = " or ".join(f"--{path.replace('_', '-')}" for path in hint.paths)
        return f"{start}: several sections have it, so give {full}."
    own = [name for param in params for name in param.opts if "." not in name]
    close = difflib.get_close_matches(error.option_name, own, n=1, cutoff=0.8)
    best = by_path[hint.paths[0]] if hint.paths else close[0] if close else ""
    return f"{start}; did you mean {best}?" if best else f"{start}: `{command} --help` lists them."
