"""Sequences are inputs like any other: tokens in, one label or one at each position."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import masks, trees
from fedjaxprune.models import heads, lstm
from fedjaxprune.types import Batch
from tests import draws

KEY = jax.random.key(0)


def tiny(labels: lstm.Labels = "last"):
    return lstm.char_lstm(
        input_shape=(7,), num_classes=5, embedding_size=3, hidden_sizes=(4, 6), labels=labels
    )


def test_the_memory_is_flaxs():
    x = draws.normal(0, 2, 6, 3)
    module = lstm.Lstm(4)
    params: Any = jax.jit(module.init)(KEY, x)["params"]
    theirs = {}
    for n, name in enumerate("ifgo"):
        part = slice(4 * n, 4 * n + 4)
        bias = params["input"]["bias"] + params["recurrent"]["bias"]
        theirs[f"i{name}"] = {"kernel": params["input"]["kernel"][:, part]}
        theirs[f"h{name}"] = {"kernel": params["recurrent"]["kernel"][:, part], "bias": bias[part]}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        rnn = nn.RNN(nn.OptimizedLSTMCell(4, name="cell"))
        expected: Any = jax.jit(rnn.apply)({"params": {"cell": theirs}}, x)
    got: Any = jax.jit(module.apply)({"params": params}, x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_kernels_of_input_and_recurrence_are_prunable_and_the_embedding_is_not():
    params, state = jax.jit(tiny().init)(KEY)
    assert state == {}
    flags = masks.prunable_leaves(params, masks.is_kernel)
    assert [path for path, flag in zip(trees.paths(params), flags, strict=True) if flag] == [
        "dense_1/kernel",
        "lstm_1/input/kernel",
        "lstm_1/recurrent/kernel",
        "lstm_2/input/kernel",
        "lstm_2/recurrent/kernel",
    ]


@pytest.mark.usual("uint8")
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_one_label_an_example(dtype):
    model = tiny()
    params, state = jax.jit(model.init)(KEY)
    batch = Batch(
        inputs=jax.random.randint(KEY, (3, 7), 0, 5).astype(dtype),
        labels=jnp.array([0, 4, 1], jnp.int32),
        weights=jnp.array([1.0, 1.0, 0.0]),
    )
    assert jax.jit(model.predict)(params, state, batch.inputs).shape == (3, 5)
    step = jax.jit(jax.value_and_grad(model.loss, has_aux=True))
    (loss, (_, report)), grads = step(params, state, batch, KEY)
    assert report["loss"].weight == 2.0
    np.testing.assert_allclose(loss, report["loss"].total / 2.0, rtol=1e-6)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads))


def test_the_last_position_is_one_of_every():
    last, every = tiny(), tiny("every")
    params, state = jax.jit(last.init)(KEY)
    tokens = jax.random.randint(KEY, (3, 7), 0, 5)
    np.testing.assert_allclose(
        jax.jit(last.predict)(params, state, tokens),
        jax.jit(every.predict)(params, state, tokens)[:, -1],
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_loss_is_the_mean_over_labels_and_negative_ones_do_not_count():
    model = tiny("every")
    params, state = jax.jit(model.init)(KEY)
    tokens = jax.random.randint(KEY, (3, 7), 0, 5)
    labels = jnp.roll(tokens, -1, axis=1).at[:, -1].set(-1).at[0, 3:].set(-1)
    batch = Batch(inputs=tokens, labels=labels, weights=jnp.array([1.0, 1.0, 0.0]))
    loss, (_, report) = jax.jit(model.loss)(params, state, batch, KEY)
    logits = np.asarray(jax.nn.log_softmax(jax.jit(model.predict)(params, state, tokens)))
    losses = [
        -logits[b, t, labels[b, t]] for b in range(2) for t in range(7) if int(labels[b, t]) >= 0
    ]
    assert len(losses) == 3 + 6
    assert report["loss"].weight == report["accuracy"].weight == 9.0
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)


def test_the_cross_entropy_of_sequences_is_that_of_their_positions():
    logits = draws.normal(0, 2, 3, 4)
    labels = jnp.array([[0, 1, 2], [3, 2, 1]], jnp.int32)
    losses = jax.jit(heads.cross_entropy)
    flat = losses(logits.reshape(6, 4), labels.ravel())
    np.testing.assert_array_equal(losses(logits, labels).ravel(), flat)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (32, 32, 3)}, r"sequences of tokens .* got .*\(32, 32, 3\)"),
        ({"hidden_sizes": (8, 0)}, "hidden_sizes must be positive"),
        ({"labels": "all"}, "labels must be .*'all'"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lstm.char_lstm(**{"input_shape": (7,), "num_classes": 5, **options})


def test_numbers_that_are_no_tokens_are_refused():
    model = tiny()
    params, state = jax.jit(model.init)(KEY)
    with pytest.raises(ValueError, match="integers, got float32"):
        model.predict(params, state, jnp.ones((1, 7)))
