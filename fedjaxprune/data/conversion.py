"""From arrays, mappings of arrays and Hugging Face data sets to a `Dataset`."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fedjaxprune.data import checks, splits, stores
from fedjaxprune.data.datasets import Dataset, Task
from fedjaxprune.errors import DataError, near_miss

# Names that mappings and files use: training inputs and labels, test inputs and labels.
NAMES = (
    ("inputs", "labels", "test_inputs", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("X_train", "y_train", "X_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x", "y", "x_test", "y_test"),
    ("X", "y", "X_test", "y_test"),
)
_TASKS = ("classification", "binary", "regression", "sequence")
_FORMS = (
    "a mapping of arrays {'inputs', 'labels', 'test_inputs', 'test_labels', and client ids}, "
    "(inputs, labels), ((inputs, labels), (test_inputs, test_labels)), a Dataset, or a Hugging "
    "Face Dataset or DatasetDict"
)


def as_dataset(
    value: Any,
    *,
    name: str = "arrays",
    task: Task | None = None,
    num_classes: int | None = None,
    class_names: tuple[str, ...] = (),
    test_fraction: float = 0.2,
    keys: Mapping[str, Any] | None = None,
) -> Dataset:
    """Make a `Dataset` of whatever holds examples, or say why it cannot be used.

    uint8 inputs are divided by 255, others are used as they are. Of a mapping, arrays that are
    neither inputs nor labels are client ids of the training examples, by their name.

    Args:
      value: an object with the `sizes` and the `fetch` of a `stores.ClientStore`, whose examples
        are ``{"inputs": ..., "labels": ...}``, and with `test`, a pair of inputs and labels; a
        mapping of arrays ``inputs``, ``labels``, optionally ``test_inputs`` and
        ``test_labels``, and client ids; a mapping ``{"train": ..., "test": ...}`` or a pair of
        these; a pair of inputs and labels, or of two such pairs; a Hugging Face ``Dataset`` or
        ``DatasetDict``; or a `Dataset`.
      name: for records and errors.
      task: None is ``classification``; labels that are numbers need ``regression``, integer inputs
        that are tokens ``sequence``.
      num_classes: None counts the classes of the training examples.
      class_names: of integer classes.
      test_fraction: share of the examples that are held out for tests where no test examples are
        given; the same ones every time, of each class alike.
      keys: by name, client ids of the training examples, beside those in a mapping; here a name may
        be any, such as ``labels``.

    Raises:
      DataError: what is wrong, in one sentence.
    """
    if task is not None and task not in _TASKS:
        raise DataError(f"task must be one of {', '.join(_TASKS)}, got {task!r}.")
    if isinstance(value, Dataset):
        check(value)
        return value
    if hasattr(value, "fetch") and hasattr(value, "sizes"):
        return _of_store(value, name, task, num_classes, class_names)
    if _is_huggingface(value):
        from fedjaxprune.data.sources import huggingface  # it uses this function

        return huggingface.convert(value, name=name, task=task, test_fraction=test_fraction)
    train, test, columns = _split(value)
    if twice := columns.keys() & (keys or {}).keys():
        raise DataError(f"client ids {min(twice)!r} are given twice, in the data and by keys.")
    columns |= keys or {}
    task = task or "classification"
    checks.lengths(train, ("train inputs", "train labels"))
    columns = {key: checks.keys(ids, key, len(train[1])) for key, ids in columns.items()}
    if test is not None:
        checks.lengths(test, ("test inputs", "test labels"))
    inputs = checks.inputs(train[0], "train inputs", task=task)
    test_inputs = inputs if test is None else checks.inputs(test[0], "test inputs", task=task)
    if inputs.shape[1:] != test_inputs.shape[1:] or inputs.dtype != test_inputs.dtype:
        raise DataError(
            f"train and test inputs must be alike, got {inputs.dtype} of shape {inputs.shape[1:]} "
            f"and {test_inputs.dtype} of shape {test_inputs.shape[1:]} per example."
        )
    test_labels = train[1] if test is None else test[1]
    if task == "sequence" and num_classes is None:  # symbols in and out
        num_classes = _count_symbols(inputs, test_inputs, train[1], test_labels)
    labels = checks.labels(
        train[1], test_labels, task=task, num_classes=num_classes, class_names=class_names
    )
    if labels.train.shape[1:] != labels.test.shape[1:]:
        raise DataError(
            f"train and test labels must be alike, got shapes {labels.train.shape} and "
            f"{labels.test.shape}."
        )
    if labels.train.ndim == 2 and task == "sequence" and labels.train.shape[1] != inputs.shape[1]:
        raise DataError(
            f"labels of a sequence must have shape (examples,) or {inputs.shape[:2]}, got "
            f"{labels.train.shape}."
        )
    rows = held = slice(None)
    if test is None:
        by_class = task != "regression"
        rows, held = splits.split_rows(labels.train, test_fraction=test_fraction, by_class=by_class)
    return Dataset(
        name=name,
        train={"inputs": inputs[rows], "labels": labels.train[rows]},
        test={"inputs": test_inputs[held], "labels": labels.test[held]},
        task=task,
        num_classes=labels.num_classes,
        class_names=labels.class_names,
        input_shape=inputs.shape[1:],
        max_value=255.0 if inputs.dtype == np.uint8 else None,
        keys={key: ids[rows] for key, ids in columns.items()},
    )


def _of_store(
    value: Any, name: str, task: Task | None, num_classes: int | None, class_names: tuple[str, ...]
) -> Dataset:
    """Make a data set whose training examples are fetched, by those of one client and the tests."""
    store = stores.of_value(value)
    test = getattr(value, "test", None)
    if not isinstance(test, tuple | list) or len(test) != 2:
        raise DataError(
            "a client store needs test examples: give it `test`, a pair of inputs and labels."
        )
    if not isinstance(store.like, Mapping) or set(store.like) != {"inputs", "labels"}:
        raise DataError("a client store must fetch a mapping of the arrays inputs and labels.")
    holder = np.flatnonzero(store.sizes)[:1]
    first: Any = store.fetch(holder)
    if np.asarray(first["labels"]).dtype.kind not in "buif":
        raise DataError("the labels that a client store fetches must be numbers.")
    tested = np.asarray(test[1])
    if tested.dtype.kind not in "buif":
        raise DataError(f"the test labels of a client store must be numbers, got {tested.dtype}.")
    if num_classes is None and task in (None, "classification"):
        num_classes = int(np.max(tested, initial=1)) + 1
    train = {"inputs": first["inputs"], "labels": first["labels"]}
    made = as_dataset(
        (tuple(train.values()), tuple(test)),
        name=name,
        task=task,
        num_classes=num_classes,
        class_names=class_names,
    )
    like = {
        key: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for key, leaf in made.train.items()
    }
    store = store._replace(like=like)
    stores.fetched(store, holder)  # in the form that examples have from here on
    return made._replace(train={key: leaf[:0] for key, leaf in made.train.items()}, clients=store)


def check(dataset: Dataset) -> None:
    """Refuse a `Dataset` whose fields do not fit each other."""
    if dataset.task not in _TASKS:
        raise DataError(f"task must be one of {', '.join(_TASKS)}, got {dataset.task!r}.")
    given = {"train": dataset.train, "test": dataset.test}
    if dataset.clients is not None:  # its own examples were checked when it was made
        del given["train"]
    for split, arrays in given.items():
        if missing := {"inputs", "labels"} - set(arrays):
            raise DataError(f"{split} must have inputs and labels, but has no {min(missing)}.")
        checks.lengths((arrays["inputs"], arrays["labels"]), (f"{split} inputs", f"{split} labels"))
        shape, said = np.shape(arrays["inputs"])[1:], tuple(dataset.input_shape)
        if shape != said:
            raise DataError(
                f"input_shape is {said}, but {split} inputs have shape {shape} per example."
            )
        checks.inputs(arrays["inputs"], f"{split} inputs", task=dataset.task)
    test = dataset.test["labels"]
    train = test if dataset.clients is not None else dataset.train["labels"]
    checks.labels(
        train,
        test,
        task=dataset.task,
        num_classes=dataset.num_classes,
        class_names=dataset.class_names,
    )
    for key, ids in dataset.keys.items():
        checks.keys(ids, key, len(train))


def _split(value: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Find training arrays, test arrays (None: not given) and columns of client ids."""
    if isinstance(value, Mapping) and "train" in value and _names(value) is None:
        if others := [key for key in value if key not in ("train", "test", "validation")]:
            raise DataError(
                "data must have the splits train and test (or validation), got "
                f"{', '.join(map(str, value))}{near_miss(others[0], ('test', 'validation'))}"
            )
        return _two(value["train"], value.get("test", value.get("validation")))
    if isinstance(value, Mapping):
        return _of_mapping(value)
    if isinstance(value, tuple) and len(value) == 2:
        pairs = (isinstance(part, tuple | list | Mapping) and len(part) == 2 for part in value)
        if isinstance(value[0], Mapping) or all(pairs):
            return _two(*value)
        return (checks.array(value[0], "inputs"), checks.array(value[1], "labels")), None, {}
    if hasattr(value, "columns") and hasattr(value, "to_numpy"):
        raise DataError(
            "a data frame is no data set: give its columns as arrays, such as {'inputs': "
            "frame[features].to_numpy(), 'labels': frame[label].to_numpy()}."
        )
    raise DataError(f"data must be {_FORMS}, got {checks.kind(value)}.")


