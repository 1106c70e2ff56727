"""Laws of batching: every example once an epoch, filling counts for nothing, orders are random."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import trees, types
from fedjaxprune.data import batching, transforms
from fedjaxprune.permutations import permute
from fedjaxprune.types import ClientData, Population

KEY = jax.random.key(0)
PERMUTE = jax.jit(permute)


def permutation(key, size):
    # One compilation for all sizes: positions behind the end are cut off again.
    room = 1 << max(9, (size - 1).bit_length())
    positions = jnp.minimum(jnp.arange(room, dtype=jnp.int32), size - 1)
    return np.asarray(PERMUTE(key, positions, jnp.int32(size)))[:size]


def permutations(num_orders, size):
    keys = jax.random.split(KEY, num_orders)
    positions = jnp.arange(size, dtype=jnp.int32)
    return np.asarray(jax.vmap(lambda key: PERMUTE(key, positions, jnp.int32(size)))(keys))


def chi_square(counts):
    expected = counts.sum() / counts.size
    return ((counts - expected) ** 2 / expected).sum()


def assert_uniform(counts, degrees):
    # The statistic has mean `degrees` and deviation sqrt(2 * degrees); both tails are suspicious.
    assert abs(chi_square(counts) - degrees) < 5 * np.sqrt(2 * degrees)


def client(size, *, start=7, behind=5):
    """A client whose examples have inputs and labels equal to the row, among others' examples."""
    total = start + size + behind
    rows = np.random.default_rng(0).permutation(total).astype(np.int32)
    examples = {"inputs": jnp.arange(total, dtype=jnp.int32), "labels": jnp.arange(total) % 256}
    examples["labels"] = examples["labels"].astype(jnp.uint8)
    data = ClientData(examples, jnp.asarray(rows), jnp.int32(start), jnp.int32(size), jnp.int32(1))
    return data, rows[start : start + size]


