"""A table with one example per row, as CSV or Parquet, read by Apache Arrow."""

import pathlib
from typing import Literal, NamedTuple

import numpy as np

from fedjaxprune.data import checks, rounding, splits
from fedjaxprune.data.conversion import as_dataset
from fedjaxprune.data.datasets import Dataset
from fedjaxprune.data.sources import files, table_reading
from fedjaxprune.errors import DataError
from fedjaxprune.registry import Part
from fedjaxprune.settings import Probability, Settings, setting

_MAX_CATEGORIES = 100  # of one column; more is free text or an id
_MAX_CLASSES = 1000
_TEST_WORDS = ("test", "validation", "valid", "val")


class TableSettings(Settings):
    """Which columns of a table are the data set."""

    path: str = setting(..., "File that ends in .csv, .tsv or .parquet.")
    label: str = setting("label", "Column with the class, or with the number to predict.")
    features: tuple[str, ...] | None = setting(
        None, "Columns that the network reads.", unset="all columns without another purpose"
    )
    keys: tuple[str, ...] = setting(
        (), "Columns with client ids, for the partition by_key; the network does not read them."
    )
    task: Literal["classification", "binary", "regression"] = setting(
        "classification", "What the label is; a regression predicts numbers."
    )
    test_path: str | None = setting(
        None, "File with the test rows and the same columns.", unset="rows of `path` are held out"
    )
    split: str | None = setting(
        None, "Column whose values are train or test.", unset="test_fraction decides"
    )
    test_fraction: Probability = setting(
        0.2, "Share of each class held out for tests, by default.", unit="fraction", gt=0
    )
    scaling: Literal["standard", "none"] = setting(
        "standard",
        "standard: numbers, and the targets of a regression, get mean 0 and standard deviation 1 "
        "over the training rows; the test error of a regression is then in standard deviations.",
    )
    categorical: Literal["one_hot", "one_hot_all", "refuse"] = setting(
        "one_hot",
        "What happens to feature columns of text: an input per category, or an error. one_hot "
        "refuses text of which half or more reads as numbers; one_hot_all does not.",
    )


class _Column(NamedTuple):
    """How a feature column becomes inputs: one number, or one per category."""

    name: str
    center: float = 0.0
    width: float = 1.0
    categories: np.ndarray | None = None


def build(settings: TableSettings) -> Dataset:
    """Read the table; what scaling and categories need is taken from the training rows."""
    path = files.find(settings.path)
    train = table_reading.read(path, settings.label)
    names = list(train)
    features = _features(settings, names, path)
    label = _label(train, path, settings)
    _check_label(label, settings)
    if settings.test_path is not None:
        test_path = files.find(settings.test_path)
        test = table_reading.read(test_path, settings.label)
        for name in (*features, settings.label):
            files.column(name, list(test), "test_path", str(test_path))
        test_label = _label(test, test_path, settings)
        rows, held = np.arange(len(label)), np.arange(len(test_label))
    else:
        test, test_path, test_label = train, path, label
        rows, held = _rows(settings, train, label)
    columns = [_fit(train[name], name, path, rows, settings) for name in features]
    inputs = _apply(columns, train, rows, path)
    test_inputs = _apply(columns, test, held, test_path)
    labels, test_labels, class_names = label[rows], test_label[held], ()
    if settings.task != "regression":
        labels, test_labels, class_names = _numbered(labels, test_labels)
    elif settings.scaling == "standard":
        center, width = _moments(labels)
        labels, test_labels = (labels - center) / width, (test_labels - center) / width
    keys = {
        name: table_reading.complete(train[name], name, path, words=checks.MISSING)[rows]
        for name in settings.keys
    }
    table_reading.check_ids(train, settings.keys, path)
    return as_dataset(
        ((inputs, labels), (test_inputs, test_labels)),
        name=path.stem,
        task=settings.task,
        class_names=class_names,
        keys=keys,
    )


def _features(settings: TableSettings, names: list[str], path: pathlib.Path) -> tuple[str, ...]:
    """Check the named columns, and choose the features."""
    where = str(path)
    files.column(settings.label, names, "label (--label COLUMN)", where)
    for name in settings.keys:
        files.column(name, names, "keys", where)
    if settings.split is not None:
        files.column(settings.split, names, "split", where)
        if settings.test_path is not None:
            raise DataError("split and test_path must not both be given.")
    taken = {settings.label, settings.split, *settings.keys}
    if settings.features is None:
        chosen = tuple(name for name in names if name not in taken)
    else:
        chosen = tuple(files.column(name, names, "features", where) for name in settings.features)
        if clash := taken & set(chosen):
            raise DataError(
                f"features must not contain the label, keys or split, got {min(map(str, clash))!r}."
            )
    if not chosen:
        raise DataError(
            f"{path} has no feature columns beside {', '.join(sorted(filter(None, taken)))}."
        )
    return chosen


