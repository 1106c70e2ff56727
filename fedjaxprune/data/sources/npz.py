"""A NumPy archive of arrays."""

import numpy as np

from fedjaxprune.data.conversion import NAMES, as_dataset
from fedjaxprune.data.datasets import Dataset, Task
from fedjaxprune.data.sources import files
from fedjaxprune.registry import Part
from fedjaxprune.settings import Probability, Settings, setting


class NpzSettings(Settings):
    """Which arrays of an archive are the data set."""

    path: str = setting(..., "File made by numpy.savez.")
    inputs: str | None = setting(
        None, "Name of the training inputs.", unset="inputs, x_train, train_images or x"
    )
    labels: str | None = setting(
        None, "Name of the training labels.", unset="labels, y_train, train_labels or y"
    )
    test_inputs: str | None = setting(
        None, "Name of the test inputs.", unset="test_inputs, x_test or test_images"
    )
    test_labels: str | None = setting(
        None, "Name of the test labels.", unset="test_labels or y_test"
    )
    task: Task = setting("classification", "What the labels are.")
    test_fraction: Probability = setting(
        0.2, "Share held out for tests where the file has no test examples.", unit="fraction", gt=0
    )
    flip: bool = setting(False, "Augmentation may mirror the images from left to right.")


def build(settings: NpzSettings) -> Dataset:
    """Read the archive; other arrays with one value per training example are client ids."""
    path = files.find(settings.path)
    arrays = files.read(path, _load, "an .npz archive")
    names = next((names for names in NAMES if names[0] in arrays and names[1] in arrays), NAMES[0])
    chosen, keys = {}, {}
    for key, usual in zip(NAMES[0], names, strict=True):
        given = getattr(settings, key)
        if given is not None:
            files.column(given, list(arrays), key, str(path))
        if (given or usual) in arrays:
            chosen[key] = arrays.pop(given or usual)
    if "labels" in chosen:
        shape = chosen["labels"].shape[:1]
        keys = {key: ids for key, ids in arrays.items() if ids.shape == shape}
    made = as_dataset(
        chosen,
        name=path.stem,
        task=settings.task,
        test_fraction=settings.test_fraction,
        keys=keys,
    )
    return made._replace(may_flip=settings.flip)


def _load(path) -> dict[str, np.ndarray]:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        raise ValueError("it holds one array without a name; write it by numpy.savez.")
    with loaded:
        return {name: loaded[name] for name in loaded.files}


PARTS = {"npz": Part(build=build, settings=NpzSettings, summary="arrays in a file of numpy.savez")}
