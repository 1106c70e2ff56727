"""Why arrays cannot be used as examples, in one sentence each, and the types they are kept in."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjaxprune.data import mapped, rounding
from fedjaxprune.data.datasets import Task
from fedjaxprune.errors import DataError, first_line

_INT32_MAX = 2**31 - 1
# Texts that stand for a missing value, in lower case.
MISSING = {"", "?", "na", "n/a", "#na", "#n/a", "#n/a n/a", "<na>", "nan", "-nan", "null", "nat"}


class Labels(NamedTuple):
    """Labels of training and test examples, as `Dataset` keeps them."""

    train: np.ndarray
    test: np.ndarray
    num_classes: int
    class_names: tuple[str, ...]


def array(values: Any, what: str) -> np.ndarray:
    """Make an array of values, called `what` in errors, that NumPy can hold in one block."""
    if callable(values):
        raise DataError(f"{what} must be an array, got {kind(values)}.")
    try:
        made = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{what} cannot be made an array: {first_line(error)}") from None
    if np.ma.is_masked(values):
        raise DataError(f"{what} have masked values: leave these examples out, or fill them.")
    if made.ndim == 0:
        raise DataError(f"{what} must be an array with an axis of examples, got {kind(values)}.")
    return made


def kind(value: Any) -> str:
    """Name the type of a value that cannot be used; functions may have been meant to be called."""
    if callable(value):
        return f"a function; call it: {getattr(value, '__name__', 'it')}()"
    return type(value).__name__


def content(made: np.ndarray) -> str:
    """Say what an array that is not of numbers holds instead."""
    if made.dtype.kind == "O":
        return _of_objects(made)
    if made.dtype.kind == "S":
        return "bytes; decode them: values.astype(str)"
    if made.dtype.kind == "U":
        return "text"
    if made.dtype.names is not None:
        return f"records of the fields {', '.join(made.dtype.names)}"
    if made.dtype.kind == "V" and not made.dtype.type.__module__.startswith("numpy"):
        return f"{made.dtype}, which is no type of NumPy's own; give values.astype(numpy.float32)"
    if made.dtype.kind == "c":
        return f"{made.dtype}; give real and imaginary parts as features of their own"
    return str(made.dtype)


def _of_objects(made: np.ndarray) -> str:
    """Say what an array of objects holds: what keeps it from being an array of numbers."""
    values = made.ravel().tolist()
    if shapes := [np.shape(one) for one in values if isinstance(one, list | tuple | np.ndarray)]:
        if len(shapes) == len(values) and len(set(shapes)) == 1:
            return f"an array of objects of the shape {shapes[0]}; give numpy.stack(values)"
        return "rows of differing shapes"
    if any(value is None for value in values):
        return "missing values (None)"
    if all(isinstance(value, int | float | np.number) for value in values):
        return "an array of objects; give values.astype(float)"
    kinds = sorted({type(value).__name__ for value in values})
    if kinds == ["str"]:
        return "text"
    if kinds == ["bytes"]:
        return "bytes; decode them: [value.decode() for value in values]"
    return f"objects of type {' and '.join(kinds[:3])}"


def inputs(values: Any, what: str, *, task: Task) -> np.ndarray:
    """Check the inputs ``[E, ...]`` and give them as uint8, float32 or, for tokens, int32.

    Grayscale images ``[E, H, W]`` of uint8 get an axis of channels.
    """
    made = array(values, what)
    if made.dtype.kind in "OUS":
        given = content(made)
        raise DataError(f"{what} must be numbers of one shape per example, got {given}.")
    if made.dtype.kind not in "buif":
        raise DataError(f"{what} must be real numbers, got {content(made)}.")
    if made.shape[0] == 0:
        raise DataError(f"{what} must have at least one example, got shape {made.shape}.")
    if made.ndim < 2:
        raise DataError(
            f"{what} must have an axis of examples and at least one of features, got shape "
            f"{made.shape}; one feature per example is inputs[:, None]."
        )
    if 0 in made.shape:
        raise DataError(f"{what} must have no empty axis, got shape {made.shape}.")
    if made.ndim == 4 and made.shape[1] in (1, 3) and made.shape[3] > 4:
        raise DataError(
            f"{what} of shape {made.shape} have the channels first; give "
            "inputs.transpose(0, 2, 3, 1)."
        )
    if task == "sequence":
        return _tokens(made, what)
    if made.dtype == np.uint8:
        return made[..., None] if made.ndim == 3 else made
    floats = mapped.as_type(made, np.float32)
    if not all(np.isfinite(some).all() for _, some in mapped.blocks(floats)):
        num_nan, num_bad = int(np.isnan(floats).sum()), int((~np.isfinite(floats)).sum())
        example = int(np.argwhere(~np.isfinite(floats))[0][0])
        raise DataError(
            f"{what} must be finite float32 numbers, but {num_bad} of {floats.size} values are "
            f"not ({num_nan} NaN), the first in example {example}."
        )
    rounding.check(made, what)
    return floats


def labels(
    train: Any, test: Any, *, task: Task, num_classes: int | None, class_names: Sequence[str]
) -> Labels:
    """Check labels of both splits for a task; arguments are those of `as_dataset`."""
    both = array(train, "train labels"), array(test, "test labels")
    if task == "regression":
        if num_classes or class_names:
            raise DataError(
                "a regression has no classes: leave num_classes and class_names out, or set "
                "another task."
            )
        return Labels(_targets(both[0], "train"), _targets(both[1], "test"), 0, ())
    class_names = _names(class_names, num_classes)
    if all(_is_text(values) for values in both):
        found = _from_text(both, task=task)
        _check_given(found.class_names, num_classes, class_names)
        return found
    made = [_classes(both[0], "train", task), _classes(both[1], "test", task)]
    present = [np.unique(values[values >= 0] if values.ndim > 1 else values) for values in made]
    if task == "binary":
        _check_binary(present)
        _check_given(("0", "1"), num_classes, class_names, may_rename=True)
        return Labels(made[0], made[1], 2, class_names or ("0", "1"))
    for classes, name in zip(present, ("train", "test"), strict=True):
        if not classes.size:
            raise DataError(f"{name} labels must not all be negative: no position has one.")
        if classes[0] < 0:
            raise DataError(
                f"{name} labels must not be negative, got {classes[0]}; leave out examples "
                "without a label, and number the classes from 0."
            )
    if num_classes is None:
        if task == "classification":
            _check_numbering(present, len(made[0]))
        num_classes = int(max(classes.max(initial=0) for classes in present)) + 1
    for classes, name in zip(present, ("train", "test"), strict=True):
        if classes[-1] >= num_classes:
            raise DataError(
                f"{name} labels must be less than the number of classes ({num_classes}), got "
                f"{classes[-1]}."
            )
    if num_classes < 2:
        raise DataError(f"labels must have at least two classes, got {num_classes}.")
    if class_names and len(class_names) != num_classes:
        raise DataError(
            f"class_names must name the {num_classes} classes, got {len(class_names)} names."
        )
    return Labels(made[0], made[1], num_classes, class_names)


def _names(class_names: Sequence[str], num_classes: Any) -> tuple[str, ...]:
    """Check the type of a number of classes and of their names."""
    whole(num_classes)
    if isinstance(class_names, str):
        raise DataError(f"class_names must be a list of names, got the text {class_names!r}.")
    return tuple(map(str, class_names))


def _check_given(
    names: tuple[str, ...],
    num_classes: int | None,
    class_names: tuple[str, ...],
    *,
    may_rename: bool = False,
) -> None:
    """Refuse a number of classes, or names, other than those of the labels."""
    if num_classes not in (None, len(names)):
        raise DataError(f"num_classes is {num_classes}, but the labels have {len(names)} classes.")
    fits = len(class_names) == len(names) if may_rename else set(class_names) == set(names)
    if class_names and not fits:
        raise DataError(
            f"class_names must name the {len(names)} classes of the labels, got "
            f"{', '.join(class_names)}."
        )


def whole(num_classes: Any) -> None:
    """Refuse a number of classes that is no integer; None passes."""
    is_whole = isinstance(num_classes, int | np.integer) and not isinstance(num_classes, bool)
    if num_classes is not None and not is_whole:
        raise DataError(f"num_classes must be a whole number, got {num_classes!r}.")


def lengths(values: Sequence[Any], names: Sequence[str]) -> None:
    """Refuse arrays that differ in their number of examples."""
    sizes = [len(value) for value in values]
    if len(set(sizes)) > 1:
        counts = ", ".join(f"{size} {name}" for size, name in zip(sizes, names, strict=True))
        raise DataError(f"inputs and labels must have the same number of examples, got {counts}.")


def keys(values: Any, name: str, num_examples: int) -> np.ndarray:
    """Check a column of client ids, one for each training example."""
    made = array(values, f"client ids {name!r}")
    if made.shape != (num_examples,):
        raise DataError(
            f"client ids {name!r} must be one id per training example, shape ({num_examples},), "
            f"got shape {made.shape}."
        )
    is_object = made.dtype.kind == "O"
    is_missing = is_object and any(value is None or value != value for value in made)
    if is_missing or (made.dtype.kind == "f" and not np.isfinite(made).all()):
        raise DataError(f"client ids {name!r} must have no missing values.")
    digits = np.finfo(made.dtype).nmant + 1 if made.dtype.kind == "f" else 0
    if digits and made.size and np.abs(made).max() > 2.0**digits:
        raise DataError(
            f"client ids {name!r} must be text or integers, got {made.dtype} numbers beyond "
            f"2**{digits}, of which neighbors are equal."
        )
    made = made.astype(str) if is_object else made
    if made.dtype.kind == "U":
        refuse_alike(np.unique(made), f"client ids {name!r}")
    return made


def refuse_alike(texts: np.ndarray, what: str) -> None:
    """Refuse texts that differ in nothing but spaces around them: they are meant to be one."""
    first: dict[str, str] = {}
    for text in map(str, texts):
        other = first.setdefault(text.strip(), text)
        if other != text:
            raise DataError(
                f"{what} have {other!r} and {text!r}, which differ only in spaces: strip them."
            )


def _tokens(made: np.ndarray, what: str) -> np.ndarray:
    if made.dtype.kind not in "ui":
        raise DataError(
            f"{what} of the task sequence must be integer tokens, got {made.dtype}; numbers are "
            "for classification or regression."
        )
    if made.min() < 0 or made.max() > _INT32_MAX:
        raise DataError(f"{what} must be tokens of at least 0, got {made.min()} to {made.max()}.")
    return mapped.as_type(made, np.int32)


def _targets(made: np.ndarray, name: str) -> np.ndarray:
    if made.dtype.kind not in "buif":
        raise DataError(f"{name} labels of a regression must be numbers, got {content(made)}.")
    if made.ndim > 2 or 0 in made.shape:
        raise DataError(
            f"{name} labels of a regression must have shape (examples,) or (examples, targets), "
            f"got {made.shape}."
        )
    with np.errstate(over="ignore"):
        floats = made.astype(np.float32)
    if not np.isfinite(floats).all():
        row = int(np.argwhere(~np.isfinite(floats))[0][0])
        raise DataError(f"{name} labels must be finite numbers, got {made[row]} in example {row}.")
    rounding.check(made, f"{name} labels")
    return floats


def _from_text(both: Sequence[np.ndarray], *, task: Task) -> Labels:
    """Number the classes that are given as text, in alphabetical order."""
    texts = [values.astype(str) for values in both]
    if any(values.ndim != 1 for values in texts):
        raise DataError(f"labels as text must be one per example, got shape {texts[0].shape}.")
    for value in (one for values in both for one in values.ravel().tolist()):
        is_text = isinstance(value, str)
        if value is None or value != value or (is_text and value.strip().lower() in MISSING):
            given = repr(value) if is_text else value
            raise DataError(f"labels must not be missing, but some are {given}.")
        if not is_text:
            raise DataError(f"labels must all be text or all integers, got text and {value!r}.")
    names = np.unique(texts[0])
    refuse_alike(names, "labels")
    if unknown := sorted(set(texts[1].tolist()) - set(names.tolist())):
        raise DataError(
            f"test labels have the class {unknown[0]!r}, which no training example has."
        )
    _check_count(len(names), len(texts[0]), task)
    made = [np.searchsorted(names, values).astype(np.int32) for values in texts]
    return Labels(made[0], made[1], len(names), tuple(names.tolist()))


def _classes(made: np.ndarray, name: str, task: Task) -> np.ndarray:
    """Check that labels are integers, one an example, or one a position of a sequence."""
    if made.ndim == 2 and made.shape[1] == 1:
        raise DataError(
            f"{name} labels must have shape (examples,), got the column {made.shape}; give "
            "labels[:, 0]."
        )
    if made.ndim == 2 and made.dtype.kind in "buif" and task != "sequence":
        is_one_hot = np.isin(made, (0, 1)).all() and (made.sum(axis=1) == 1).all()
        advice = "; they look one-hot: give labels.argmax(axis=1)" if is_one_hot else ""
        raise DataError(
            f"{name} labels must have shape (examples,), got {made.shape}{advice}; several numbers "
            "per example are a task of regression."
        )
    if made.ndim > (2 if task == "sequence" else 1):
        raise DataError(f"{name} labels must have shape (examples,), got {made.shape}.")
    if made.dtype.kind == "f":
        is_whole = bool(np.isfinite(made).all() and (made == np.round(made)).all())
        advice = "give labels.astype(int), or" if is_whole else "for numbers"
        raise DataError(
            f"{name} labels must be integer classes, got {made.dtype}; {advice} set the task "
            "regression."
        )
    if made.dtype.kind not in "bui":
        raise DataError(f"{name} labels must be integer classes or text, got {content(made)}.")
    if made.size == 0:
        raise DataError(f"{name} labels must have at least one example, got none.")
    if np.abs(made.astype(np.float64)).max() > _INT32_MAX:
        raise DataError(f"{name} labels must fit int32, got {made.max()}.")
    return made.astype(np.int32)


def _check_binary(present: Sequence[np.ndarray]) -> None:
    for classes, name in zip(present, ("train", "test"), strict=True):
        if not np.isin(classes, (0, 1)).all():
            found = ", ".join(map(str, classes[:5]))
            advice = "; give (labels > 0).astype(int)" if set(classes.tolist()) == {-1, 1} else ""
            raise DataError(
                f"{name} labels of the task binary must be 0 or 1, got {found}{advice}."
            )
    if len(present[0]) < 2:
        raise DataError(f"train labels must have two classes, got only {present[0][0]}.")


def _check_numbering(present: Sequence[np.ndarray], num_examples: int) -> None:
    """Refuse classes that are not counted from 0, and test classes without training examples."""
    train, test = present
    _check_count(len(train), num_examples, "classification")
    if train[0] > 0:
        raise DataError(
            f"train labels must be numbered from 0, got {train[0]} to {train[-1]}; give labels - "
            f"{train[0]}."
        )
    if train[-1] >= 10 * len(train):
        raise DataError(
            f"train labels are {len(train)} classes numbered up to {train[-1]}; number them "
            "without gaps: give numpy.unique(labels, return_inverse=True)[1]."
        )
    if unknown := np.setdiff1d(test, train).tolist():
        raise DataError(f"test labels have the class {unknown[0]}, which no training example has.")


def _check_count(num_classes: int, num_examples: int, task: Task) -> None:
    """Refuse a set with one class, and one in which classes have hardly an example each."""
    if num_classes < 2:
        raise DataError("train labels must have at least two classes, got one.")
    if task == "binary" and num_classes != 2:
        raise DataError(f"the task binary needs two classes, got {num_classes}.")
    if num_classes > max(20, num_examples // 2):
        raise DataError(
            f"train labels have {num_classes} distinct values in {num_examples} examples: they "
            "are no classes; for numbers set the task regression."
        )


def _is_text(made: np.ndarray) -> bool:
    """Tell labels that are text; of objects the first one says what they are meant to be."""
    is_object = made.dtype.kind == "O" and made.size > 0
    return made.dtype.kind == "U" or (is_object and isinstance(made.flat[0], str))
