"""Scikit-learn's 1,797 scanned digits of 8 x 8 pixels, which need no download."""

import functools
from typing import Any

import numpy as np

from fedjaxprune.data.datasets import Dataset
from fedjaxprune.registry import Part
from fedjaxprune.settings import Settings


def build(settings: Settings) -> Dataset:
    """Read the digits; every fifth example of each class is a test example."""
    del settings
    inputs, labels = _read()
    test = np.zeros(labels.size, bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[4::5]] = True
    return Dataset(
        name="digits",
        train={"inputs": inputs[~test], "labels": labels[~test]},
        test={"inputs": inputs[test], "labels": labels[test]},
        task="classification",
        num_classes=10,
        class_names=tuple(str(digit) for digit in range(10)),
        input_shape=(8, 8, 1),
        max_value=16.0,
    )


@functools.cache
def _read() -> tuple[np.ndarray, np.ndarray]:
    """Read all images and labels once: `build` copies what it gives, and this takes longer."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return bunch.images.astype(np.uint8)[..., None], bunch.target.astype(np.int32)


PARTS = {"digits": Part(build=build, summary="1,797 scanned digits of 8 x 8 pixels; no download")}
