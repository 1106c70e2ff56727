"""Adapters split what is trained from what is not, and know training from inference."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjaxprune import masks, trees
from fedjaxprune.models import adapters, heads
from fedjaxprune.types import Batch
from tests import draws

KEY = jax.random.key(0)
BATCH = Batch(
    inputs=draws.normal(0, 4, 5),
    labels=jnp.array([0, 1, 2, 0], jnp.int32),
    weights=jnp.array([1.0, 1.0, 1.0, 0.0]),
)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train, mask=None):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(
            x, mask=None if mask is None else mask[:, None]
        )
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x, mask=None):
        x = self.norm(self.first(x), mask=None if mask is None else mask[:, None])
        return self.last(self.dropout(x))


MODELS = {
    "linen": lambda: adapters.from_linen(Linen(), input_shape=(5,)),
    "nnx": lambda: adapters.from_nnx(lambda rngs: Nnx(rngs)),
    "functions": lambda: adapters.from_functions(
        lambda key: {"last": {"kernel": jax.random.normal(key, (5, 3)), "bias": jnp.zeros(3)}},
        lambda params, x: x @ params["last"]["kernel"] + params["last"]["bias"][None],
    ),
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_parameters_are_trained_and_kernels_prunable(name):
    model = MODELS[name]()
    params, state = jax.jit(model.init)(KEY)
    (_, (after, report)), grads = jax.jit(jax.value_and_grad(model.loss, has_aux=True))(
        params, state, BATCH, KEY
    )
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert report["loss"].weight == 3.0
    # What is not trained can be averaged over clients: no random keys, no counters.
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(state))
    assert any(masks.prunable_leaves(params, masks.is_kernel))
    for path, leaf in zip(trees.paths(params), jax.tree.leaves(params), strict=True):
        assert masks.is_kernel(path, leaf) == path.endswith("kernel")
    assert jax.jit(model.predict)(params, after, BATCH.inputs).shape == (4, 3)


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_the_key_feeds_dropout_and_predictions_do_without(name):
    model = MODELS[name]()
    params, state = jax.jit(model.init)(KEY)
    loss = jax.jit(lambda key: model.loss(params, state, BATCH, key)[0])
    assert loss(KEY) == loss(KEY)
    assert loss(KEY) != loss(jax.random.fold_in(KEY, 1))
    first = jax.jit(model.predict)(params, state, BATCH.inputs)
    alone = jax.jit(model.predict)(params, state, BATCH.inputs[:1])
    np.testing.assert_allclose(first[:1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_filling_enters_neither_loss_nor_state(name):
    model = MODELS[name]()
    params, state = jax.jit(model.init)(KEY)
    other = BATCH._replace(inputs=BATCH.inputs.at[3].set(9.0))
    loss = jax.jit(model.loss)
    first, (after, _) = loss(params, state, BATCH, KEY)
    second, (after_other, _) = loss(params, state, other, KEY)
    np.testing.assert_allclose(first, second, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(after_other), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_equal_logits_is_the_logarithm_of_their_number():
    losses = heads.cross_entropy(jnp.zeros((2, 8)), jnp.array([0, 7], jnp.int32))
    np.testing.assert_allclose(losses, np.log(8.0), rtol=1e-6)