def _rows(
    settings: TableSettings, table: dict[str, np.ndarray], label: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Choose training and test rows of one table."""
    if settings.split is None:
        by_class = settings.task != "regression"
        return splits.split_rows(label, test_fraction=settings.test_fraction, by_class=by_class)
    words = np.array([str(word).lower() for word in table[settings.split]])
    is_test, is_train = np.isin(words, _TEST_WORDS), words == "train"
    if other := sorted(set(words[~is_test & ~is_train])):
        raise DataError(
            f"split: column {settings.split!r} must hold train or test, got {str(other[0])!r}."
        )
    if is_test.all() or is_train.all():
        raise DataError(f"split: column {settings.split!r} must hold both train and test.")
    return np.flatnonzero(is_train), np.flatnonzero(is_test)


def _label(table: dict[str, np.ndarray], path: pathlib.Path, settings: TableSettings) -> np.ndarray:
    """Take the labels ``[rows]``, none of which is missing."""
    label = table_reading.complete(
        table[settings.label], settings.label, path, words=checks.MISSING
    )
    if settings.task == "regression" and label.dtype.kind in "uif":
        _check_digits(label, settings.label, path, settings)
    return label


def _check_digits(
    values: np.ndarray, name: str, path: pathlib.Path, settings: TableSettings
) -> None:
    """Refuse numbers that would lose what tells them apart."""
    what = f"column {name!r} of {path}"
    if settings.scaling == "none":
        rounding.check(values, what, advice="set scaling: standard, or scale them")
    else:
        rounding.check_integers(values, what, digits=53, advice="subtract the smallest one")


def _moments(numbers: np.ndarray) -> tuple[float, float]:
    """Give the mean and the standard deviation; of equal numbers 1, however the mean is rounded."""
    numbers = numbers.astype(np.float64)
    if numbers.min() == numbers.max():
        return float(numbers[0]), 1.0
    return float(numbers.mean()), float(numbers.std()) or 1.0


def _check_label(label: np.ndarray, settings: TableSettings) -> None:
    name = settings.label
    if settings.task == "regression":
        if label.dtype.kind not in "buif":
            given = _kind(label)
            if isinstance(label[0], str):
                given = table_reading.first_text(label)
            raise DataError(
                f"label: column {name!r} must be numbers for a regression, got {given}."
            )
        return
    if label.dtype.kind == "f" and (label != np.round(label)).any():
        raise DataError(
            f"label: column {name!r} holds numbers such as {label[0]:.6g}, which are no classes; "
            "for numbers set task: regression."
        )
    num_classes = len(np.unique(label.astype(str) if label.dtype.kind == "O" else label))
    if num_classes > min(_MAX_CLASSES, max(20, len(label) // 2)):
        raise DataError(
            f"label: column {name!r} has {num_classes} distinct values in {len(label)} rows, which "
            "are no classes; for numbers set task: regression."
        )


def _fit(
    values: np.ndarray, name: str, path: pathlib.Path, rows: np.ndarray, settings: TableSettings
) -> _Column:
    """Take from the training rows how a column becomes inputs."""
    whole = table_reading.complete(values, name, path)
    values = whole[rows]
    if values.dtype.kind in "uif":
        _check_digits(whole, name, path, settings)
    if values.dtype.kind == "b" or (values.dtype.kind in "uif" and settings.scaling == "none"):
        return _Column(name)
    if values.dtype.kind in "uif":
        return _Column(name, *_moments(values))
    if values.dtype.kind != "O" or not all(isinstance(value, str) for value in values):
        raise DataError(
            f"feature column {name!r} must be numbers, true and false, or text, got "
            f"{_kind(values)}; name the columns to read by features."
        )
    if settings.categorical == "refuse":
        raise DataError(
            f"feature column {name!r} is text; set categorical: one_hot, name it in keys, or name "
            "the columns to read by features."
        )
    if settings.categorical == "one_hot":
        table_reading.check_numbers(whole, name, path)
    categories = np.unique(values.astype(str))
    if len(categories) > _MAX_CATEGORIES:
        raise DataError(
            f"feature column {name!r} is text with {len(categories)} distinct values, and one_hot "
            f"takes at most {_MAX_CATEGORIES}; name it in keys, or name the columns to read by "
            "features."
        )
    return _Column(name, categories=categories)


def _apply(
    columns: list[_Column], table: dict[str, np.ndarray], rows: np.ndarray, path: pathlib.Path
) -> np.ndarray:
    """Make the inputs ``[rows, width]`` float32."""
    made = []
    for column in columns:
        values = table_reading.complete(table[column.name], column.name, path)[rows]
        if column.categories is not None:  # one that no training row has becomes zeros
            if values.dtype.kind != "O":
                raise DataError(
                    f"feature column {column.name!r} holds text for training, but {_kind(values)} "
                    f"in {path}."
                )
            made.append(values.astype(str)[:, None] == column.categories[None])
        elif values.dtype.kind not in "buif":
            if values.dtype.kind == "O":
                table_reading.check_numbers(table[column.name], column.name, path)
            raise DataError(
                f"feature column {column.name!r} holds numbers for training, but {_kind(values)} "
                f"in {path}."
            )
        else:
            made.append(((values.astype(np.float64) - column.center) / column.width)[:, None])
    with np.errstate(over="ignore"):  # refused with whatever else is not finite
        return np.concatenate([block.astype(np.float32) for block in made], axis=1)


def _numbered(
    train: np.ndarray, test: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Number the distinct values of the label from 0 in ascending order."""
    if train.dtype.kind == "O" or test.dtype.kind == "O":
        train, test = train.astype(str), test.astype(str)
    names = np.unique(train)
    if names.dtype.kind == "U":
        checks.refuse_alike(names, "labels")
    if unknown := np.setdiff1d(test, names).tolist():
        raise DataError(f"test rows have the class {unknown[0]!r}, which no training row has.")
    texts = tuple(str(int(x)) if names.dtype.kind == "f" else str(x) for x in names)
    return np.searchsorted(names, train), np.searchsorted(names, test), texts


def _kind(values: np.ndarray) -> str:
    return "dates" if values.dtype.kind in "mM" else type(values.flat[0]).__name__


PARTS = {
    "table": Part(
        build=build, settings=TableSettings, summary="rows of a .csv, .tsv or .parquet file"
    )
}
