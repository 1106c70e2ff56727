"""A Hugging Face data set: in memory, saved to a folder, or by name through `datasets`."""

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedjaxprune.data import checks
from fedjaxprune.data.conversion import as_dataset
from fedjaxprune.data.datasets import Dataset, Task
from fedjaxprune.data.sources import files
from fedjaxprune.errors import DataError, first_line
from fedjaxprune.registry import Part, locate
from fedjaxprune.settings import Probability, Settings, setting

_INPUTS = ("image", "img", "inputs", "x", "pixel_values", "features", "input_ids")
_LABELS = ("label", "labels", "fine_label", "y", "target", "targets")


class HuggingFaceSettings(Settings):
    """Which data set is read, and which columns."""

    source: str = setting(
        ..., "Folder written by save_to_disk, or the name of a data set that `datasets` loads."
    )
    subset: str | None = setting(None, "Configuration of a named data set.", unset="its only one")
    inputs: str | None = setting(
        None,
        "Column that the network reads.",
        unset="the only image, a column with a usual name, or all columns of numbers",
    )
    labels: str | None = setting(
        None, "Column of labels.", unset="the only class label, or a column with a usual name"
    )
    task: Task = setting("classification", "What the labels are.")
    test_fraction: Probability = setting(
        0.2, "Share held out for tests where there is no split test.", unit="fraction", gt=0
    )
    flip: bool = setting(False, "Augmentation may mirror the images from left to right.")


def build(settings: HuggingFaceSettings) -> Dataset:
    """Load the data set; its columns of one number or text per example are client ids."""
    try:
        package: Any = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            "data sets of Hugging Face by name need the package datasets: pip install "
            "'fedjaxprune[huggingface]'."
        ) from None
    folder = locate(settings.source)
    try:
        if folder.is_dir():
            value = package.load_from_disk(str(folder))
        else:
            value = package.load_dataset(settings.source, settings.subset)
    except Exception as error:  # of the network, the cache, the format
        raise DataError(
            f"source: {settings.source!r} cannot be loaded: {first_line(error)}"
        ) from None
    given = settings.model_dump(include={"task", "test_fraction", "inputs", "labels"})
    return convert(value, name=folder.name, **given)._replace(may_flip=settings.flip)


def convert(
    value: Any,
    *,
    name: str,
    task: Task | None,
    test_fraction: float,
    inputs: str | None = None,
    labels: str | None = None,
) -> Dataset:
    """Make a `Dataset` of a ``Dataset`` or ``DatasetDict``; `datasets` itself is not imported.

    Columns of inputs and labels are named as in `HuggingFaceSettings`.
    """
    splits: Mapping[str, Any] = value if isinstance(value, Mapping) else {"train": value}
    if "train" not in splits:
        raise DataError(f"{name} must have a split train, got {', '.join(map(str, splits))}.")
    train = splits["train"]
    test = next((splits[key] for key in ("test", "validation", "valid") if key in splits), None)
    columns = list(train.column_names)
    features = dict(train.features or {})
    label = _label(labels, columns, features, name)
    chosen = _inputs(inputs, columns, features, label, name)
    names = tuple(getattr(features.get(label), "names", None) or ())
    plain = [c for c in columns if _kind(features.get(c)) in ("Value", "ClassLabel")]
    others = [c for c in plain if c not in (*chosen, label)]
    keys = {c: ids for c in others if not _has_missing(ids := _values(train, c))}
    arrays: dict[str, Any] = {"inputs": _stack(train, chosen), "labels": _values(train, label)}
    if test is not None:
        if missing := {*chosen, label} - set(test.column_names):
            raise DataError(f"{name}: the test split has no column {min(missing)!r}.")
        arrays |= {"test_inputs": _stack(test, chosen), "test_labels": _values(test, label)}
    return as_dataset(
        arrays,
        name=name,
        task=task,
        num_classes=len(names) or None,
        class_names=names,
        test_fraction=test_fraction,
        keys=keys,
    )


def _label(given: str | None, columns: list[str], features: dict[str, Any], name: str) -> str:
    """Choose the column of labels."""
    if given is not None:
        return files.column(given, columns, "labels", name)
    classes = [c for c in columns if _kind(features.get(c)) == "ClassLabel"]
    chosen = classes if len(classes) == 1 else [c for c in _LABELS if c in columns][:1]
    if not chosen:
        raise DataError(f"labels: name the column of labels of {name}: {', '.join(columns)}.")
    return chosen[0]


def _inputs(
    given: str | None, columns: list[str], features: dict[str, Any], label: str, name: str
) -> list[str]:
    """Choose the column of inputs, or several columns of numbers."""
    if given is not None:
        return [files.column(given, columns, "inputs", name)]
    images = [c for c in columns if _kind(features.get(c)) == "Image"]
    if len(images) == 1:
        return images
    usual = [c for c in _INPUTS if c in columns and c != label]
    if usual:
        return usual[:1]
    numbers = [c for c in columns if c != label and _is_number(features.get(c))]
    if not numbers:
        raise DataError(f"inputs: name the column of inputs of {name}: {', '.join(columns)}.")
    return numbers


def _stack(split: Any, columns: list[str]) -> np.ndarray:
    """Read the inputs ``[E, ...]``: one column, or columns of numbers side by side."""
    made = [_values(split, column) for column in columns]
    if len(made) == 1 and made[0].ndim > 1:
        return made[0]
    if text := [c for c, values in zip(columns, made, strict=True) if values.dtype.kind in "OUS"]:
        raise DataError(
            f"inputs: column {text[0]!r} must be numbers or images of one size; convert text to "
            "tokens of one length first."
        )
    return np.stack(made, axis=1)


def _values(split: Any, column: str) -> np.ndarray:
    """Read a column; images become arrays of 8 bits, grayscale or RGB."""
    values = list(split[column])
    if values and hasattr(values[0], "convert") and hasattr(values[0], "mode"):  # Pillow's images
        is_gray = all(image.mode in ("1", "L") for image in values)
        values = [np.asarray(image.convert("L" if is_gray else "RGB")) for image in values]
        sizes = {image.shape for image in values}
        if len(sizes) > 1:
            raise DataError(
                f"column {column!r} must have images of one size, got {len(sizes)} sizes; resize "
                "them first by map."
            )
    return checks.array(values, f"column {column!r}")


def _has_missing(values: np.ndarray) -> bool:
    return any(value is None or value != value for value in values.tolist())


def _kind(feature: Any) -> str:
    return type(feature).__name__


def _is_number(feature: Any) -> bool:
    numbers = ("int", "uint", "float", "bool", "double")
    return _kind(feature) == "Value" and str(getattr(feature, "dtype", "")).startswith(numbers)


PARTS = {
    "huggingface": Part(
        build=build, settings=HuggingFaceSettings, summary="a data set of the package datasets"
    )
}
