"""What makes no population is refused on the host, and whatever is taken trains."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import registry, types
from fedjaxprune.data import (
    batching,
    conversion,
    partitions,
    population_checks,
    rounding,
    splits,
    transforms,
)
from fedjaxprune.errors import DataError

X, Y = np.ones((6, 2), np.float32), np.arange(6) % 3
ALL = [np.arange(6)]
HUGE = np.int64(2**31)


def gather(examples, parts=ALL, client=0):
    people = partitions.population(examples, parts)
    batcher = batching.epochs(num_epochs=1, batch_size=3, preprocess=transforms.chain())
    data = types.client_data(people, jnp.int32(client))
    return batcher.batch(jax.random.key(0), data, jnp.int32(0))


def changed(row, value):
    made = X.copy()
    made[row, 1] = value
    return made


VALUES = {
    "NaN": ({"inputs": changed(4, np.nan)}, "inputs .* finite float32 .* example 4 has nan"),
    "infinity": ({"inputs": changed(2, -np.inf)}, "example 2 has -inf"),
    "a large double": ({"inputs": np.full((6, 2), 1e39)}, "finite float32 numbers.* 0 has inf"),
    "NaN as a target": ({"labels": changed(1, np.nan)}, "labels must be finite"),
    "half": ({"inputs": jnp.full((6, 2), jnp.inf, jnp.bfloat16)}, "finite bfloat16 numbers"),
    "complex": ({"inputs": X + 1j}, "inputs must be real numbers, got complex64; give real"),
    "complex on the device": ({"inputs": jnp.asarray(X, jnp.complex64)}, "got complex64"),
    "a long id": ({"inputs": (Y + HUGE)[:, None]}, "inputs must fit int32, got 2147483648 to"),
    "a small id": ({"inputs": (Y - 2 * HUGE)[:, None]}, "got -4294967296 to"),
    "a long word": ({"inputs": np.full((6, 1), 2**63, np.uint64)}, "inputs must fit uint32"),
    "a long label": ({"labels": Y + 2 * HUGE}, "labels must fit int32"),
    "a word as a label": ({"labels": np.full(6, 2**31, np.uint32)}, "labels must fit int32"),
    "deep": ({"inputs": {"a": X, "b": (X, changed(0, np.nan))}}, "inputs/b/1 must be finite"),
    "ragged": ({"inputs": np.array([[1], [1, 2]] * 3, object)}, "inputs must be real numbers, got"),
    "objects": ({"labels": np.array([None] * 6)}, "got missing values .None."),
    "doubles that merge": ({"inputs": 1e9 + Y[:, None] / 8}, "inputs lie between 1000000000 and"),
    "doubles that vanish": (
        {"inputs": X * np.float64(1e-300)},
        "at position 0, which float32 cannot tell",
    ),
    "text": ({"labels": np.array(list("abcabc"))}, "labels must be real numbers, got text"),
    "dates": ({"inputs": np.zeros((6, 1), "M8[s]")}, "inputs must be real numbers, got datetime"),
    "masked values": ({"labels": np.ma.array(Y, mask=Y == 2)}, "labels have masked values"),
    "keys": ({"inputs": jax.random.split(jax.random.key(0), 6)}, "must be real numbers, got key"),
    "nothing": ({"labels": None}, "labels must be an array .* got NoneType"),
    "one number": ({"labels": np.float32(1)}, "labels must be an array with an axis"),
    "lists": ({"inputs": X.tolist()}, "inputs/0/0 must be an array .* got float"),
    "a function": ({"inputs": lambda: X}, "inputs must be an array, got a function; call it"),
    "a longer array": ({"more": np.zeros(7)}, r"agree in their first axis, got sizes \[6, 7\]"),
}


@pytest.mark.parametrize("name", sorted(VALUES))
def test_values_that_would_change_in_silence_are_refused(name):
    changes, sentence = VALUES[name]
    with pytest.raises(DataError, match=sentence):
        partitions.population({"inputs": X, "labels": Y, **changes}, ALL)


def test_examples_without_arrays_are_refused():
    for given in ({}, None, []):
        with pytest.raises(DataError, match="examples must be a"):
            partitions.population(given, ALL)
    with pytest.raises(DataError, match="must number from 1"):
        partitions.population({"inputs": X[:0], "labels": Y[:0]}, [[]])
    wide = np.broadcast_to(np.uint8(0), (2**31,))  # takes no memory
    with pytest.raises(DataError, match="must number from 1 to 2147483647, got 2147483648"):
        population_checks.examples({"inputs": wide}, num_classes=None)


def test_what_fits_is_kept_as_it_is():
    inputs = {
        "bytes": np.arange(12, dtype=np.uint8).reshape(6, 2),
        "ids": np.full((6, 1), 2**31 - 1),
        "words": np.full((6, 1), 2**32 - 1, np.uint32),
        "flags": Y > 0,
        "doubles": np.linspace(0, 1, 6),
        "half": jnp.ones((6, 1), jnp.bfloat16),
    }
    batch = gather({"inputs": inputs, "labels": {"price": X[:, 0] / 3, "sold": Y > 1}})
    types_ = {name: str(leaf.dtype) for name, leaf in batch.inputs.items()}
    assert types_ == {
        "bytes": "uint8",
        "ids": "int32",
        "words": "uint32",
        "flags": "bool",
        "doubles": "float32",
        "half": "bfloat16",
    }
    assert int(batch.inputs["ids"][0, 0]) == 2**31 - 1
    assert int(batch.inputs["words"][0, 0]) == 2**32 - 1
    assert batch.labels["price"].tolist() == [np.float32(1) / 3] * 3
    assert batch.labels["sold"].dtype == jnp.int32


def test_labels_of_known_classes_are_in_range():
    def make(labels, num_classes=3):
        return partitions.population({"inputs": X, "labels": labels}, ALL, num_classes=num_classes)

    make(Y)
    make(np.where(np.arange(12) % 4, 2, -1).reshape(6, 2))  # no label at some positions
    for labels, sentence in (
        (Y + 1, r"labels must lie in \[0, 3\), got 1 to 3"),
        (np.where(Y, Y, 255), "got 1 to 255"),
        (Y - 1, "got -1 to 1"),
        (np.full((6, 2), 3), "got 3 to 3"),
        (Y / 2, "must be integers for 3 classes, got float32"),
        ({"a": Y}, "got no array of that name"),
    ):
        with pytest.raises(DataError, match=sentence):
            make(labels)
    half: Any = 3.5
    with pytest.raises(DataError, match=r"num_classes must be a whole number, got 3\.5"):
        make(Y, half)
    with pytest.raises(DataError, match=r"labels must lie in \[0, 2\)"):
        partitions.histogram([[0]], Y, num_classes=2)
    assert partitions.histogram([[0, 1, 4], []], Y, num_classes=3).tolist() == [[1, 2, 0], [0] * 3]


PARTS = {
    "marks": ([Y > 0], "client 0 has marks; give numpy.flatnonzero"),
    "floats": ([[0, 1], [2.0]], "parts must hold integers, but client 1 has float64"),
    "text": ([["a"]], "must hold integers, but client 0 has <U1"),
    "a table": ([np.zeros((2, 2), int)], r"client 0 has the shape \(2, 2\)"),
    "ragged": ([[[1], [1, 2]]], "client 0 has no list of rows"),
    "numbers": ([0, 1], r"client 0 has the shape \(\)"),
    "a mapping": ({"a": [0]}, r"got dict; give list\(parts.values\(\)\)"),
    "one number": (3, "a list with the rows of each client, got int"),
    "a name": ("abc", "got str"),
    "none": ([], "at least one client"),
    "behind": ([[0], [6]], r"indices in \[0, 6\), got 0 to 6"),
    "negative": ([[-1]], "got -1 to -1"),
    "far": ([np.array([2**32], np.int64)], "got 4294967296 to 4294967296"),
    "farther": ([np.array([2**64 - 1], np.uint64)], "row 18446744073709551615"),
}


@pytest.mark.parametrize("name", sorted(PARTS))
def test_rows_that_are_none_are_refused(name):
    parts, sentence = PARTS[name]
    with pytest.raises(DataError, match=sentence):
        partitions.population({"inputs": X, "labels": Y}, parts)


def test_clients_are_lists_of_any_kind():
    for parts in (
        [[0, 1, 1], [], [5]],
        ([0, 1, 1], (), np.array([5], np.uint64)),
        (np.array(rows, np.int8) for rows in ([0, 1, 1], [], [5])),
    ):
        people = partitions.population({"inputs": X, "labels": Y}, parts)
        assert people.order.tolist() == [0, 1, 1, 5]
        assert people.offsets.tolist() == [0, 3, 3, 4]
        assert people.order.dtype == people.offsets.dtype == jnp.int32
    assert gather({"inputs": X, "labels": Y}, [[], []]).weights.tolist() == [0, 0, 0]


def test_batches_say_which_names_they_read():
    for examples, sentence in (
        ({"x": X, "y": Y}, "the arrays inputs and labels of the examples, got x, y."),
        ({"input": X, "labels": Y}, "got input, labels; did you mean 'input'?"),
        ((X, Y), "got tuple without names"),
        (X, "without names"),
    ):
        with pytest.raises(DataError, match=sentence):
            gather(examples)


def test_client_ids_may_have_any_name(tmp_path):
    names = ("labels", "inputs", "train", "test_inputs", "x_train", "y")
    ids = {name: [f"{name}{i % 2}" for i in range(40)] for name in names}
    columns = {"a": list(range(40)), "label": [i % 4 for i in range(40)], **ids}
    rows = [",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
    (tmp_path / "mine.csv").write_text("\n".join([",".join(columns), *rows]))
    part = registry.find("dataset", "table").part
    dataset = part.build(part.settings(path=str(tmp_path / "mine.csv"), keys=names))
    assert dataset.input_shape == (1,)
    assert dataset.train["labels"].dtype == np.int32
    for name in names:
        assert set(dataset.keys[name]) == {f"{name}0", f"{name}1"}


def test_client_ids_that_are_equal_as_numbers_alone_are_refused(tmp_path):
    part = registry.find("dataset", "table").part

    def read(*ids):
        rows = [f"{i},{i % 4},{ids[i % len(ids)]}" for i in range(40)]
        (tmp_path / "mine.csv").write_text("\n".join(["a,label,user", *rows]))
        return part.build(part.settings(path=str(tmp_path / "mine.csv"), keys=("user",)))

    with pytest.raises(DataError, match="has the client ids '007' and '7', which are read as the"):
        read("007", "7", "8")
    assert set(read("007", "8").keys["user"]) == {7, 8}  # nobody is taken for somebody else
    assert set(read("007", "7", "u").keys["user"]) == {"007", "7", "u"}


def test_a_mapping_that_can_be_read_in_two_ways_is_refused():
    x, y = np.ones((40, 2), np.float32), np.arange(40) % 4
    for value, sentence in (
        ({"inputs": x, "labels": y, "y_test": y}, "in two ways, inputs and y_test"),
        ({"x": x, "y": y, "test_inputs": x, "test_labels": y}, "in two ways, x and test_inputs"),
        ({"train": (x, y), "val": (x, y)}, "train and test .* got train, val."),
        ({"train": (x, y), "test": (x, y), "extra": (x, y)}, "got train, test, extra"),
    ):
        with pytest.raises(DataError, match=sentence):
            conversion.as_dataset(value)
    made = conversion.as_dataset({"inputs": x, "labels": y, "train": y % 2})
    assert set(made.keys) == {"train"}
    with pytest.raises(DataError, match="client ids 'train' are given twice"):
        conversion.as_dataset({"inputs": x, "labels": y, "train": y}, keys={"train": y})


def test_options_of_partitions_are_whole_numbers_and_keys_sort():
    rng = np.random.default_rng(0)
    wrong: Any
    for wrong in (2.0, True, "2"):
        with pytest.raises(ValueError, match="num_clients must be a whole number, got"):
            partitions.iid(rng, Y, num_clients=wrong)
    with pytest.raises(ValueError, match="min_size must be a whole number"):
        partitions.dirichlet(rng, Y, num_clients=2, alpha=1.0, min_size=wrong)
    with pytest.raises(ValueError, match=r"classes_per_client must lie in \[1, 3\]"):
        partitions.shards(rng, Y, num_clients=2, classes_per_client=wrong)
    whole: Any = np.int64(2)
    assert len(partitions.iid(rng, Y, num_clients=whole)) == 2
    for keys, sentence in (
        (np.array([1, "a", 2], object), "keys must sort"),
        (np.array(["a", None], object), "must have no missing values"),
        (np.array([1.0, np.nan]), "must have no missing values"),
    ):
        with pytest.raises(DataError, match=sentence):
            partitions.by_key(keys)


def test_labels_that_say_nothing_are_refused():
    words = np.array(["a", "b", np.nan] * 4, object)
    with pytest.raises(DataError, match="labels must not be missing, but some are nan"):
        conversion.as_dataset({"inputs": np.ones((12, 2)), "labels": words})
    tokens = np.ones((12, 3), int)
    with pytest.raises(DataError, match="labels must not all be negative: no position has one"):
        conversion.as_dataset({"inputs": tokens, "labels": -tokens}, task="sequence")


def test_targets_that_no_float32_holds_are_refused():
    with pytest.raises(DataError, match=r"train labels must be finite numbers, got 1e\+39 in"):
        conversion.as_dataset((np.ones((40, 2)), np.full(40, 1e39)), task="regression")


def test_the_rounding_of_float32_passes_where_it_tells_numbers_apart():
    rng = np.random.default_rng(0)
    noise = 0.1 * (1 + 1e-15 * rng.normal(size=40))
    alike = np.float64(np.float32(1e9)) * np.ones(40)
    for values in (
        rng.normal(size=40) * 1e9,
        1e9 + 1e5 * rng.normal(size=40),
        noise,
        alike,
        (1.0 + 1e-6 * rng.normal(size=40)).astype(np.float32).astype(np.float64),
        np.where(np.arange(40) == 3, 1e-300, 1.0),
        2**24 + 2 * np.arange(40),
        np.arange(40) * 2**40,
        np.array([-(2**63), 2**62, 2**63 - 2**40]),
        np.array([0, 2**63], np.uint64),
        np.zeros((3, 0)),
        np.array([True, False]),
    ):
        rounding.check(values, "values")
    for values in (np.array([2**63 - 1]), np.array([-(2**63) + 1]), np.array([2**64 - 1], "u8")):
        with pytest.raises(DataError, match=r"values have the integer .* in example 0, which"):
            rounding.check(values, "values")


def test_the_last_example_of_a_class_is_not_held_out():
    for num in range(3, 10):
        labels = np.arange(num) % (num - 1)  # one class has two examples, the others one
        try:
            rows, held = splits.split_rows(labels, test_fraction=0.2, by_class=True)
        except DataError:
            assert round(0.2 * num) == 0
        else:
            assert set(labels[held]) <= set(labels[rows])
    with pytest.raises(DataError, match="4 examples of 4 classes are too few to hold out a test_f"):
        splits.split_rows(np.arange(4), test_fraction=0.2, by_class=True)
