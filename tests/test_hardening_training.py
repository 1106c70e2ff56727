"""Shapes are checked where the loss is made, numbers of clients where a round is traced."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedjaxprune as fjp
from fedjaxprune import types
from fedjaxprune.data import batching, partitions, transforms
from fedjaxprune.errors import ConfigError, DataError
from fedjaxprune.experiment.run import evaluation
from fedjaxprune.federated import sampling, uplinks
from fedjaxprune.methods import fedavg
from fedjaxprune.models import adapters, heads, lstm, parameters
from fedjaxprune.rounds import facts, protocol, server_work, simulation, task
from tests import quadratic, stub
from tests.playing import STATE, dip, setup

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 4)).astype(np.float32)
Y = np.arange(6) % 3
PLAIN = transforms.chain()


def linear(num_outputs=3, *, reshape=None, **options):
    def apply(params, x):
        outputs = x @ params["kernel"]
        return outputs if reshape is None else reshape(outputs)

    return adapters.from_functions(
        lambda key: {"kernel": jax.random.normal(key, (4, num_outputs))}, apply, **options
    )


def look(model, labels, inputs=X):
    """Compute a model's loss of all examples, and its metrics."""
    labels = jax.tree.map(jnp.asarray, labels)
    batch = types.Batch(jnp.asarray(inputs), labels, jnp.ones(len(inputs)))
    params, state = jax.jit(model.init)(KEY)
    loss, (_, metrics) = jax.jit(model.loss)(params, state, batch, KEY)
    return float(loss), {name: float(one.total / one.weight) for name, one in metrics.items()}


def task_model(name, **options):
    return heads.for_task(linear(**options), name)


def squared(outputs, targets):
    return (outputs[:, 0] - targets) ** 2


REFUSED = {
    "a column": (linear(), Y[:, None], r"shape \(6,\), got \(6, 1\): give labels\[..., 0\]"),
    "one-hot": (linear(), np.eye(3, dtype=np.float32)[Y], "argmax.*one-hot"),
    "one-hot integers": (linear(), np.eye(3, dtype=np.int32)[Y], r"got \(6, 3\): give .*argmax"),
    "floats": (linear(), Y.astype(np.float32), "classes are integers, got labels of float32"),
    "booleans": (linear(), Y > 0, "classes are integers, got labels of bool"),
    "one logit": (linear(1), Y % 2, r"one output, and classes .* heads.for_task\(model, \"binary"),
    "positions": (linear(), np.zeros((6, 5), int), r"shape \(6,\), got \(6, 5\)"),
    "one number": (linear(), np.int32(1), r"shape \(6,\), got \(\)"),
    "several labels": (linear(), {"a": Y}, "labels must be one array, got dict"),
    "several outputs": (linear(reshape=lambda z: (z, z)), Y, "gives a tuple, and must give one"),
    "complex outputs": (linear(reshape=lambda z: z + 1j), Y, "must be real numbers, got complex"),
    "classes out": (linear(reshape=lambda z: z.argmax(1)), Y, "must be real numbers, got int"),
    "two logits": (task_model("binary", num_outputs=2), Y % 2, r"shape \(batch, 1\), got \(6, 2\)"),
    "flat logits": (
        task_model("binary", num_outputs=1, reshape=lambda z: z[:, 0]),
        Y % 2,
        r"shape \(batch, 1\), got \(6,\)",
    ),
    "soft labels": (task_model("binary", num_outputs=1), Y / np.float32(2), "classes are integers"),
    "flat outputs": (
        task_model("regression", num_outputs=1, reshape=lambda z: z[:, 0]),
        X[:, 0],
        r"got outputs \(6,\) and labels \(6,\)",
    ),
    "fewer targets": (task_model("regression"), X[:, :2], r"outputs \(6, 3\) and labels \(6, 2\)"),
    "turned targets": (task_model("regression"), X[:, :3].T, r"labels \(3, 6\)"),
    "a mean": (linear(loss=lambda z, t: jnp.mean(squared(z, t))), X[:, 0], "take no mean"),
    "a column of losses": (linear(loss=lambda z, t: z - t[:, None]), X[:, 0], r"shape \(6, 3\)"),
    "a square": (linear(loss=lambda z, t: z[:, :1] - t[None]), X[:, 0], r"the shape \(6, 6\)"),
    "complex losses": (linear(loss=lambda z, t: z[:, 0] * 1j), Y, "real floating .* complex64"),
    "hits": (linear(loss=lambda z, t: z.argmax(1) == t), Y, "real floating numbers, got bool"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_does_not_fit_a_loss_is_refused_while_tracing(name):
    model, labels, sentence = REFUSED[name]
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        pytest.raises((ValueError, TypeError), match=sentence) as caught,
    ):
        jax.eval_shape(lambda: look(model, labels))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("labels", "num_wrong"),
    [(Y, 0), (Y + 1, 2), (np.where(Y == 0, 255, Y), 2), (Y - 1, 2), (Y.astype(np.uint8), 0)],
)
def test_the_loss_of_a_label_that_is_no_class_is_nan(labels, num_wrong):
    logits = jnp.asarray(X[:, :3])
    for loss in (heads.CLASSES.loss, heads.CLASSES.test_loss):
        got = np.asarray(loss(logits, jnp.asarray(labels)))
        assert np.isnan(got).sum() == num_wrong
        right = -np.asarray(jax.nn.log_softmax(logits))[np.arange(6), np.clip(labels, 0, 2)]
        np.testing.assert_allclose(got[~np.isnan(got)], right[~np.isnan(got)], rtol=1e-6)


