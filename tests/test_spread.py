"""How a test spreads over clients: by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune.experiment.run import client_accuracy
from fedjaxprune.types import Population


def population(labels, parts):
    offsets = np.cumsum([0, *map(len, parts)])
    order = np.concatenate([np.asarray(part, np.int32) for part in parts])
    return Population(
        examples={"labels": jnp.array(labels)}, order=jnp.array(order), offsets=jnp.array(offsets)
    )


def test_a_client_is_given_the_accuracies_of_its_classes():
    # Clients with classes {0}, {0, 1, 1, 1}, {1, 1}, and one without examples.
    made = population([0, 0, 1, 1, 1, 1, 1], [[0], [1, 2, 3, 4], [5, 6], []])
    classes = client_accuracy.of_population(made, jnp.array([0, 0, 0, 0, 1, 1]))
    assert classes is not None
    np.testing.assert_array_equal(classes.shares, [[1, 0], [0.25, 0.75], [0, 1]])
    # Class 0: three of four rightly, class 1: none of two.
    told = client_accuracy.of_clients(classes, [3, 0])
    assert told is not None
    expected = [0.75, 0.1875, 0.0]
    assert told == {
        "lowest": 0.0,
        "lower_quartile": pytest.approx(np.quantile(expected, 0.25), abs=1e-6),
        "median": 0.1875,
        "upper_quartile": pytest.approx(np.quantile(expected, 0.75), abs=1e-6),
        "highest": 0.75,
        "mean": pytest.approx(np.mean(expected), abs=1e-6),
        "deviation": pytest.approx(np.std(expected), abs=1e-6),
    }


def test_alike_clients_have_the_accuracy_of_the_test():
    labels = np.tile(np.arange(4), 5)
    made = population(labels, np.split(np.arange(20), 5))
    classes = client_accuracy.of_population(made, np.repeat(np.arange(4), 6))
    assert classes is not None
    told = client_accuracy.of_clients(
        classes, [6, 3, 0, 1, 0, 0]
    )  # a network with two classes more
    assert told is not None
    assert told["lowest"] == told["highest"] == round(10 / 24, 6)


def test_classes_that_are_not_tested_do_not_count():
    made = population([0, 1, 2], [[0, 2], [2]])
    classes = client_accuracy.of_population(made, [0, 1])
    assert classes is not None
    np.testing.assert_array_equal(classes.shares, [[1, 0, 0]])


def test_where_examples_have_no_class_each_there_is_no_spread():
    whole = population([0, 1], [[0], [1]])
    assert client_accuracy.of_population(whole, np.zeros((3, 2), np.int32)) is None
    assert client_accuracy.of_population(whole, np.zeros(0, np.int32)) is None
    sequences = whole._replace(examples={"labels": jnp.zeros((2, 5), jnp.int32)})
    assert client_accuracy.of_population(sequences, [0]) is None
    assert (
        client_accuracy.of_population(whole._replace(examples={"inputs": jnp.zeros(2)}), [0])
        is None
    )