def _two(train: Any, test: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Read two splits that are pairs or mappings each."""
    first, _, columns = _split(_pair(train, "train"))
    if test is None:
        return first, None, columns
    second, _, _ = _split(_pair(test, "test"))
    return first, second, columns


def _pair(split: Any, name: str) -> Any:
    if isinstance(split, Mapping):
        return split
    if isinstance(split, tuple | list) and len(split) == 2:
        return tuple(split)
    given = type(split).__name__ + (f" of length {len(split)}" if hasattr(split, "__len__") else "")
    raise DataError(f"{name} must be (inputs, labels) or a mapping of them, got {given}.")


def _of_mapping(value: Mapping) -> tuple[Any, Any, dict[str, Any]]:
    """Read a mapping of arrays by the names that it uses."""
    found = _names(value)
    if found is None:
        have = ", ".join(map(str, value)) or "none"
        wanted = next((name for name in NAMES[0][:2] if name not in value), "inputs")
        raise DataError(
            "data must have the arrays inputs and labels (or x_train and y_train), got "
            f"{have}{near_miss(wanted, value)}"
        )
    inputs, labels, test_inputs, test_labels = found
    if (test_inputs in value) != (test_labels in value):
        absent = test_labels if test_inputs in value else test_inputs
        raise DataError(f"data have test examples, but no {absent}.")
    train = checks.array(value[inputs], inputs), checks.array(value[labels], labels)
    test = None
    if test_inputs in value:
        test = tuple(checks.array(value[key], key) for key in (test_inputs, test_labels))
    rest = {str(key): ids for key, ids in value.items() if key not in found}
    if twice := rest.keys() & {name for names in NAMES for name in names if len(name) > 1}:
        raise DataError(
            f"data name arrays in two ways, {inputs} and {min(twice)}; use one row of "
            f"{'; '.join(', '.join(names) for names in NAMES[:2])}, or give client ids of such a "
            "name by keys."
        )
    return train, test, rest


def _names(value: Mapping) -> tuple[str, str, str, str] | None:
    """Find the names that a mapping uses for its arrays."""
    return next((names for names in NAMES if names[0] in value and names[1] in value), None)


def _count_symbols(*arrays: Any) -> int:
    """Count the symbols in tokens and labels together; labels that are none are refused later."""
    largest = (int(a.max()) for a in map(np.asarray, arrays) if a.dtype.kind in "ui")
    return max(largest, default=0) + 1


def _is_huggingface(value: Any) -> bool:
    """Tell a Hugging Face data set, or a mapping of them."""
    parts = value.values() if isinstance(value, Mapping) else (value,)
    return any(hasattr(part, "column_names") and hasattr(part, "features") for part in parts)
