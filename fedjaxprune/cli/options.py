"""Options of ``fedjaxprune run``, made from the settings of a run, and what unknown ones meant."""

import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import click

from fedjaxprune import registry
from fedjaxprune.experiment.config import errors, files, resolve
from fedjaxprune.experiment.config.describe import in_words
from fedjaxprune.experiment.config.sections import PLACES, RunConfig
from fedjaxprune.settings import Row, Settings, describe_settings

_MOST_NAMES = 6  # that the help of a part's option lists


class Setting(NamedTuple):
    """One option of a run.

    Attributes:
      path: of the setting; that of its section for a part's name.
      owner: type of the section.
      name: of the setting in it.
      kind: of the part, for a part's name.
    """

    path: str
    owner: type[Settings]
    name: str
    kind: str = ""


def settings_of(config_type: type[RunConfig]) -> list[Setting]:
    """List the settings of a run in the order of its sections, a part's name first."""
    found = []
    for path, (owner, name) in resolve.paths(config_type).items():
        section = path.removesuffix(".name")
        if section in PLACES:
            found.append(Setting(section, owner, name, PLACES[section].kind))
        else:
            found.append(Setting(path, owner, name))
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
    extra: dict[str, Any] = {"default": None}
    if is_flag(one):
        words = ["/".join((f"--{name}", f"--no-{name}")) for name in names]
    else:
        words = [f"--{name}" for name in names]
        extra["metavar"] = "NAME" if one.kind else _metavar(one)
    text = _part_help(one.path, one.kind) if one.kind else _help(one)
    made = click.Option([_key(one.path), *words], help=text, **extra)
    made.setting = one  # type: ignore[attr-defined]  # for the help and for errors
    return made


def is_flag(one: Setting) -> bool:
    """Tell whether a setting is true or false."""
    return one.owner.model_fields[one.name].annotation is bool


def _is_list(one: Setting) -> bool:
    return "list of" in _row(one).type


def _key(path: str) -> str:
    return path.replace(".", "__")


def _row(one: Setting) -> Any:
    return _rows(one.owner)[one.name]


@functools.cache
def _rows(owner: type[Settings]) -> Mapping[str, Row]:
    return {row.name: row for row in describe_settings(owner)}


def _metavar(one: Setting) -> str:
    kinds: Mapping[str, str] = {"integer": "INTEGER", "number": "NUMBER", "text": "TEXT"}
    words = _row(one).type.removesuffix(" | none").split(" | ")
    words = ["A,B,..." if word.startswith("list of") else kinds.get(word, word) for word in words]
    return "|".join(map(str, words))


def _help(one: Setting) -> str:
    row = _row(one)
    return f"{row.meaning}  {in_words(row._replace(type=''))}"


def _part_help(path: str, kind: str) -> str:
    names = list(registry.names(kind))
    field = _field(path)
    extra: Any = field.json_schema_extra
    listed = f"{', '.join(names)}; " if 0 < len(names) <= _MOST_NAMES else ""
    return f"{field.description}  [{listed}default: {field.default or extra['unset']}]"


def _field(path: str) -> Any:
    """Find the declaration of a part's place."""
    kind: Any = RunConfig
    *sections, name = path.split(".")
    for section in sections:
        kind = kind.model_fields[section].annotation
    return kind.model_fields[name]


def read_options(command: click.Command, values: dict[str, Any]) -> resolve.Given:
    """Collect the settings that options give, and which option gave each."""
    found, sources = {}, {}
    for param in command.params:
        one = getattr(param, "setting", None)
        value = values.get(param.name or "")
        if one is None or value is None:
            continue
        path = f"{one.path}.name" if one.kind else one.path
        row = None if one.kind else _row(one)
        if row is not None and value == "none" and row.type.endswith("| none"):
            value = None
        elif isinstance(value, str) and not one.kind and _is_list(one):
            text = value.strip("[]()")
            if row is not None and row.type.startswith("list of texts"):
                value = [word.strip(" '\"") for word in text.split(",") if word.strip()]
            else:
                source = min(param.opts, key=len)
                value = files.load_yaml(f"value: [{text}]", source=source)["value"]
        found[path], sources[path] = value, min(param.opts, key=len)
    return resolve.Given(found, sources)


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
    by_path = {p.setting.path: min(p.opts, key=len) for p in _settings(context.command)}
    if given in ("out", "output", "dir"):
        return f"{start}; did you mean --folder?"
    known = list(resolve.paths(context.command.config_type))
    hint = errors.explain(given, known, context.command.parts)
    if hint.renamed:
        option = by_path.get(hint.renamed, f"--{hint.renamed}")
        return f"{start}: since schema 2 it is {option} ({hint.renamed})."
    if hint.owners:
        return f"{start}: {errors.whose(hint)}."
    if len(hint.paths) > 1:
        full = " or ".join(f"--{path.replace('_', '-')}" for path in hint.paths)
        return f"{start} is of several sections: give {full}."
    own = [name for param in context.command.params for name in param.opts if "." not in name]
    close = difflib.get_close_matches(error.option_name, own, n=1, cutoff=0.8)
    best = by_path[hint.paths[0]] if hint.paths else close[0] if close else ""
    return f"{start}; did you mean {best}?" if best else f"{start}: `{command} --help` lists them."


def _settings(command: click.Command) -> Iterator[Any]:
    return (param for param in command.params if hasattr(param, "setting"))
