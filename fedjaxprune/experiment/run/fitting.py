"""Make the network for a data set, and see by shapes alone that one reads the other."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fedjaxprune.data.datasets import Dataset
from fedjaxprune.errors import ConfigError, first_line
from fedjaxprune.models import heads, outside
from fedjaxprune.types import Model


def make_model(
    build: Callable[..., Any], dataset: Dataset, *, preprocess: Callable[[Any, Any], Any], what: str
) -> Model:
    """Call a model's `build` for a data set, and give the model the loss of the data's task."""
    try:
        stored = dataset.test["inputs"]
        key = jax.random.key(0)
        inputs = jax.eval_shape(
            preprocess, key, jax.ShapeDtypeStruct((1, *stored.shape[1:]), stored.dtype)
        )
        made = build(input_shape=dataset.input_shape, num_classes=dataset.num_outputs)
        shape, dtype = dataset.input_shape, inputs.dtype
        model = outside.as_model(made, input_shape=shape, input_dtype=dtype)
        model = heads.for_task(model, dataset.task)
        params, state = jax.eval_shape(model.init, key)
        shape = jax.eval_shape(model.predict, params, state, inputs).shape
        wanted = (1, *positions(dataset), dataset.num_outputs)
        if shape != wanted:
            raise ValueError(f"its output has the shape {shape}, and needed is {wanted}.")
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{what} does not fit the data set {dataset.name!r} ({describe(dataset)}): "
            f"{first_line(error)}"
        ) from None
    return model


def describe(dataset: Dataset) -> str:
    """Say what a data set's examples are, such as ``"images (28, 28, 1), classification"``."""
    shape = tuple(dataset.input_shape)
    is_image = len(shape) == 3
    what = "images" if is_image else "examples"
    if dataset.task == "sequence":
        what = "tokens"
    return f"{what} {shape}, {dataset.task}"


def positions(dataset: Dataset) -> tuple[int, ...]:
    """Give the axis of positions of a sequence that has a label at each; else nothing."""
    return np.shape(dataset.test["labels"])[1:] if dataset.task == "sequence" else ()
