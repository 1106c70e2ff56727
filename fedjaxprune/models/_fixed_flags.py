"""Refuses layers that cannot learn whether they train: a fixed attribute, or a flag not passed."""

import dataclasses
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from fedjaxprune.models import _arguments, calls

_FLAGS = (*calls.TRAINING, *calls.INFERENCE)


def refuse_attributes(layers: Iterable[Any], *, followed: Collection[str] = ()) -> None:
    """Refuse a layer of the user's own whose attribute says for good whether it trains.

    Args:
      layers: all that a network is made of.
      followed: names that the library itself switches between training and predictions.

    Raises:
      ValueError: an attribute is a flag by its name and its value.
    """
    for layer in layers:
        if _arguments.of_library(layer):
            continue
        found = {name: getattr(layer, name, None) for name in _FLAGS if name not in followed}
        fixed = {name: value for name, value in found.items() if _arguments.is_truth(value)}
        modes = {name: getattr(layer, name, None) for name in ("mode", "phase")}
        fixed |= {n: v for n, v in modes.items() if isinstance(v, str) and _arguments.is_flag(v)}
        for name, value in fixed.items():
            kind = type(layer).__name__
            others = " or ".join(map(repr, followed))
            renamed = f"use {others} in its place, " if others and name in _FLAGS else ""
            raise ValueError(
                f"{kind} has the attribute {name!r}, which is {value} in training and in "
                f"predictions alike: {renamed}make it an argument of {kind}.__call__, or give a "
                "call function."
            )


def refuse_arguments(sequence: Any, kinds: tuple[type, ...], *, passes_first: bool) -> None:
    """Refuse a layer in a sequence that needs a training flag and gets none.

    Args:
      sequence: has ``layers``, among which may be more sequences.
      kinds: of sequences.
      passes_first: whether the first layer gets the arguments of the sequence's call.

    Raises:
      ValueError: a layer has an argument that is a flag.
    """
    for layer in _without_arguments(sequence, kinds, passes_first):
        for one in _flags_of(layer):
            names = [
                getattr(value, "__name__", type(value).__name__) for value in (sequence, layer)
            ]
            raise ValueError(
                f"{' passes '.join(names)} no argument {one.name!r}, so it would be {one.default} "
                "in training and in predictions: call the layers in a module of your own."
            )


def nested(value: Any, kind: type) -> Iterator[Any]:
    """List a module, and the modules among its fields, at any depth."""
    if isinstance(value, kind):
        yield value
        if dataclasses.is_dataclass(value):
            names = [one.name for one in dataclasses.fields(value)]
            inner = (getattr(value, one, None) for one in names if one not in ("parent", "scope"))
            yield from (one for each in inner for one in nested(each, kind))
    elif isinstance(value, list | tuple):
        yield from (one for each in value for one in nested(each, kind))
    elif isinstance(value, Mapping):
        yield from (one for each in value.values() for one in nested(each, kind))


def _without_arguments(layer: Any, kinds: tuple[type, ...], is_passed: bool) -> Iterator[Any]:
    """List the layers that a sequence calls with the inputs alone."""
    if isinstance(layer, kinds):
        for place, inner in enumerate(layer.layers):  # pyright: ignore[reportAttributeAccessIssue]
            yield from _without_arguments(inner, kinds, is_passed and place == 0)
    elif not is_passed:
        yield layer


def _flags_of(layer: Any) -> list[inspect.Parameter]:
    """List the arguments of a layer that say whether it trains."""
    if not callable(layer) or _arguments.of_library(layer):
        return []
    method = type(layer).__call__
    if not inspect.isroutine(layer) and inspect.isfunction(method):
        named = _arguments.arguments_of(method, 2)
        return [p for p in named if _arguments.is_boolean(p) or _arguments.is_flag(p.name)]
    return [p for p in _arguments.arguments_of(layer, 1) if p.name in _FLAGS]  # a plain function
