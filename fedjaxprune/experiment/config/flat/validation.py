"""From what users give to a config, or one sentence that says what is wrong and what is allowed."""

import difflib
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import annotated_types
import pydantic

from fedjaxprune.experiment.config.flat.sections import (
    FLOAT_MAX,
    INT_MAX,
    RunConfig,
    Settings,
    UserError,
)

_Config = TypeVar("_Config", bound=Settings)
_LONGEST = 80  # characters of what was given that a sentence repeats


def validate(values: Mapping[str, Any], *, sources: Mapping[str, str] | None = None) -> RunConfig:
    """Make a config of `values`; the defaults fill what is missing.

    Args:
      values: settings by name.
      sources: where each came from (``"--rounds"``, a file), for the message.

    Raises:
      UserError: one sentence with the setting, what was given and what is allowed.
    """
    return _validate(RunConfig, values, sources or {})


def validate_each(
    values: Mapping[str, Any], *, sources: Mapping[str, str] | None = None
) -> Settings:
    """Do the same, but look at each setting by itself, not at whether they fit one another."""
    return _validate(Settings, values, sources or {})


def _validate(
    kind: type[_Config], values: Mapping[str, Any], sources: Mapping[str, str]
) -> _Config:
    try:
        return kind(**values)
    except pydantic.ValidationError as error:
        raise UserError(_sentence(error.errors()[0], sources)) from None


def _sentence(error: Any, sources: Mapping[str, str]) -> str:
    """Turn pydantic's first complaint into one sentence."""
    if not error["loc"]:
        return str(error["ctx"]["error"])
    name = str(error["loc"][0])
    source = f" (from {sources[name]})" if name in sources else ""
    if error["type"] == "extra_forbidden":
        names = list(RunConfig.model_fields)
        hint = near_miss(name, names)
        return f"unknown setting {name!r}{source}: `fedjaxprune run --help` lists them all{hint}"
    given = error["input"]
    shown = "nothing" if given is None else repr(given)
    if len(shown) > _LONGEST:
        shown = shown[:_LONGEST] + "..."
    is_huge = error["type"] in ("less_than_equal", "int_parsing_size", "finite_number")
    hint = near_miss(given, alternatives(name)) if alternatives(name) else "."
    return f"{name} must be {_allowed(name, is_huge=is_huge)}, got {shown}{source}{hint}"


def alternatives(name: str) -> list[str]:
    """List the values of a setting that is one of a few names; empty for any other."""
    annotation = _bare(RunConfig.model_fields[name].annotation)
    return list(typing.get_args(annotation)) if typing.get_origin(annotation) is Literal else []


def word(name: str) -> str | None:
    """Give the word that a setting may be in place of a number, such as ``"auto"``."""
    for one in typing.get_args(RunConfig.model_fields[name].annotation):
        if typing.get_origin(one) is Literal:
            return typing.get_args(one)[0]
    return None


def is_flag(name: str) -> bool:
    """Tell whether a setting is true or false."""
    return RunConfig.model_fields[name].annotation is bool


def is_optional(name: str) -> bool:
    """Tell whether a setting may be unset."""
    return type(None) in typing.get_args(RunConfig.model_fields[name].annotation)


def kind(name: str) -> str:
    """Say what a setting is, such as ``"an integer"`` or ``"true or false"``."""
    kinds = {int: "an integer", float: "a number", bool: "true or false"}
    return kinds.get(_number(name)[0], "a text")


def _allowed(name: str, *, is_huge: bool) -> str:
    """Say what a setting may be: ``"a number in [0, 1)"``, ``"one of iid, shards"``."""
    if names := alternatives(name):
        return "one of " + ", ".join(names)
    text = " ".join([kind(name), _limits(name, is_huge=is_huge)]).rstrip()
    if instead := word(name):
        text = f"{instead} or {text}"
    return text + (", or none" if is_optional(name) else "")


def _number(name: str) -> tuple[Any, list[Any]]:
    """Find the type of a setting and its limits, beside a word that it may be instead."""
    field = RunConfig.model_fields[name]
    for one in typing.get_args(field.annotation):
        if typing.get_origin(one) is typing.Annotated:
            bare, *notes = typing.get_args(one)
            return bare, [limit for note in notes for limit in note.metadata]
    return _bare(field.annotation), field.metadata


def _bare(annotation: Any) -> Any:
    """Strip ``| None``."""
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    is_union = type(None) in typing.get_args(annotation)
    return kinds[0] if is_union else annotation


def limits(name: str) -> str:
    """Say between what a number lies: ``"in [0, 1)"``, ``"at least 1"``; empty for no number.

    The bounds of int32 and float32 are left out: they matter to nobody who does not meet them.
    """
    return _limits(name, is_huge=False)


def _limits(name: str, *, is_huge: bool) -> str:
    low = high = None
    for limit in _number(name)[1]:
        match limit:
            case annotated_types.MinLen():
                return "that is not empty"
            case annotated_types.Ge(ge=bound):
                low = ("[", bound, "at least")
            case annotated_types.Gt(gt=bound):
                low = ("(", bound, "greater than")
            case annotated_types.Le(le=bound) if is_huge or bound not in (INT_MAX, FLOAT_MAX):
                high = ("]", bound, "at most")
            case annotated_types.Lt(lt=bound):
                high = (")", bound, "less than")
    if low and high:
        return f"in {low[0]}{low[1]}, {high[1]}{high[0]}"
    one = low or high
    return f"{one[2]} {one[1]}" if one else ""


def near_miss(given: Any, names: Any) -> str:
    """Suggest the closest of `names` as ``"; did you mean 'x'?"``, or end the sentence."""
    text = str(given).lower().replace("-", "_")
    close = difflib.get_close_matches(text, [str(name) for name in names], n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "."
