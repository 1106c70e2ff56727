"""Networks of other libraries, as values: they train, predict, and keep their state."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjaxprune import masks, trees
from fedjaxprune.models import outside
from fedjaxprune.types import Batch, Model

KEY = jax.random.key(0)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


class Nnx(nnx.Module):
    def __init__(self, *, rngs):
        self.hidden = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


class Plain(eqx.Module):
    hidden: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    out: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.hidden = eqx.nn.Linear(6, 8, key=first)
        self.dropout = eqx.nn.Dropout(0.5)
        self.out = eqx.nn.Linear(8, 3, key=second)

    def __call__(self, x, *, key=None):
        return self.out(self.dropout(jax.nn.relu(self.hidden(x)), key=key))


class Normed(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    out: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.hidden = eqx.nn.Linear(6, 8, key=first)
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
        self.out = eqx.nn.Linear(8, 3, key=second)

    def __call__(self, x, state):
        x, state = self.norm(self.hidden(x), state)
        return self.out(jax.nn.relu(x)), state


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        attention = nn.MultiHeadDotProductAttention(num_heads=2)
        x = x + attention(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
        x = x + nn.Dense(8)(nn.relu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(11)(x)


def plain_init(key):
    return {"kernel": jax.random.normal(key, (6, 3))}


CASES = {
    "linen": (Linen(), True),
    "nnx": (lambda rngs: Nnx(rngs=rngs), True),
    "equinox": (lambda key: Plain(key), False),
    "equinox_with_state": (lambda key: eqx.nn.make_with_state(Normed)(key), True),
    "functions": ((plain_init, lambda params, inputs: inputs @ params["kernel"]), False),
}


def batch(size=5):
    rng = np.random.default_rng(0)
    return Batch(
        inputs=jnp.asarray(rng.normal(size=(size, 6)), jnp.float32),
        labels=jnp.asarray(rng.integers(0, 3, size), jnp.int32),
        weights=jnp.ones(size),
    )


@pytest.mark.parametrize("name", CASES)
def test_a_network_trains_predicts_and_keeps_its_state(name):
    value, has_state = CASES[name]
    model = outside.as_model(value, input_shape=(6,))
    params, state = jax.jit(model.init)(KEY)
    assert bool(jax.tree.leaves(state)) is has_state
    assert all(
        masks.is_kernel(p, leaf) or leaf.ndim < 2
        for p, leaf in zip(trees.paths(params), jax.tree.leaves(params), strict=True)
    )
    step = jax.jit(jax.value_and_grad(model.loss, has_aux=True))
    (loss, (after, seen)), grads = step(params, state, batch(), KEY)
    assert np.isfinite(loss)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(grads))
    changed = [
        bool(jnp.any(a != b))
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True)
    ]
    assert any(changed) is has_state
    assert float(seen["loss"].weight) == 5.0
    logits = jax.jit(model.predict)(params, state, batch().inputs)
    assert logits.shape == (5, 3)
    alone = jax.jit(model.predict)(params, state, batch().inputs[:2])
    np.testing.assert_allclose(logits[:2], alone, rtol=1e-5, atol=1e-6)


def test_a_seed_decides_a_network_and_dropout_draws_anew():
    model = outside.as_model(lambda key: Plain(key), input_shape=(6,))
    one, other = (model.init(jax.random.key(seed))[0] for seed in (0, 1))
    assert bool(jnp.any(one["hidden"]["weight"] != other["hidden"]["weight"]))
    losses = {
        float(jax.jit(model.loss)(one, {}, batch(), jax.random.key(seed))[0]) for seed in range(4)
    }
    assert len(losses) > 1


@pytest.mark.slow
def test_a_transformer_reads_tokens():
    model = outside.as_model(Transformer(), input_shape=(4,), input_dtype=jnp.int32)
    params, state = jax.jit(model.init)(KEY)
    tokens = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]], jnp.int32)
    loss, _ = jax.jit(model.loss)(params, state, Batch(tokens, tokens, jnp.ones(2)), KEY)
    assert np.isfinite(loss)
    assert model.predict(params, state, tokens).shape == (2, 4, 11)


def test_a_model_is_taken_as_it_is():
    model = Model(init=lambda key: ({}, {}), loss=lambda *_: None, predict=lambda *_: None)  # pyright: ignore
    assert outside.as_model(model, input_shape=(6,)) is model


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (Linen, "the class Linen, which must be called"),
        (Nnx, "the class Nnx, which must be called"),
        (7, "got int"),
        (lambda width, depth: None, "got a function of width, depth"),
        (lambda: None, "got function"),
    ],
)
def test_what_is_no_network_is_one_sentence(value, sentence):
    with pytest.raises(TypeError, match=sentence):
        outside.as_model(value, input_shape=(6,))


def test_one_module_is_no_network_for_every_seed():
    with pytest.raises(TypeError, match="every seed starts from its own"):
        outside.as_model(Plain(KEY), input_shape=(6,))
    with pytest.raises(TypeError, match="every seed starts from its own"):
        outside.as_model(Nnx(rngs=nnx.Rngs(0)), input_shape=(6,))
    with pytest.raises(TypeError, match="must give an Equinox module, got int"):
        outside.as_model(lambda key: 3, input_shape=(6,))