def collect(batcher, data, key=KEY, num_steps=None):
    num_steps = int(batcher.num_steps(data)) if num_steps is None else num_steps
    batch = jax.jit(batcher.batch)
    batches = [batch(key, data, jnp.int32(step)) for step in range(num_steps)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


@pytest.mark.parametrize("sizes", [range(1, 301), [1000, 4096, 4097]])
def test_a_permutation_is_a_bijection_for_every_size(sizes):
    for size in sizes:
        order = permutation(jax.random.fold_in(KEY, size), size)
        np.testing.assert_array_equal(np.sort(order), np.arange(size))


@pytest.mark.usual("2", "5")
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_permutations_of_a_small_set_are_equally_likely(size):
    orders = permutations(12_000, size)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    num_orders = int(np.prod(np.arange(1, size + 1)))
    assert counts.size == num_orders
    assert_uniform(counts, num_orders - 1)


@pytest.mark.parametrize("size", [16, 37, 100])
def test_every_position_goes_everywhere_equally_often(size):
    orders = permutations(4_000, size)
    counts = np.stack([np.bincount(column, minlength=size) for column in orders.T])
    # Rows and columns of the table both add up to the number of orders.
    assert_uniform(counts, (size - 1) ** 2)


@pytest.mark.parametrize("size", [16, 37, 100])
def test_neighbours_do_not_stay_together(size):
    orders = permutations(4_000, size).astype(np.int64)
    distances = (orders[:, 1:] - orders[:, :-1]) % size
    assert (distances > 0).all()
    assert_uniform(np.bincount(distances.ravel(), minlength=size)[1:], size - 2)


def test_the_orders_of_two_epochs_are_independent():
    size = 20
    batcher = batching.epochs(num_epochs=2, batch_size=size, preprocess=transforms.chain())
    data, _ = client(size, start=0, behind=0)
    data = data._replace(order=jnp.arange(size, dtype=jnp.int32))

    def orders(key):
        return [batcher.batch(key, data, jnp.int32(step)).inputs for step in (0, 1)]

    first, second = map(np.asarray, jax.jit(jax.vmap(orders))(jax.random.split(KEY, 2_000)))
    assert (first != second).any(axis=1).all()
    assert_uniform(np.bincount((first * size + second).ravel(), minlength=size**2), (size - 1) ** 2)


def test_a_permutation_is_the_same_under_vmap_and_jit():
    sizes = jnp.array([1, 2, 9, 64, 1000], jnp.int32)
    keys = jax.random.split(KEY, 5)
    positions = jnp.zeros((5, 8), jnp.int32) + jnp.minimum(jnp.arange(8)[None], sizes[:, None] - 1)
    together = jax.jit(jax.vmap(permute))(keys, positions, sizes)
    for i in (1, 4):
        alone = permute(keys[i], positions[i], sizes[i])
        np.testing.assert_array_equal(together[i], alone)


@pytest.mark.usual("1", "8", "21")
@pytest.mark.parametrize("size", [1, 3, 8, 16, 21])
def test_an_epoch_takes_every_example_once(size):
    num_epochs, batch_size = 3, 8
    batcher = batching.epochs(
        num_epochs=num_epochs, batch_size=batch_size, preprocess=transforms.chain()
    )
    data, rows = client(size)
    per_epoch = -(-size // batch_size)
    assert int(batcher.num_steps(data)) == num_epochs * per_epoch
    batches = collect(batcher, data)
    assert set(batches.weights.ravel()) <= {0.0, 1.0}
    assert np.isin(batches.inputs, rows).all()  # filling comes from the same client
    orders = []
    for inputs, weights in zip(
        batches.inputs.reshape(num_epochs, -1),
        batches.weights.reshape(num_epochs, -1),
        strict=True,
    ):
        orders.append(tuple(inputs[weights > 0]))
        np.testing.assert_array_equal(np.sort(orders[-1]), np.sort(rows))
    if size >= 8:
        assert len(set(orders)) == num_epochs


def test_filling_repeats_the_epoch_from_its_beginning():
    data, _ = client(5)
    batcher = batching.epochs(num_epochs=1, batch_size=12, preprocess=transforms.chain())
    (inputs,) = collect(batcher, data).inputs
    np.testing.assert_array_equal(inputs, np.resize(inputs[:5], 12))


def test_labels_belong_to_their_inputs():
    data, _ = client(21)
    for batcher in (
        batching.epochs(num_epochs=2, batch_size=8, preprocess=transforms.chain()),
        batching.steps(num_steps=5, batch_size=8, preprocess=transforms.chain()),
    ):
        batches = collect(batcher, data)
        np.testing.assert_array_equal(batches.inputs, batches.labels)
        assert batches.labels.dtype == np.int32
        assert batches.weights.dtype == np.float32


@pytest.mark.usual("8", "13")
@pytest.mark.parametrize("size", [8, 9, 13, 24])
def test_steps_run_through_an_endless_sequence_of_epochs(size):
    batcher = batching.steps(num_steps=13, batch_size=8, preprocess=transforms.chain())
    data, rows = client(size)
    assert int(batcher.num_steps(data)) == 13
    batches = collect(batcher, data)
    assert (batches.weights == 1).all()
    stream = batches.inputs.ravel()
    epochs = [stream[i : i + size] for i in range(0, stream.size - size + 1, size)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.sort(rows))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.usual("3", "7")
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_steps_show_a_small_client_evenly_in_every_batch(size):
    batcher = batching.steps(num_steps=6, batch_size=8, preprocess=transforms.chain())
    data, rows = client(size)
    batches = collect(batcher, data)
    assert (batches.weights == 1).all()
    for inputs in batches.inputs:
        counts = [np.sum(inputs == row) for row in rows]
        assert sum(counts) == 8
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("behind", [0, 5])
@pytest.mark.parametrize(
    "batcher",
    [
        batching.epochs(num_epochs=2, batch_size=4, preprocess=transforms.scale()),
        batching.steps(num_steps=2, batch_size=4, preprocess=transforms.scale()),
    ],
)
def test_an_empty_client_takes_no_steps_and_does_no_harm(batcher, behind):
    data, _ = client(0, behind=behind)
    assert int(batcher.num_steps(data)) == 0
    batches = collect(batcher, data, num_steps=3)
    assert np.isfinite(batches.inputs).all()
    assert (batches.weights == 0).all()


def test_clients_are_independent_of_their_place_in_a_cohort():
    examples = {"inputs": jnp.arange(40, dtype=jnp.int32), "labels": jnp.arange(40) % 3}
    index = jnp.asarray(np.random.default_rng(0).permutation(40), jnp.int32)
    population = Population(examples, index, jnp.array([0, 7, 7, 25, 40], jnp.int32))
    batcher = batching.epochs(num_epochs=2, batch_size=8, preprocess=transforms.chain())

    @jax.jit
    def update(key, client_id):
        data = types.client_data(population, client_id)
        return batcher.num_steps(data), batcher.batch(key, data, jnp.int32(1))

    keys, ids = jax.random.split(KEY, 4), jnp.array([3, 1, 0, 2], jnp.int32)
    together = jax.jit(jax.vmap(update))(keys, ids)
    np.testing.assert_array_equal(together[0], [4, 0, 2, 6])
    for i in range(4):
        alone = update(keys[i], ids[i])
        chex.assert_trees_all_equal(alone, trees.take_rows(together, jnp.int32(i)))


def test_preprocessing_gets_a_key_of_the_step_and_the_order_does_not():
    data, _ = client(16)

    def noise(key, inputs):
        return jax.random.uniform(key, inputs.shape)

    batcher = batching.epochs(num_epochs=1, batch_size=8, preprocess=noise)
    noisy = collect(batcher, data).inputs
    assert len(np.unique(noisy)) == noisy.size
    assert not np.array_equal(noisy, collect(batcher, data, jax.random.key(1)).inputs)
    np.testing.assert_array_equal(noisy, collect(batcher, data).inputs)


@pytest.mark.parametrize("bad", [0, -1, 2.0, True])
@pytest.mark.parametrize("name", ["num_epochs", "num_steps", "batch_size"])
def test_a_number_out_of_range_is_refused(name, bad):
    factory = batching.epochs if name == "num_epochs" else batching.steps
    other = {"num_epochs": 1} if name == "num_epochs" else {"num_steps": 1}
    options = {**other, "batch_size": 1, "preprocess": transforms.scale(), name: bad}
    with pytest.raises(ValueError, match=f"{name} must be .* got {bad}"):
        factory(**options)
    with pytest.raises(ValueError, match="must not exceed"):
        batching.steps(num_steps=2**20, batch_size=2**12, preprocess=transforms.scale())


@pytest.mark.parametrize(("num_epochs", "batch_size"), [(2**30, 2), (1, 2**31 - 1)])
def test_steps_of_epochs_that_do_not_fit_int32_are_refused(num_epochs, batch_size):
    batcher = batching.epochs(
        num_epochs=num_epochs, batch_size=batch_size, preprocess=lambda key, inputs: inputs
    )
    data = ClientData(
        examples={"inputs": jnp.ones(7), "labels": jnp.zeros(7, jnp.int32)},
        order=jnp.arange(7, dtype=jnp.int32),
        start=jnp.int32(0),
        size=jnp.int32(7),
        client_id=jnp.int32(0),
    )
    with pytest.raises(ValueError, match="must fit int32 for 7 examples"):
        batcher.num_steps(data)
