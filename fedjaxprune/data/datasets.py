"""A data set: arrays for training and testing, and what they are for."""

import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

Task = Literal["classification", "binary", "regression", "sequence"]


class Dataset(NamedTuple):
    """A data set, as stored.

    Attributes:
      name: for records and errors.
      train: ``{"inputs": [E, ...], "labels": [E]}``. Inputs are uint8 (images, for instance),
        float32, or int32 where they are tokens. Labels are int32 classes, ``[E, T]`` for one at
        each position of a sequence (negative: none), or float32 targets ``[E]`` or ``[E, K]``.
      test: the same, other examples.
      task: ``classification`` with one output per class; ``binary`` with one output, the logit of
        class 1; ``regression`` with one output per target; ``sequence``: classes from tokens.
      num_classes: classes lie in ``[0, num_classes)``; 0 for a regression.
      input_shape: of one example.
      class_names: one per class; empty where the classes have no names.
      max_value: the largest value that the inputs' type can hold (255, for digits 16); they are
        divided by it. None: inputs are used as stored.
      mean: per channel (last axis), over the training inputs after this division; None: unknown.
      std: likewise.
      may_flip: whether an image that is mirrored from left to right is still of its class.
      keys: by the name of a column, the natural client of each training example, ``[E]``.
      clients: a `stores.ClientStore` that has the training examples; `train` is empty then.
    """

    name: str
    train: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]
    task: Task
    num_classes: int
    input_shape: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    max_value: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    may_flip: bool = False
    keys: Mapping[str, np.ndarray] = {}
    clients: Any = None

    @property
    def num_outputs(self) -> int:
        """The width of a network's output for this data set."""
        if self.task == "binary":
            return 1
        if self.task == "regression":
            shape = self.train["labels"].shape
            return shape[1] if len(shape) > 1 else 1
        return self.num_classes


def load(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Read a data set by its name or path into memory, with the default settings of its source.

    Args:
      name: ``digits``, a TFDS set that was prepared, or the path of a file or folder.
      data_dir: folder of prepared TFDS sets; without it ``$TFDS_DATA_DIR``, else
        ``~/tensorflow_datasets``.

    Raises:
      DataError: if it is unknown, is not prepared, or cannot be used.
    """
    from fedjaxprune import registry  # parts are made with this module
    from fedjaxprune.data import sources
    from fedjaxprune.data.sources import tfds

    source, options = sources.source_for_path(name) or (name, {})
    if source not in registry.names("dataset"):
        return tfds.read(name, data_dir=data_dir)
    part = registry.find("dataset", source).part
    return part.build(part.settings(**options))