@pytest.mark.parametrize(
    ("labels", "is_told"), [([0, 1, 1, 0, 1, 0], False), ([0, 1, 7, 0, 1, 0], True)]
)
def test_a_label_that_is_no_class_of_one_logit_is_reported_as_nan(labels, is_told):
    """What is trained is the same to the bit; padding may be anything."""
    model = heads.for_task(linear(1), "binary")
    params, state = jax.jit(model.init)(KEY)
    labels = jnp.asarray([*labels, 9])
    batch = types.Batch(jnp.asarray([*X, X[0]]), labels, jnp.ones(7).at[6].set(0.0))
    loss, (_, seen) = jax.jit(model.loss)(params, state, batch, KEY)
    assert np.isfinite(loss)
    assert np.isnan(seen["loss"].total) == is_told
    assert seen["loss"].weight == 6


def test_more_classes_than_the_labels_type_can_hold_are_told_apart():
    logits = jnp.zeros((2, 300)).at[0, 3].set(5.0).at[1, 259].set(5.0)
    labels = jnp.array([3, 3], jnp.uint8)
    assert heads.is_largest(logits, labels).tolist() == [True, False]
    losses = heads.cross_entropy(logits, labels)
    np.testing.assert_allclose(losses, heads.cross_entropy(logits, jnp.array([3, 3])))


def test_losses_of_ones_own_have_their_targets_as_they_are():
    targets = RNG.uniform(0.1, 0.9, 6).astype(np.float32)
    outputs = X @ np.asarray(linear(1).init(KEY)[0]["kernel"])
    right = float(np.mean((outputs[:, 0] - targets) ** 2))
    models = {
        "its own": (linear(1, loss=squared), targets),
        "column": (linear(1, loss=lambda z, t: (z - t) ** 2), targets[:, None]),
        "task": (task_model("regression", num_outputs=1), targets),
        "task, column": (task_model("regression", num_outputs=1), targets[:, None]),
        "tree": (
            linear(1, loss=lambda z, t: squared(z, t["price"]) * t["known"]),
            {"price": targets, "known": np.ones(6, np.float32)},
        ),
    }
    for model, labels in models.values():
        loss, metrics = look(model, labels)
        assert loss == pytest.approx(right, rel=1e-5)
        assert set(metrics) == {"loss"}
    images = RNG.normal(size=(6, 2, 2)).astype(np.float32)
    model = task_model("regression", num_outputs=4, reshape=lambda z: z.reshape(6, 2, 2))
    outputs = X @ np.asarray(model.init(KEY)[0]["kernel"])
    wanted = np.mean((outputs.reshape(6, 2, 2) - images) ** 2)
    assert look(model, images)[0] == pytest.approx(float(wanted), rel=1e-5)


