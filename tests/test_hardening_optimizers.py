"""Optimizers that ask for the loss get it, and those that do not fit are refused in a sentence."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, trees
from fedjaxprune.experiment.run import evaluation
from fedjaxprune.federated import early_stopping, local_training, server_optimizers
from fedjaxprune.models import adapters
from fedjaxprune.types import Broadcast, client_data
from tests import quadratic

KEY = jax.random.key(0)
PEOPLE = quadratic.population()
DATA = client_data(PEOPLE, jnp.int32(1))
STATE = {"steps": jnp.float32(0.0)}
MASKS = jax.tree.map(
    lambda leaf: jnp.arange(leaf.size).reshape(leaf.shape) % 3 > 0, quadratic.PARAMS
)
FULL = masks.full(quadratic.PARAMS)
PULL = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.25), quadratic.PARAMS)
STEPS = 4
plateau = optax.contrib.reduce_on_plateau
OPTIMIZERS = {
    "adam": optax.adam(0.1),
    "polyak_sgd": optax.polyak_sgd(),
    "reduce_on_plateau": optax.chain(optax.sgd(1.9), plateau(factor=0.5, patience=1)),
    "momo": optax.contrib.momo(0.1),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
    "multi_steps": optax.MultiSteps(optax.polyak_sgd(), every_k_schedule=1),
}


def broadcast(mask_tree=FULL, correction=()):
    return Broadcast(quadratic.PARAMS, mask_tree, STATE, jnp.int32(0), correction=correction)


def client_of(optimizer, *, steps=STEPS, **options):
    batcher = quadratic.full_batches(steps)
    return local_training.local_sgd(
        quadratic.MODEL.loss, batcher=batcher, optimizer=optimizer, **options
    )


def delta_of(optimizer, given, **options):
    client = client_of(optimizer, **options)
    return jax.jit(lambda: client.update(KEY, given, (), DATA)[0].fields["delta"])()


@pytest.mark.usual("adam", "backtracking", "multi_steps")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_client_follows_optax_own_recipe(name):
    """The loop of optax's manual, with a value of the loss where the optimizer wants one."""
    optimizer = OPTIMIZERS[name]
    if not isinstance(optimizer, optax.MultiSteps):
        optimizer = optax.with_extra_args_support(optimizer)
    batch = quadratic.full_batches(STEPS).batch(KEY, DATA, jnp.int32(0))

    def value_fn(params):
        return quadratic.MODEL.loss(params, STATE, batch, KEY)[0]

    update: Any = optimizer.update

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(value_fn)(params)
        grads = masks.apply(MASKS, grads)
        updates, state = update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
        return masks.apply(MASKS, optax.apply_updates(params, updates)), state

    start = jax.jit(masks.apply)(MASKS, quadratic.PARAMS)
    params, state = start, jax.jit(optimizer.init)(start)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(STEPS):
            params, state = step(params, state)
    expected = jax.tree.map(np.subtract, jax.device_get(params), jax.device_get(start))
    found = delta_of(OPTIMIZERS[name], broadcast(MASKS))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(jax.device_get(found)))


@pytest.mark.parametrize("correction", [(), PULL])
def test_a_line_search_finds_the_known_minimum_under_a_correction_too(correction):
    """A correction `c` moves the minimum of half a squared distance by minus `c`."""
    found = delta_of(optax.lbfgs(), broadcast(FULL, correction), steps=8)
    pull = quadratic.flatten(PULL) if correction else 0.0
    expected = quadratic.mean_point(PEOPLE, 1) - quadratic.flatten(quadratic.PARAMS) - pull
    np.testing.assert_allclose(quadratic.flatten(found), expected, rtol=1e-3, atol=1e-4)


def test_clients_side_by_side_and_explorers_may_ask_for_the_loss():
    client = client_of(OPTIMIZERS["backtracking"], steps=2)

    def one(client_id):
        data = client_data(PEOPLE, client_id)
        return client.update(KEY, broadcast(MASKS), (), data)[0].fields["delta"]

    ids = jnp.arange(2, dtype=jnp.int32)
    both = jax.jit(jax.vmap(one))(ids)
    for i in range(2):
        alone = quadratic.flatten(jax.jit(one)(ids[i]))
        np.testing.assert_allclose(
            quadratic.flatten(trees.take_rows(both, i)), alone, rtol=1e-4, atol=1e-5
        )
    explorer = early_stopping.until_no_improvement(
        quadratic.MODEL.loss,
        epoch=quadratic.full_batches(1),
        optimizer=optax.polyak_sgd(),
        max_epochs=3,
        patience=3,
    )
    delta = jax.jit(lambda: explorer.update(KEY, broadcast(), (), DATA)[0].fields["delta"])()
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(delta))


