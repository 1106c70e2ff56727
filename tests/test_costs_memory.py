"""Memory: a step's, in closed form and as JAX saves it, and the program's, against XLA's own."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks import program_memory
from benchmarks import step_memory as memory
from fedjaxprune import models, trees
from fedjaxprune.data import batching
from fedjaxprune.federated import sampling
from fedjaxprune.methods import fedavg
from fedjaxprune.rounds import facts, simulation, task
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.structure import jaxprs
from fedjaxprune.types import Batch, Population

KEY = jax.random.key(0)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


PARAMS = {"a": {"kernel": shape(6, 8)}, "b": {"bias": shape(2), "kernel": shape(8, 2)}}


def loss(params, x):
    hidden = jnp.sin(x @ params["a"]["kernel"])
    return jnp.sum(hidden @ params["b"]["kernel"] + params["b"]["bias"][None])


step = functools.partial(memory.step, loss, PARAMS, shape(5, 6))


def test_a_dense_step_is_a_closed_form():
    size = 48 + 2 + 16
    for optimizer, copies in (
        (optax.sgd(0.1), 0),
        (optax.sgd(0.1, momentum=0.9), 1),
        (optax.adam(0.1), 2),
    ):
        parts = step(optimizer=optimizer, encoding=memory.dense())
        counter = 32 if copies == 2 else 0
        assert parts == memory.StepMemory(
            parameters=32 * size,
            gradients=32 * size,
            optimizer=copies * 32 * size + counter,
            # The examples, the cosine and the sine, but no weight a second time.
            activations=32 * (5 * 6 + 2 * 5 * 8),
            masks=0,
        )


def test_encodings_say_where_the_places_are():
    kept = {"a/kernel": 12, "b/kernel": 4}
    make = functools.partial(step, optimizer=optax.sgd(0.1, momentum=0.9), kept=kept)
    live, masked = 12 + 2 + 4, 48 + 16
    dense, shared, own = (
        make(encoding=encoding())
        for encoding in (memory.dense, memory.shared_bitmap, memory.own_bitmap)
    )
    assert dense[:3] == (32 * 66,) * 3
    assert shared[:3] == (32 * live,) * 3
    assert own[:3] == (32 * live + masked,) * 3
    assert (dense.masks, shared.masks, own.masks) == (masked, masked, 0)
    grown = make(encoding=memory.own_bitmap(), dense_gradients=lambda path: path == "a/kernel")
    assert grown.gradients == own.gradients + 32 * (48 - 12) - 48
    with pytest.raises(ValueError, match="counts for c, but the parameters are a/kernel"):
        step(optimizer=optax.sgd(0.1), encoding=memory.dense(), kept={"c": 1})


def test_published_memories_are_formulas():
    assert memory.of_fedrts(44_760) == 134_280  # 134.29 MB, of 44.76
    assert round(memory.of_prunefl(3, 200) / memory.of_fedtiny(200), 2) == 0.51  # at 0.015


def test_activations_are_those_of_the_layer_and_not_of_the_trick():
    model = models.lenet5(input_shape=(28, 28, 1), num_classes=10)
    params, state = jax.eval_shape(model.init, KEY)
    batch = Batch(shape(8, 28, 28, 1), shape(8, dtype=jnp.int32), shape(8))  # pyright: ignore[reportArgumentType]

    def train(params, state, batch):
        return model.loss(params, state, batch, KEY)[0]

    layers = memory.activations(jaxprs.plain(train), params, state, batch)
    assert memory.activations(train, params, state, batch) == layers
    # The examples and what the five layers and two poolings put out, at the least.
    outputs = 28 * 28 + 28 * 28 * 6 + 14 * 14 * 6 + 100 * 16 + 25 * 16 + 120 + 84
    assert 8 * 32 * outputs <= layers <= 3 * 8 * 32 * outputs


def test_activations_grow_with_the_batch_and_shrink_under_a_checkpoint():
    params = {"w": shape(16, 16)}

    def deep(params, x):
        for _ in range(6):
            x = jnp.sin(x @ params["w"])
        return jnp.sum(x)

    one, four = (memory.activations(deep, params, shape(size, 16)) for size in (1, 4))
    assert four == 4 * one
    again = memory.activations(jax.checkpoint(deep), params, shape(4, 16))
    assert again == 32 * 4 * 16  # the examples alone


def round_of(name, image, chunk_size, num_clients=10, num_examples=500):
    """Make a round, by shapes alone."""
    options = {"norm": "group"} if name == "resnet20" else {}
    model = getattr(models, name)(input_shape=image, num_classes=10, **options)
    setup = Protocol(
        num_rounds=1,
        batcher=batching.steps(
            num_steps=2, batch_size=32, preprocess=lambda key, x: x.astype(jnp.float32) / 255
        ),
        optimizer=optax.sgd(0.1, momentum=0.9),
        chunk_size=chunk_size,
    )
    algorithm = fedavg.build(
        fedavg.FedAvg(), task.make(model, setup, inputs=facts.float_inputs(image))
    )
    draw = sampling.uniform(num_clients=num_clients, cohort_size=4)
    advance = simulation.advance(algorithm.stages[0], draw)
    start = jax.eval_shape(
        lambda key: simulation.start(algorithm, *model.init(key), num_clients=num_clients), KEY
    )
    population = Population(
        examples={
            "inputs": shape(num_examples, *image, dtype=jnp.uint8),
            "labels": shape(num_examples, dtype=jnp.int32),
        },
        order=shape(num_examples, dtype=jnp.int32),  # pyright: ignore[reportArgumentType]
        offsets=shape(num_clients + 1, dtype=jnp.int32),  # pyright: ignore[reportArgumentType]
    )
    return advance, (KEY, start, population)


@pytest.mark.usual("mlp-image0-1")
@pytest.mark.parametrize(
    ("name", "image", "chunk_size"),
    [
        ("mlp", (8, 8, 1), 1),
        pytest.param("lenet5", (28, 28, 1), 1, marks=pytest.mark.slow),
        ("lenet5", (28, 28, 1), 4),
    ],
)
def test_a_rounds_memory_is_predicted_before_it_is_compiled(name, image, chunk_size):
    advance, args = round_of(name, image, chunk_size)
    predicted = program_memory.predict(advance, *args)
    used = program_memory.used(jax.jit(advance, donate_argnums=1), *args)  # as the runner does
    assert predicted.arguments == program_memory.size(args) == used.arguments
    assert predicted.outputs == pytest.approx(used.outputs, rel=0.01)  # and a table of pointers
    assert predicted.temporaries == pytest.approx(used.temporaries, rel=0.2)


@pytest.mark.slow
def test_predicted_memory_grows_by_the_chunk_and_not_by_the_cohort():
    one, two, four = (
        program_memory.predict(*_flat(round_of("cnn", (28, 28, 1), size))).temporaries
        for size in (1, 2, 4)
    )
    params = 4 * sum(
        trees.sizes(
            jax.eval_shape(models.cnn(input_shape=(28, 28, 1), num_classes=10).init, KEY)[0]
        )
    )
    assert one < two < four
    assert four - two > 2 * 2 * params  # parameters and momentum of two more clients, at least


def _flat(made):
    advance, args = made
    return advance, *args


def test_what_is_fused_takes_no_memory_and_what_a_product_reads_does():
    def fused(x):
        return jnp.sum(jnp.tanh(x * 2.0 + 1.0))

    assert program_memory.predict(fused, shape(100)).temporaries == 0

    def product(x):
        return jnp.sum(jnp.tanh(x) @ x)

    assert (
        program_memory.predict(product, shape(10, 10)).temporaries == 2 * 400
    )  # operand and output