def test_hits_are_counted_of_classes_alone():
    def hinge(outputs, labels):
        return jax.nn.relu(1 - outputs[:, 0] * labels.astype(jnp.float32))

    assert set(look(linear(1, loss=hinge), 2 * (Y % 2) - 1)[1]) == {"loss"}
    several = linear(3, loss=lambda z, t: optax.sigmoid_binary_cross_entropy(z, t).mean(axis=1))
    assert set(look(several, np.eye(3, dtype=np.float32)[Y])[1]) == {"loss"}
    assert set(look(linear(3, loss=heads.cross_entropy), Y)[1]) == {"loss", "accuracy"}
    logits = X @ np.asarray(linear(1).init(KEY)[0]["kernel"])
    loss, metrics = look(task_model("binary", num_outputs=1), Y % 2)
    assert metrics["accuracy"] == pytest.approx(np.mean((logits[:, 0] > 0) == (Y % 2 == 1)))
    signs = np.where(Y % 2 == 1, 1, -1)
    assert loss == pytest.approx(np.mean(np.log1p(np.exp(-signs * logits[:, 0]))), rel=1e-5)


WRONG_TESTS = {
    "floats": (Y / np.float32(2), X, "classification", "classes, which are integers, got float32"),
    "one-hot": (np.eye(3, dtype=np.int32)[Y], X, "classification", r"got \(1, 3\): give .*argmax"),
    "a column": (Y[:, None], X, "classification", r"got \(1, 1\): give labels\[\.\.\., 0\]"),
    "fewer": (Y[:4], X, "classification", r"of shape \(6, 4\) and labels of shape \(4,\)"),
    "more": (np.tile(Y, 2), X, "classification", r"and labels of shape \(12,\)"),
    "none": (Y[:0], X[:0], "classification", "at least one"),
    "targets": (X, X, "regression", r"outputs \(1, 3\) and labels \(1, 4\)"),
}


@pytest.mark.parametrize("name", WRONG_TESTS)
def test_labels_of_a_test_that_do_not_fit_are_refused(name):
    labels, inputs, task, sentence = WRONG_TESTS[name]
    look_ = evaluation.evaluate(linear(), PLAIN, task=task)
    test = evaluation.TestSet(jnp.asarray(inputs), jnp.asarray(labels))
    with (
        jax.numpy_rank_promotion("allow"),
        pytest.raises(ValueError, match=sentence) as caught,
    ):
        jax.eval_shape(look_, linear().init(KEY)[0], {}, test)
    assert len(str(caught.value).splitlines()) == 1


def test_a_label_that_is_no_class_makes_a_test_nan_and_booleans_are_classes():
    model = task_model("binary", num_outputs=1)
    test_fn = jax.jit(evaluation.evaluate(model, PLAIN, task="binary"))

    def score(labels):
        test = evaluation.TestSet(jnp.asarray(X), jnp.asarray(labels))
        return evaluation.scores(test_fn(*jax.jit(model.init)(KEY), test), labels, task="binary")

    assert score(Y > 0) == score((Y > 0).astype(np.int32))
    assert np.isnan(score(Y).loss)
    assert np.isnan(score(2 * (Y > 0) - 1).loss)
    none = jnp.float32(0)
    nothing = evaluation.Evaluation(none, none, none, none)
    with pytest.raises(ValueError, match="at least one label, and all of these are negative"):
        evaluation.scores(nothing, np.full((2, 3), -1), task="sequence")


def prepare(model, population, *, num_clients=None, draw=None, **changes):
    """Make a round of FedAvg, and the simulation that it starts from."""
    batcher = batching.epochs(num_epochs=1, batch_size=2, preprocess=PLAIN)
    shared = protocol.Protocol(num_rounds=1, batcher=batcher, optimizer=optax.sgd(0.1), **changes)
    given_ = task.make(model, shared, inputs=facts.float_inputs((4,)))
    algorithm = fedavg.build(fedavg.FedAvg(), given_)
    number = len(population.offsets) - 1
    run = simulation.start(algorithm, *jax.jit(model.init)(KEY), num_clients=num_clients or number)
    advance = simulation.advance(algorithm.stages[0], draw or sampling.all_clients(number))
    return jax.jit(advance), run


def made(model, population, **options):
    advance, run = prepare(model, population, **options)
    return advance(KEY, run, population)


def trace(model, population, **options):
    advance, run = prepare(model, population, **options)
    return jax.eval_shape(advance, KEY, run, population)


