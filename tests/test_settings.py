"""Laws of settings: what a value may be, and what the help and the errors say of it."""

from typing import Annotated, Literal

import pydantic
import pytest
from pydantic import Field

from fedjaxprune.settings import (
    FLOAT_MAX,
    INT_MAX,
    Count,
    NonNegative,
    Positive,
    Rounds,
    Row,
    Settings,
    Share,
    Sparsity,
    allowed,
    alternatives,
    describe_settings,
    setting,
)


class Narrowed(Settings):
    share: Sparsity = setting(0.2, "A share that is not 0.", gt=0)
    few: Count = setting(2, "A number.", ge=2, le=9)
    most: Annotated[float, Field(le=1)] = setting(0.5, "A number.", lt=1)


class Momentum(Settings):
    learning_rate: Positive = setting(..., "Step size.")
    momentum: Sparsity = setting(0.9, "Share of the last step that is kept.", unit="fraction")


class Example(Settings):
    sparsity: Sparsity | None = setting(
        None, "Pruned fraction.", unit="fraction", unset="0.5, or the sparsity if less"
    )
    every: Rounds = setting(5, "Rounds between revisions.", unit="rounds")
    chunk: Count | Literal["auto"] = setting("auto", "Clients at once.", unit="clients")
    pool: int | None = setting(None, "Candidates.", ge=1, le=10)
    mode: Literal["masked", "dense"] = setting("masked", "What is ranked.")
    stop: Literal["never"] | None = setting(None, "When it stops.")
    flag: bool = setting(False, "Whether.")
    folder: str = setting("data", "Where.", min_length=1)
    kept: tuple[int, ...] = setting((1, 2), "Which.")
    share: Annotated[Share, "a note"] = setting(1, "A share.")
    optimizer: Momentum = setting(Momentum(learning_rate=0.1), "The optimizer.")


def test_rows_say_type_default_unit_bounds_and_meaning_of_each_setting():
    assert describe_settings(Example) == [
        Row(
            "sparsity",
            "number | none",
            "0.5, or the sparsity if less",
            "fraction",
            "in [0, 1)",
            "Pruned fraction.",
        ),
        Row("every", "integer", "5", "rounds", "at least 1", "Rounds between revisions."),
        Row("chunk", "integer | auto", "auto", "clients", "at least 1", "Clients at once."),
        Row("pool", "integer | none", "none", "", "in [1, 10]", "Candidates."),
        Row("mode", "masked | dense", "masked", "", "", "What is ranked."),
        Row("stop", "never | none", "none", "", "", "When it stops."),
        Row("flag", "true or false", "false", "", "", "Whether."),
        Row("folder", "text", "data", "", "that is not empty", "Where."),
        Row("kept", "list of integers", "1, 2", "", "", "Which."),
        Row("share", "number", "1", "", "in (0, 1]", "A share."),
        Row("optimizer.learning_rate", "number", "required", "", "greater than 0", "Step size."),
        Row(
            "optimizer.momentum",
            "number",
            "0.9",
            "fraction",
            "in [0, 1)",
            "Share of the last step that is kept.",
        ),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sparsity", "a number in [0, 1), or none"),
        ("every", "an integer at least 1"),
        ("chunk", "auto or an integer at least 1"),
        ("pool", "an integer in [1, 10], or none"),
        ("mode", "one of masked, dense"),
        ("stop", "never, or none"),
        ("flag", "true or false"),
        ("folder", "a text that is not empty"),
        ("kept", "a list of integers"),
    ],
)
def test_an_error_can_say_what_is_allowed(name, text):
    assert allowed(Example, name, machine_limits=False) == text


def test_of_several_limits_the_narrowest_is_named():
    assert [row.bounds for row in describe_settings(Narrowed)] == [
        "in (0, 1)",
        "in [2, 9]",
        "less than 1",
    ]
    assert allowed(Narrowed, "share", machine_limits=False) == "a number in (0, 1)"


def test_the_limits_of_the_machine_are_named_only_when_asked_for():
    assert allowed(Example, "every", machine_limits=True) == f"an integer in [1, {INT_MAX}]"
    assert (
        allowed(Momentum, "learning_rate", machine_limits=True) == f"a number in (0, {FLOAT_MAX}]"
    )


def test_alternatives_are_the_words_of_a_choice():
    assert alternatives(Example, "mode") == ["masked", "dense"]
    assert alternatives(Example, "chunk") == ["auto"]
    assert alternatives(Example, "every") == []


@pytest.mark.parametrize(
    "values",
    [
        {"every": True},
        {"sparsity": False},
        {"chunk": True},
        {"pool": True},
        {"sparsity": float("nan")},
        {"sparsity": 1.0},
        {"every": 0},
        {"every": INT_MAX + 1},
        {"every": 1.5},
        {"every": None},
        {"mode": "other"},
        {"folder": ""},
        {"unknown": 1},
    ],
)
def test_what_is_out_of_bounds_or_unknown_or_a_bool_for_a_number_is_refused(values):
    with pytest.raises(pydantic.ValidationError) as caught:
        Example(**values)
    assert caught.value.errors()[0]["loc"][0] == next(iter(values))


def test_inf_is_refused_and_defaults_are_checked():
    class Bad(Settings):
        rate: NonNegative = setting(-1.0, "A rate.")
        any_rate: float = setting(0.0, "Another.")

    with pytest.raises(pydantic.ValidationError):
        Bad(any_rate=1.0)
    with pytest.raises(pydantic.ValidationError):
        Bad(rate=1.0, any_rate=float("inf"))


def test_settings_take_texts_of_numbers_are_frozen_and_equal_by_value():
    made = Example.model_validate({"every": "7", "flag": "yes", "sparsity": "0.25", "chunk": "3"})
    assert (made.every, made.flag, made.sparsity, made.chunk) == (7, True, 0.25, 3)
    assert Example(flag=True).flag
    with pytest.raises(pydantic.ValidationError):
        made.every = 8  # type: ignore[misc]
    assert Example(every=7) == Example(every=7) != Example()
    assert hash(Example()) == hash(Example())