def asking(updates, state, params=None, *, hessian, **extra):
    return updates, state


ASK: Any = asking
ASKING = optax.GradientTransformationExtraArgs(lambda params: (), ASK)
SUMMING = optax.GradientTransformation(
    lambda params: (), lambda updates, state, params=None: (jax.tree.map(jnp.sum, updates), state)
)
GROWING = optax.GradientTransformation(
    lambda params: {"seen": jnp.zeros(1)},
    lambda updates, state, params=None: (updates, {"seen": jnp.zeros(2)}),
)
LISTING = optax.GradientTransformation(
    lambda params: (), lambda updates, state, params=None: (updates, [state])
)
SCHEDULE_FREE = optax.contrib.schedule_free_sgd(0.1)
REFUSED = [
    (optax.chain(optax.lookahead(optax.sgd(0.1), 5, 0.5)), ValueError, "trains two copies"),
    (optax.chain(SCHEDULE_FREE), ValueError, "trains other parameters"),
    (ASKING, ValueError, "asks for 'hessian'"),
    (SUMMING, ValueError, "gives an update, which must have shape (4,) at dense/bias, got ()."),
    (GROWING, ValueError, "init` makes it, but 'seen' was float32[1] and is float32[2] after a"),
    (LISTING, ValueError, "must keep its state as its `init` makes it, got another structure"),
    (optax.sgd, TypeError, "must be an optax optimizer, such as optax.sgd(0.1), got sgd"),
    (0.1, TypeError, "must be an optax optimizer, such as optax.sgd(0.1), got float"),
]


AWAY = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
OF_CLIENTS = [
    (optax.contrib.sam(optax.sgd(0.1), AWAY), "does not take 'value', though optax's type"),
    (
        optax.contrib.sam(optax.sgd(0.1), AWAY, opaque_mode=True),
        "does not take 'value', though optax's type",
    ),
    (optax.contrib.sophia(0.1), "asks for 'obj_fn', and is given gradients, parameters and value"),
]


@pytest.mark.parametrize(("optimizer", "sentence"), OF_CLIENTS)
def test_an_optimizer_that_needs_more_of_the_loss_is_one_sentence(optimizer, sentence):
    client = client_of(optimizer)
    with pytest.raises(ValueError, match=f"^the local optimizer {sentence}"):
        jax.eval_shape(lambda: client.update(KEY, broadcast(), (), DATA)[0])


@pytest.mark.parametrize(("optimizer", "error", "sentence"), REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_that_does_not_fit_is_one_sentence(optimizer, error, sentence):
    with pytest.raises(error) as caught:
        delta_of(optimizer, broadcast())
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("the local optimizer ")

    def serve():
        state = server_optimizers.init(optimizer, quadratic.PARAMS)
        return server_optimizers.step(optimizer, PULL, state, quadratic.PARAMS)

    with pytest.raises(error) as caught:
        serve()
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("the server's optimizer ")


def test_a_server_knows_no_loss():
    server = optax.chain(optax.sgd(1.0), plateau())
    state = server_optimizers.init(server, quadratic.PARAMS)
    with pytest.raises(ValueError, match="asks for 'value', and is given gradients"):
        server_optimizers.step(server, PULL, state, quadratic.PARAMS)


def test_an_error_of_an_optimizer_of_ones_own_stays_what_it_is():
    def broken(updates, state, params=None):
        return updates + "x", state

    optimizer = optax.GradientTransformation(lambda params: (), broken)
    with pytest.raises(TypeError, match="unsupported operand"):
        delta_of(optimizer, broadcast())


def test_several_inputs_are_tested():
    model = adapters.from_functions(
        lambda key: {"kernel": jnp.eye(3), "table": jnp.eye(5, 3)},
        lambda params, x: x["dense"] @ params["kernel"] + params["table"][x["token"]],
    )
    rng = np.random.default_rng(0)
    inputs = {
        "dense": jnp.asarray(rng.normal(size=(7, 3)), jnp.float32),
        "token": jnp.asarray(rng.integers(0, 5, 7), jnp.int32),
    }
    logits = np.asarray(inputs["dense"]) + np.eye(5, 3)[np.asarray(inputs["token"])]
    labels = logits.argmax(axis=1)
    labels[:2] = (labels[:2] + 1) % 3
    test = evaluation.TestSet(inputs, jnp.asarray(labels, jnp.int32))
    look = jax.jit(evaluation.evaluate(model, lambda key, x: x, batch_size=4))
    found = evaluation.scores(look(*model.init(KEY), test), labels)
    chosen = logits[np.arange(7), labels]
    assert found.accuracy == 5 / 7
    np.testing.assert_allclose(
        found.loss, np.mean(np.log(np.exp(logits).sum(axis=1)) - chosen), rtol=1e-5
    )
