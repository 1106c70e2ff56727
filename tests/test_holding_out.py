"""The server's own examples, and the share of its data that a client looks at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune.data import batching, partitions, splits
from fedjaxprune.types import client_data

KEY = jax.random.key(4)
LABELS = np.repeat([0, 1, 2], [20, 50, 10])


@pytest.mark.parametrize(
    ("options", "counts"),
    [({}, [5, 5, 5]), ({"num": 3}, [3, 3, 3]), ({"share": 0.1}, [2, 5, 1])],
)
def test_the_server_holds_its_part_of_every_class(options, counts):
    held, rest = splits.hold_out(np.random.default_rng(0), LABELS, **options)
    assert np.bincount(LABELS[held]).tolist() == counts
    assert sorted([*held, *rest]) == list(range(80))
    again, _ = splits.hold_out(np.random.default_rng(0), LABELS, **options)
    other, _ = splits.hold_out(np.random.default_rng(1), LABELS, **options)
    assert held.tolist() == again.tolist() != other.tolist()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"share": 0.02}, "a held-out share of 0.02 leaves class 0, .* without any at the server"),
        ({"share": 0.96}, "leaves class 2, which has 10 .* without any among the clients"),
        ({"num": 10}, "10 examples of each class leaves class 2"),
        ({"share": 0.0}, "share must lie in"),
    ],
)
def test_a_class_without_examples_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        splits.hold_out(np.random.default_rng(0), LABELS, **options)


def test_a_client_always_looks_at_the_same_examples():
    people = partitions.population(
        {"inputs": np.arange(80), "labels": LABELS},
        [np.arange(33), np.arange(33, 80), np.array([]).astype(int)],
    )
    batcher = batching.development(
        KEY, share=0.3, batch_size=4, preprocess=lambda key, inputs: inputs
    )

    batch_of = jax.jit(batcher.batch)

    def seen(client_id, key):
        data = client_data(people, jnp.int32(client_id))
        found = []
        for step in range(int(batcher.num_steps(data))):
            batch = batch_of(key, data, jnp.int32(step))
            found += np.asarray(batch.inputs)[np.asarray(batch.weights) > 0].tolist()
        return found

    first = seen(0, KEY)
    assert len(set(first)) == len(first) == 10  # of 33 examples, 9.9 rounded up
    assert all(value < 33 for value in first)
    assert first != sorted(first)
    assert seen(0, jax.random.key(9)) == first
    second = seen(1, KEY)
    assert len(set(second)) == 15  # of 47, 14.1 rounded up
    assert all(value >= 33 for value in second)
    assert seen(2, KEY) == []

    # What is left over is trained on, in a fresh order each time.
    batcher = batching.undeveloped(
        KEY, share=0.3, batch_size=4, preprocess=lambda key, inputs: inputs
    )
    batch_of = jax.jit(batcher.batch)
    left = seen(0, KEY)
    assert sorted([*left, *first]) == list(range(33))
    again = seen(0, jax.random.key(9))
    assert left != again
    assert sorted(left) == sorted(again)
    assert seen(2, KEY) == []


def test_what_a_client_looks_at_does_not_depend_on_where_its_examples_lie():
    batcher = batching.development(
        KEY, share=0.3, batch_size=16, preprocess=lambda key, inputs: inputs
    )

    def seen(sizes):
        parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        people = partitions.population(
            {"inputs": np.arange(sum(sizes)), "labels": np.zeros(sum(sizes), int)}, parts
        )
        return batcher.batch(KEY, client_data(people, jnp.int32(1)), jnp.int32(0)).inputs - sizes[0]

    np.testing.assert_array_equal(seen([3, 47, 5]), seen([20, 47, 1]))
