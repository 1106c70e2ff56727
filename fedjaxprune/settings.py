"""Settings of parts and sections: frozen, typed, bounded and described; imports pydantic only."""

import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

import annotated_types
import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

# The largest numbers that int32 and float32 arithmetic can take; most settings are bounded closer.
INT_MAX, FLOAT_MAX = 2**31 - 1, 1e30

Count = Annotated[int, Field(ge=1, le=INT_MAX)]
Counts = Annotated[tuple[Count, ...], Field(max_length=64)]  # such as the widths of layers
Rounds = Count
Epochs = Count
Fraction = Annotated[float, Field(ge=0, lt=1)]
Sparsity = Fraction
Probability = Fraction
Share = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, le=FLOAT_MAX)]
Positive = Annotated[float, Field(gt=0, le=FLOAT_MAX)]

_KINDS = {int: "integer", float: "number", bool: "true or false", str: "text"}
_WITH_ARTICLE = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


class Settings(pydantic.BaseModel):
    """Base of all settings: immutable; unknown names, nan, inf and a bool for a number are errors.

    A subclass gives its fields with `setting`. Conditions between fields are its validators.
    """

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name in cls.model_fields:
            leaves = list(_leaves(_annotation(cls, info.field_name)))
            is_number = any(leaf in (int, float) for leaf, _ in leaves)
            if is_number and not any(leaf is bool for leaf, _ in leaves):
                raise PydanticCustomError("bool_as_number", "a number is needed, not true or false")
        return value


def setting(default: Any, meaning: str, *, unit: str = "", unset: str = "", **bounds: Any) -> Any:
    """Declare one setting of a `Settings` class.

    Args:
      default: its value where the user gives none; ``...`` makes the setting required.
      meaning: one sentence for the help.
      unit: such as ``"rounds"`` or ``"fraction"``.
      unset: what a default of None stands for, such as ``"0.5, or the sparsity if less"``.
      **bounds: limits as pydantic names them: `ge`, `gt`, `le`, `lt`, `min_length`, ...
    """
    return Field(
        default, description=meaning, json_schema_extra={"unit": unit, "unset": unset}, **bounds
    )


class Row(NamedTuple):
    """What a setting is, in words."""

    name: str  # with the path of nested settings, such as ``"optimizer.momentum"``
    type: str  # such as ``"integer"``, ``"auto | number"`` or ``"masked | dense | none"``
    default: str  # its default, what an unset one stands for, or ``"required"``
    unit: str  # empty for a number without one, a text or a choice
    bounds: str  # such as ``"in [0, 1)"`` or ``"at least 1"``; empty without any
    meaning: str  # one or more sentences


def describe_settings(settings_type: type[pydantic.BaseModel]) -> list[Row]:
    """Describe the fields of a `Settings` class in their order, nested ones by path."""
    rows = []
    for name, field in settings_type.model_fields.items():
        if inner := nested(field.annotation):
            rows += [row._replace(name=f"{name}.{row.name}") for row in describe_settings(inner)]
            continue
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        annotation = _annotation(settings_type, name)
        row = Row(
            name=name,
            type=_type_text(annotation),
            default=_default_text(field, str(extra.get("unset") or "")),
            unit=str(extra.get("unit") or ""),
            bounds=_limits(annotation, machine_limits=False),
            meaning=field.description or "",
        )
        rows.append(row)
    return rows


def allowed(settings_type: type[pydantic.BaseModel], name: str, *, machine_limits: bool) -> str:
    """Say what a setting may be, for an error: ``"a number in [0, 1)"``, ``"one of a, b"``.

    With `machine_limits` the largest numbers of int32 and float32 are named, too.
    """
    annotation = _annotation(settings_type, name)
    leaves = [leaf for leaf, _ in _leaves(annotation)]
    choices = alternatives(settings_type, name)
    texts = [_WITH_ARTICLE[leaf] for leaf in leaves if leaf in _WITH_ARTICLE]
    texts += [f"a {_list_text(leaf)}" for leaf in leaves if _list_text(leaf)]
    if choices:
        texts.insert(0, choices[0] if len(choices) == 1 else "one of " + ", ".join(choices))
    text = " or ".join(dict.fromkeys(texts)) or f"a value of type {_type_text(annotation)}"
    bounds = _limits(annotation, machine_limits=machine_limits)
    return f"{text} {bounds}".rstrip() + (", or none" if type(None) in leaves else "")