def test_a_client_with_a_label_that_is_no_class_is_left_out_and_counted():
    def people(labels):
        examples = {"inputs": np.concatenate([X, X]), "labels": np.concatenate([Y, labels])}
        return partitions.population(examples, [np.arange(6), np.arange(6, 12)])

    empty = people(Y)._replace(offsets=jnp.array([0, 6, 6], jnp.int32))
    play, run = prepare(linear(), empty)
    right, _ = play(KEY, run, empty)
    for labels in (Y + 1, np.where(Y == 0, 255, Y), Y - 1):
        got, metrics = play(KEY, run, people(labels))
        assert int(metrics.num_rejected) == 1
        np.testing.assert_array_equal(got.state.params["kernel"], right.state.params["kernel"])


def test_a_population_without_examples_trains_and_changes_nothing():
    people = partitions.population({"inputs": X, "labels": Y}, [[], []])
    run, metrics = made(linear(), people)
    np.testing.assert_array_equal(run.state.params["kernel"], linear().init(KEY)[0]["kernel"])
    assert float(metrics.train["loss"].weight) == 0


def test_targets_may_be_a_tree():
    labels = {"price": X[:, 0], "known": (Y > 0)}
    people = partitions.population({"inputs": X, "labels": labels}, [np.arange(6)])
    model = linear(1, loss=lambda z, t: squared(z, t["price"]) * t["known"].astype(jnp.float32))
    trace(model, people)
    with pytest.raises(ValueError, match="labels must be one array, got dict"):
        trace(linear(1, reshape=lambda z: jnp.concatenate([z, z], 1)), people)


WRONG: dict[str, tuple[Any, str]] = {
    "complex": ({"w": jnp.zeros(2, jnp.complex64)}, "'w' is complex64, along whose imaginary"),
    "integers": ({"a": {"w": jnp.zeros(2, jnp.int32)}}, "'a/w' is int32: keep .* in the state"),
    "booleans": ({"w": jnp.zeros(2, bool)}, "floating numbers, but 'w' is bool"),
    "one large leaf": ({"w": jax.ShapeDtypeStruct((2**16, 2**15), np.float32)}, "2147483648 in"),
    "many leaves": (
        {f"w{i}": jax.ShapeDtypeStruct((2**30,), np.float32) for i in range(3)},
        "at most 2147483647 parameters, got 3221225472, of which 1073741824 in 'w0'",
    ),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_parameters_that_cannot_be_trained_or_counted_are_refused(name):
    params, sentence = WRONG[name]
    with pytest.raises(ValueError, match=sentence):
        parameters.check(params, {})
    model = linear()._replace(
        init=lambda key: (jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params), {})
    )
    with pytest.raises(ValueError, match=sentence):
        facts.of_model(model, inputs=facts.float_inputs((4,)))
    algorithm = dip()(setup())
    with pytest.raises(ValueError, match=sentence):
        simulation.start(algorithm, params, STATE, num_clients=6)


def test_a_complex_state_is_refused_and_numbers_are_arrays():
    algorithm = dip()(setup())
    with pytest.raises(ValueError, match="state of a network must be real, but 'fft' is complex64"):
        simulation.start(
            algorithm, quadratic.PARAMS, {"fft": jnp.zeros(2, jnp.complex64)}, num_clients=6
        )
    parameters.check({"scale": 1.0, "kernel": np.zeros((2, 2), np.float32)}, {"count": 3})


def test_a_network_whose_output_is_not_one_array_of_numbers_is_refused(tmp_path):
    data = stub.data()
    for change, sentence in (
        (lambda z: (z, z), "the network gives a tuple, and must give one array"),
        (lambda z: (z > 0).astype(jnp.int32), "its output is int32, and needed are real numbers"),
        (lambda z: z[..., 0], r"its output has the shape \(1,\), and needed is \(1, 4\)"),
    ):
        model = (
            lambda key: {"kernel": jnp.zeros((4, 4))},
            lambda params, x, change=change: change(x @ params["kernel"]),
        )
        with pytest.raises(ConfigError, match=sentence):
            fjp.run(method="fedavg", model=model, data=data, folder=tmp_path / "r")
    model = (lambda key: {"w": jnp.zeros((4, 4), jnp.complex64)}, lambda p, x: jnp.abs(x @ p["w"]))
    with pytest.raises(ConfigError, match="parameters must be real, but 'w' is complex64"):
        fjp.run(method="fedavg", model=model, data=data, folder=tmp_path / "r")


