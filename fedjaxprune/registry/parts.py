"""Parts as values: what a config can name, and parts made of plain functions."""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import pydantic

from fedjaxprune.errors import ConfigError, first_line
from fedjaxprune.registry.listing import KINDS, Kind
from fedjaxprune.settings import Settings


class Part(NamedTuple):
    """Something that a config can name.

    Attributes:
      build: ``(settings, ...) -> component``, with the context of its kind (`KINDS`).
      settings: type of its settings.
      summary: one line for lists; empty: the first line of its module.
    """

    build: Callable[..., Any]
    settings: type[Settings] = Settings
    summary: str = ""


def part(function: Callable[..., Any], *, kind: str = "") -> Part:
    """Make a part of a plain function: its annotated keyword-only parameters are the settings.

    Its other parameters take the context of the kind by name, such as `num_classes`. Where the
    first one is called `settings`, the function is a `build` as it is.

    Args:
      function: makes the component.
      kind: whose context it may name; without one, the context of every kind, and positional
        context is passed on in order.

    Raises:
      ConfigError: a parameter is neither context nor a setting that can be described.
    """
    return _part(function, kind, f"the function {name_of(function)!r}")


def call(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Make a `build` that calls a factory with the settings that it has parameters for.

    Context that is given by keyword, such as `num_classes`, is passed on.
    """
    names = inspect.signature(factory).parameters

    def build(settings: Settings, **context: Any) -> Any:
        given = {name: value for name, value in settings if name in names and name not in context}
        return factory(**given, **{name: one for name, one in context.items() if name in names})

    build.__doc__ = factory.__doc__  # for those who ask what the part is
    return build


def as_part(kind: str, value: Any, what: str) -> Any:
    """Take a `Part`, a `Method` or a plain function for a part of a kind."""
    wanted = "a Method, a Part or a function" if kind == "method" else "a Part or a function"
    wanted += f" of {' and '.join(KINDS[kind].context)}" if kind == "model" else ""
    if kind == "model" and _is_network(value):
        return Part(build=lambda *_, **__: value)
    if inspect.isroutine(value) or isinstance(value, functools.partial):
        if KINDS[kind].is_component:
            return Part(build=lambda *_, **__: value)
        value = _part(value, kind, what)
    is_part = isinstance(value, tuple) and hasattr(value, "build") and hasattr(value, "settings")
    if not is_part:
        is_class = isinstance(value, type)
        if is_class and kind == "model":
            raise ConfigError(f"{what} is the class {value.__name__}, not a model: {_make(value)}.")
        given = f"the class {value.__name__}" if is_class else f"of type {type(value).__name__}"
        raise ConfigError(f"{what} is {given}, not {a_kind(kind)}: it must be {wanted}.")
    part: Any = value
    if not callable(part.build):
        raise ConfigError(f"{what} has a `build` that is no function.")
    if not (isinstance(part.settings, type) and issubclass(part.settings, Settings)):
        raise ConfigError(f"{what} has `settings` that are no subclass of fedjaxprune.Settings.")
    if "name" in part.settings.model_fields:
        raise ConfigError(f"{what} has a setting called 'name', which a config keeps for the part.")
    is_method = hasattr(part, "variants")
    if is_method and kind != "method":
        raise ConfigError(f"{what} is a method, not {a_kind(kind)}.")
    if kind == "method" and not is_method:
        from fedjaxprune.method import Method  # with JAX, which any method needs

        return Method(build=typing.cast(Any, part.build), settings=part.settings)
    return part


def _is_network(value: Any) -> bool:
    """Tell a network, or a function of `rngs` or `key` that makes one, from a part."""
    if inspect.isfunction(value):
        return list(inspect.signature(value).parameters) in (["rngs"], ["key"])
    return hasattr(value, "init") and hasattr(value, "apply") and not isinstance(value, type)


def _make(network: type) -> str:
    """Say how a class of networks becomes a model."""
    name = network.__name__
    if hasattr(network, "init") and hasattr(network, "apply"):  # of flax linen
        return (
            f"name an instance of it, such as `net = {name}(...)`, or a function of input_shape "
            "and num_classes that makes one"
        )
    return (
        f"name a function that makes one, such as `def net(*, rngs): return {name}(..., rngs=rngs)`"
        " of flax nnx, the same with `key` of Equinox, or one of input_shape and num_classes"
    )


def name_of(value: Any) -> str:
    """Name a value: a function by its name, a part by its `build`, or that one's module."""
    function = getattr(value, "build", value)
    function = getattr(function, "func", function)
    name = getattr(function, "__name__", type(function).__name__)
    return function.__module__.rpartition(".")[2] if name == "build" else name


def a_kind(kind: str) -> str:
    """Say a kind in words: ``"a method"``, ``"an uplink"``, ``"a server optimizer"``."""
    rule = {"sampling": " rule", "consensus": " rule", "hardware": " table"}.get(kind, "")
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind.replace('_', ' ')}{rule}"