def alternatives(settings_type: type[pydantic.BaseModel], name: str) -> list[str]:
    """List the words that a setting may be; empty for one that is no choice."""
    return [word for leaf, _ in _leaves(_annotation(settings_type, name)) for word in _words(leaf)]


def takes_list(settings_type: type[pydantic.BaseModel], name: str) -> bool:
    """Tell whether a setting may be a list."""
    return any(_list_text(leaf) for leaf, _ in _leaves(_annotation(settings_type, name)))


def _limits(annotation: Any, *, machine_limits: bool) -> str:
    """Say where the numbers of a type lie: ``"in [0, 1)"``, ``"at least 1"``; empty without limits.

    The largest numbers of int32 and float32, and lengths, are named only with `machine_limits`.
    """
    lows, highs = [], []  # of several the narrowest counts, and of equal ones the open one
    leaves = list(_leaves(annotation))
    for leaf, notes in ((leaf, notes) for leaf, notes in leaves if _list_text(leaf)):
        if limits := _limits(typing.get_args(leaf)[0], machine_limits=machine_limits):
            lengths = [one.max_length for one in notes if isinstance(one, annotated_types.MaxLen)]
            most = f", at most {lengths[0]} of them" if lengths and machine_limits else ""
            return f"each {limits}{most}"
    for limit in (limit for _, bounds in leaves for limit in bounds):
        match limit:
            case annotated_types.MinLen(min_length=1):
                return "that is not empty"
            case annotated_types.Ge(ge=bound):
                lows.append((bound, False, "[", "at least"))
            case annotated_types.Gt(gt=bound):
                lows.append((bound, True, "(", "greater than"))
            case annotated_types.Le(le=bound) if machine_limits or bound not in (
                INT_MAX,
                FLOAT_MAX,
            ):
                highs.append((bound, False, "]", "at most"))
            case annotated_types.Lt(lt=bound):
                highs.append((bound, True, ")", "less than"))
    low = max(lows, default=None)
    high = min(highs, key=lambda one: (one[0], not one[1]), default=None)
    if low and high:
        return f"in {low[2]}{low[0]}, {high[0]}{high[2]}"
    one = low or high
    return f"{one[3]} {one[0]}" if one else ""


def _annotation(settings_type: type[pydantic.BaseModel], name: str) -> Any:
    """Give a field's type with its bounds, which pydantic keeps apart from it."""
    field = settings_type.model_fields[name]
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _leaves(annotation: Any, bounds: tuple[Any, ...] = ()) -> Iterator[tuple[Any, list[Any]]]:
    """List the members of a union with the bounds of each; bounds of the whole go to each."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *notes = typing.get_args(annotation)
        found = [one for note in notes for one in getattr(note, "metadata", [note])]
        yield from _leaves(inner, (*bounds, *found))
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _leaves(member, bounds)
    else:
        yield annotation, list(bounds)


def _words(leaf: Any) -> list[str]:
    return list(map(str, typing.get_args(leaf))) if typing.get_origin(leaf) is Literal else []


def nested(annotation: Any) -> type[Settings] | None:
    """Give the type of a section, if an annotation is one."""
    is_settings = isinstance(annotation, type) and issubclass(annotation, Settings)
    return annotation if is_settings else None


def _list_text(leaf: Any) -> str:
    """Say what a list is of, ``"list of numbers"``; nothing for another type."""
    if typing.get_origin(leaf) not in (tuple, list):
        return ""
    inner = next((one for one, _ in _leaves(typing.get_args(leaf)[0])), None)
    return f"list of {_KINDS.get(inner, 'value')}s"


def _type_text(annotation: Any) -> str:
    texts: list[str] = []
    for leaf, _ in _leaves(annotation):
        bare = typing.get_origin(leaf) is None and getattr(leaf, "__name__", None)
        kind = "none" if leaf is type(None) else _KINDS.get(leaf) or _list_text(leaf)
        texts += _words(leaf) or [kind or bare or str(leaf)]
    return " | ".join(dict.fromkeys(texts))


def _default_text(field: Any, unset: str) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return unset or "computed"
    if field.default is None:
        return unset or "none"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    if isinstance(field.default, list | tuple):
        return ", ".join(str(one) for one in field.default) or "none"
    return str(field.default)