PEOPLE = partitions.population({"inputs": X, "labels": Y}, [[0, 1], [2], [3, 4, 5]])
WIRE = uplinks.error_feedback(uplinks.top_k(fraction=0.5))
POOL = sampling.with_dropout(sampling.uniform(num_clients=4, cohort_size=2), probability=0.5)


def test_whoever_is_drawn_and_is_no_client_is_a_filling_slot():
    def draw(key):
        return jnp.array([4, -3, 1, 2]), jnp.array([True, True, True, False])

    ids, present = simulation.drawing(draw, num_clients=3)(KEY, jnp.int32(0))
    assert ids.tolist() == [-1, -1, 1, 2]  # -1 is charged for nothing, as `ledger.received` says
    assert present.tolist() == [False, False, True, False]


def test_numbers_of_clients_that_disagree_are_refused():
    for draw in (
        POOL,
        sampling.same_every_round(KEY, POOL),
        sampling.weighted([1, 0, 1, 1], cohort_size=1),
        sampling.all_clients(4),
    ):
        with pytest.raises(ValueError, match="drawn from 4 clients, but the population has 3"):
            trace(linear(), PEOPLE, draw=draw)
    with pytest.raises(ValueError, match="drawn from 2 clients, but the population has 3"):
        trace(linear(), PEOPLE, draw=sampling.all_clients(2))
    with pytest.raises(ValueError, match="drawn from 4 clients, but the population has 3"):
        simulation.drawing(POOL, num_clients=3)
    for number in (2, 4):
        with pytest.raises(ValueError, match=f"num_clients={number}, but the population has 3"):
            trace(linear(), PEOPLE, num_clients=number, uplink=WIRE)
    wrong: Any
    for wrong, sentence in ((0, "at least 1"), (2.0, "whole number"), (True, "whole number")):
        with pytest.raises(ValueError, match=f"num_clients must be .*{sentence}"):
            simulation.start(dip()(setup()), quadratic.PARAMS, STATE, num_clients=wrong)
        with pytest.raises(ValueError, match=f"(cohort_size|num_clients) must be .*{sentence}"):
            sampling.uniform(num_clients=4, cohort_size=wrong)
        with pytest.raises(ValueError, match=f"(cohort_size|num_clients) must be .*{sentence}"):
            sampling.all_clients(wrong)
    with pytest.raises(ValueError, match="client_id must be less than 3, got 3"):
        server_work.examples_of(3)(PEOPLE)
    with pytest.raises(ValueError, match="the server has no examples of its own: set `server"):
        server_work.server_examples()(PEOPLE)
    data = {"inputs": X, "labels": Y}
    for rows, sentence in (([2, 6], "indices in .0, 6., got 2 to 6"), ([0.5], "integers, but")):
        with pytest.raises(DataError, match=f"held must hold {sentence}"):
            partitions.population(data, [[0, 1]], held=rows)


def own(ids, present=None):
    given_ = jnp.ones(len(ids), bool) if present is None else present
    return lambda key: (ids, given_)


