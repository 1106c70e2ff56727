"""A table with one example per row, as CSV or Parquet, read by Apache Arrow."""

import pathlib
from typing import Any, Literal, NamedTuple

import numpy as np

from fedjaxprune.data import splits
from fedjaxprune.data.conversion import as_dataset
from fedjaxprune.data.datasets import Dataset
from fedjaxprune.data.sources import files
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
    categorical: Literal["one_hot", "refuse"] = setting(
        "one_hot", "What happens to feature columns of text."
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
    train = _read(path)
    names = list(train)
    features = _features(settings, names, path)
    label = _no_missing(train[settings.label], settings.label, path)
    _check_label(label, settings)
    if settings.test_path is not None:
        test_path = files.find(settings.test_path)
        test = _read(test_path)
        for name in (*features, settings.label):
            files.column(name, list(test), "test_path", str(test_path))
        test_label = _no_missing(test[settings.label], settings.label, test_path)
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
    else:
        labels, test_labels = labels.astype(np.float64), test_labels.astype(np.float64)
        if settings.scaling == "standard":
            center, width = labels.mean(), labels.std() or 1.0
            labels, test_labels = (labels - center) / width, (test_labels - center) / width
    keys = {name: _no_missing(train[name], name, path)[rows] for name in settings.keys}
    return as_dataset(
        ((inputs, labels), (test_inputs, test_labels)),
        name=path.stem,
        task=settings.task,
        class_names=class_names,
        keys=keys,
    )


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Read all columns as arrays; text and missing values are objects."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".parquet"):
        raise DataError(f"path must end in .csv, .tsv or .parquet, got {path.name}.")

    def reader(path: pathlib.Path) -> Any:
        if suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path)
        import pyarrow.csv

        options = pyarrow.csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",")
        return pyarrow.csv.read_csv(path, parse_options=options)

    table = files.read(path, reader, f"a {suffix} table")
    if len(set(table.column_names)) < len(table.column_names):
        twice = next(n for n in table.column_names if table.column_names.count(n) > 1)
        raise DataError(f"{path} has two columns named {twice!r}.")
    if table.num_rows == 0:
        raise DataError(f"{path} has no rows.")
    return {name: table[name].to_numpy() for name in table.column_names}


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


def _no_missing(values: np.ndarray, name: str, path: pathlib.Path) -> np.ndarray:
    """Refuse a column with missing values."""
    if values.dtype.kind == "f":
        bad = ~np.isfinite(values)
    elif values.dtype.kind == "O":
        bad = np.array([value is None or value != value or value == "" for value in values])
    else:
        return values
    if bad.any():
        number = int(bad.sum())
        raise DataError(
            f"{path} has {number} missing value{'s' * (number > 1)} in column {name!r}, the first "
            f"in row {int(np.flatnonzero(bad)[0]) + 1}; fill them, or leave the column or the rows "
            "out."
        )
    return values


def _check_label(label: np.ndarray, settings: TableSettings) -> None:
    name = settings.label
    if settings.task == "regression":
        if label.dtype.kind not in "buif":
            raise DataError(f"label: column {name!r} must be numbers for a regression, not text.")
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
    values = _no_missing(values, name, path)[rows]
    if values.dtype.kind == "b" or (values.dtype.kind in "uif" and settings.scaling == "none"):
        return _Column(name)
    if values.dtype.kind in "uif":
        numbers = values.astype(np.float64)
        return _Column(name, float(numbers.mean()), float(numbers.std()) or 1.0)
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
        values = _no_missing(table[column.name], column.name, path)[rows]
        if column.categories is not None:  # one that no training row has becomes zeros
            made.append(values.astype(str)[:, None] == column.categories[None])
        elif values.dtype.kind not in "buif":
            raise DataError(
                f"feature column {column.name!r} holds numbers for training, but {_kind(values)} "
                f"in {path}."
            )
        else:
            made.append(((values.astype(np.float64) - column.center) / column.width)[:, None])
    return np.concatenate([block.astype(np.float32) for block in made], axis=1)


def _numbered(
    train: np.ndarray, test: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Number the distinct values of the label from 0 in ascending order."""
    if train.dtype.kind == "O" or test.dtype.kind == "O":
        train, test = train.astype(str), test.astype(str)
    names = np.unique(train)
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
