"""How a model's accuracy spreads over the clients, at the price of one test.

Every client is given the test accuracies of the classes, weighted as its own examples are: what the
model would be worth to it if its future were distributed like its data. No client's data are run
through the network, so clients that differ in anything but their classes are not told apart.
"""

from typing import Any, NamedTuple

import numpy as np

from fedjaxprune.types import Population

LARGEST = 50_000_000  # clients times classes beyond which no table is made


class Classes(NamedTuple):
    """Who has what."""

    # ``[N, K]`` float32, by client: shares of the classes among its examples, of those classes that
    # are tested; a client without any is left out
    shares: np.ndarray
    num_tested: np.ndarray  # ``[K]`` int64, test examples by class


def of_population(population: Population, test_labels: Any) -> Classes | None:
    """Count the clients' classes once; None where examples have no single class each."""
    examples = population.examples
    if not isinstance(examples, dict) or "labels" not in examples or not len(test_labels):
        return None
    labels, tested = np.asarray(examples["labels"]), np.asarray(test_labels)
    whole = all(a.ndim == 1 and np.issubdtype(a.dtype, np.integer) for a in (labels, tested))
    offsets = np.asarray(population.offsets, np.int64)
    num_clients = len(offsets) - 1
    if not whole or not len(labels) or min(labels.min(), tested.min()) < 0:
        return None
    num_classes = int(max(labels.max(), tested.max())) + 1
    if num_clients * num_classes > LARGEST:
        return None
    clients = np.repeat(np.arange(num_clients), np.diff(offsets))
    owned = labels[np.asarray(population.order)].astype(np.int64)
    counts = np.bincount(clients * num_classes + owned, minlength=num_clients * num_classes)
    counts = counts.reshape(num_clients, num_classes).astype(np.float32)
    num_tested = np.bincount(tested.astype(np.int64), minlength=num_classes)
    counts = np.where(num_tested > 0, counts, np.float32(0))
    totals = counts.sum(axis=1, keepdims=True)
    has_any = totals[:, 0] > 0
    return Classes(shares=counts[has_any] / totals[has_any], num_tested=num_tested)


def of_clients(classes: Classes, class_correct: Any) -> dict[str, float] | None:
    """Describe the clients' accuracies in one test: extremes, quartiles, mean and deviation.

    `class_correct` counts hits by class, ``[K']``: a network may know more classes than there are.
    """
    num_classes = len(classes.num_tested)
    correct = np.asarray(class_correct, np.float64)[:num_classes]
    if not len(classes.shares) or len(correct) < num_classes:
        return None
    by_class = (correct / np.maximum(1, classes.num_tested)).astype(np.float32)
    by_client = np.sort(classes.shares @ by_class)
    names = ("lowest", "lower_quartile", "median", "upper_quartile", "highest")
    last = len(by_client) - 1
    values = np.interp(
        [0.0, 0.25 * last, 0.5 * last, 0.75 * last, last], np.arange(last + 1), by_client
    )
    spread = {name: round(float(value), 6) for name, value in zip(names, values, strict=True)}
    mean, deviation = float(by_client.mean()), float(by_client.std())
    return spread | {"mean": round(mean, 6), "deviation": round(deviation, 6)}