def test_of_a_draw_of_ones_own_only_clients_are_present():
    wanted, _ = made(linear(), PEOPLE, draw=own(jnp.array([0, 2])), uplink=WIRE)
    got, metrics = made(linear(), PEOPLE, draw=own(jnp.array([7, 0, 2, -1, 3])), uplink=WIRE)
    assert metrics.participated.tolist() == [False, True, True, False, False]
    assert int(metrics.num_participating) == 2
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-6)
    trace(linear(), PEOPLE, draw=own(np.arange(3), np.ones(3, bool)))
    for draw, sentence in (
        (lambda key: jnp.arange(3), r"give \(client_ids, present\), got"),
        (own(jnp.arange(3.0)), "ids that are integers, got float32"),
        (own(jnp.arange(3), jnp.ones(3)), "ids and booleans"),
        (own(jnp.arange(3), jnp.ones(2, bool)), r"int32 \(3,\) and bool \(2,\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            trace(linear(), PEOPLE, draw=draw)


def test_a_client_that_is_drawn_twice_counts_twice():
    twice, metrics = made(linear(), PEOPLE, draw=own(jnp.array([1, 1])))
    assert int(metrics.num_participating) == 2
    assert float(metrics.train["loss"].weight) == 2
    start = linear().init(KEY)[0]["kernel"]
    grads = jax.grad(lambda k: heads.cross_entropy(X[2:3] @ k, jnp.asarray(Y[2:3]))[0])(start)
    np.testing.assert_allclose(twice.state.params["kernel"], start - 0.1 * grads, rtol=1e-5)


BATCHERS = {
    "epochs": batching.epochs(num_epochs=2, batch_size=2, preprocess=PLAIN),
    "steps": batching.steps(num_steps=3, batch_size=3, preprocess=PLAIN),
    "development": batching.development(KEY, share=0.5, batch_size=2, preprocess=PLAIN),
    "undeveloped": batching.undeveloped(KEY, share=0.5, batch_size=2, preprocess=PLAIN),
}
NUM_ROWS = 5  # in all, so that nothing is compiled for each population
INDEX = st.integers(-2, 8) | st.sampled_from([2**31, 2**32, -(2**31)])
CONTAINERS = st.sampled_from([list, tuple, np.array, lambda x: np.array(x, np.float64)])


@jax.jit
def see(population):
    """Give the batches ``[batchers, clients, steps, B]`` of every client."""

    def client(number):
        data = types.client_data(population, number)
        steps = jnp.arange(12, dtype=jnp.int32)
        return {
            name: (one.num_steps(data), jax.vmap(lambda i, one=one: one.batch(KEY, data, i))(steps))
            for name, one in BATCHERS.items()
        }

    return jax.lax.map(client, jnp.arange(3, dtype=jnp.int32))


@st.composite
def populations(draw):
    """Draw the rows of three clients, of any kind; those that are all integers can be taken."""
    rows = draw(st.lists(INDEX, min_size=NUM_ROWS, max_size=NUM_ROWS))
    if draw(st.booleans()):
        rows = [row % 6 for row in rows]
    cuts = sorted(draw(st.lists(st.integers(0, NUM_ROWS), min_size=2, max_size=2)))
    return [draw(CONTAINERS)(part.tolist()) for part in np.split(np.array(rows), cuts)]


def test_any_population_that_is_taken_trains_on_its_own_rows_alone():
    inputs = np.arange(24, dtype=np.float32).reshape(6, 4) / 24
    examples = {"inputs": inputs, "labels": np.arange(6)}
    model = linear(6)
    play, run = prepare(model, partitions.population(examples, [[0] * NUM_ROWS, [], []]))

    @settings(max_examples=100, deadline=None)
    @given(populations())
    def check(parts):
        rows = [list(part) for part in parts]
        is_whole = all(np.size(part) == 0 or np.asarray(part).dtype.kind in "ui" for part in parts)
        if not is_whole or not all(0 <= row < 6 for part in rows for row in part):
            with pytest.raises(fjp.DataError):
                partitions.population(examples, parts)
            return
        people = partitions.population(examples, parts)
        for name, (num_steps, batch) in jax.device_get(see(people)).items():
            np.testing.assert_array_equal(batch.inputs, inputs[batch.labels])
            for client, own_rows in enumerate(rows):
                steps = slice(int(num_steps[client]))
                seen = batch.labels[client, steps][batch.weights[client, steps] > 0].tolist()
                assert set(seen) <= set(own_rows), name
                if name == "epochs":
                    assert sorted(seen) == sorted([*own_rows, *own_rows])
        after, metrics = play(KEY, run, people)
        assert int(metrics.num_rejected) == 0
        assert int(metrics.train["loss"].weight) == NUM_ROWS
        assert np.isfinite(after.state.params["kernel"]).all()

    check()


def test_a_token_that_the_network_does_not_know_makes_its_example_nan():
    model = lstm.char_lstm(input_shape=(3,), num_classes=4, hidden_sizes=(4,))
    params, state = jax.jit(model.init)(KEY)
    tokens = jnp.array([[0, 1, 3], [0, 4, 3], [-1, 1, 3]], jnp.int32)
    logits = np.asarray(jax.jit(model.predict)(params, state, tokens))
    assert np.isnan(logits).any(axis=1).tolist() == [False, True, True]