def _part(function: Callable[..., Any], kind: str, what: str) -> Part:
    kinds = [KINDS[kind]] if kind else KINDS.values()
    context = tuple(name for one in kinds for name in one.context)
    try:
        parameters = list(inspect.signature(function).parameters.values())
        hints = _hints(function, {one.name: one.annotation for one in parameters}, context)
    except Exception as error:
        raise ConfigError(f"{what} has a signature that fails: {first_line(error)}.") from None
    summary = (inspect.getdoc(function) or "").partition("\n")[0]
    if parameters and parameters[0].name == "settings":
        return Part(function, hints.get("settings", Settings), summary)
    fields: dict[str, Any] = {}
    for one in parameters:
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) or one.name in context:
            continue
        if one.kind is one.KEYWORD_ONLY and one.name in hints:
            fields[one.name] = (hints[one.name], ... if one.default is one.empty else one.default)
        elif one.kind is one.KEYWORD_ONLY or one.default is one.empty:
            given = (
                f"one of {', '.join(context)}"
                if context
                else "given; to give what it returns, call it"
            )
            raise ConfigError(
                f"{what} has the parameter {one.name!r}, which is neither a setting (keyword-only "
                f"and annotated) nor {given}."
            )
    try:
        settings = pydantic.create_model(name_of(function), __base__=Settings, **fields)
    except Exception as error:
        raise ConfigError(f"{what} has unusable settings: {first_line(error)}.") from None
    return Part(_build(function, parameters, KINDS.get(kind)), settings, summary)


def _hints(function: Any, annotations: dict[str, Any], context: tuple[str, ...]) -> dict[str, Any]:
    """Evaluate the annotations of all but context, whose types may be known to a checker only."""
    annotated = {
        name: one
        for name, one in annotations.items()
        if name not in context and one is not inspect.Parameter.empty
    }
    names = getattr(inspect.unwrap(getattr(function, "func", function)), "__globals__", {})
    holder = types.SimpleNamespace(__annotations__=annotated)
    return typing.get_type_hints(holder, globalns=names, include_extras=True)


def _build(
    function: Callable[..., Any], parameters: list[inspect.Parameter], kind: Kind | None
) -> Callable[..., Any]:
    """Make a `build` that gives a plain function its settings and what it names of the context."""
    taken = {one.name for one in parameters}
    in_order = [one.name for one in parameters if one.kind is not one.KEYWORD_ONLY]

    @functools.wraps(function)
    def build(settings: Settings, *positional: Any, **context: Any) -> Any:
        given = kind.context[: kind.num_positional] if kind else in_order
        context |= dict(zip(given, positional, strict=False))
        chosen = {n: getattr(settings, n) for n in type(settings).model_fields if n in taken}
        return function(**{k: v for k, v in context.items() if k in taken}, **chosen)

    return build
