"""Laws of one delta to new parameters, over every server."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks as masks_lib
from fedjaxprune.federated import server_optimizers
from tests import draws

PARAMS = {"w": draws.normal(0, 4, 3), "b": jnp.array([0.5, -1.0, 2.0])}
DELTA = {"w": draws.normal(1, 4, 3), "b": jnp.array([0.1, 0.2, -0.3])}
MASKS = {"w": draws.flags(2, 4, 3, probability=0.5), "b": jnp.ones(3, jnp.bool_)}
SERVERS = {
    "fedavg": server_optimizers.fedavg,
    "fedavgm": lambda: server_optimizers.fedavgm(learning_rate=0.5, momentum=0.9),
    "fedadam": lambda: server_optimizers.fedadam(learning_rate=0.1),
    "fedyogi": lambda: server_optimizers.fedyogi(learning_rate=0.1),
}


def run(server, deltas, params=PARAMS):
    step = jax.jit(
        lambda delta, state, params: server_optimizers.step(server, delta, state, params)
    )
    state = server_optimizers.init(server, params)
    for delta in deltas:
        params, state = step(delta, state, params)
    return params, state


@pytest.mark.parametrize("name", sorted(SERVERS))
def test_a_step_keeps_structures_and_dtypes(name):
    server = SERVERS[name]()
    params, state = run(server, [DELTA, DELTA])
    chex.assert_trees_all_equal_shapes_and_dtypes(params, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, server_optimizers.init(server, PARAMS))


@pytest.mark.parametrize("name", sorted(SERVERS))
def test_parameters_move_in_the_direction_of_the_delta(name):
    params, _ = run(SERVERS[name](), [DELTA])
    moved = jax.tree.map(lambda new, old: jnp.sign(new - old), params, PARAMS)
    chex.assert_trees_all_equal(moved, jax.tree.map(jnp.sign, DELTA))


@pytest.mark.parametrize("name", sorted(SERVERS))
def test_no_delta_from_the_start_is_no_move(name):
    zeros = jax.tree.map(jnp.zeros_like, DELTA)
    params, _ = run(SERVERS[name](), [zeros, zeros])
    chex.assert_trees_all_equal(params, PARAMS)


def test_fedavg_adds_the_mean_delta_exactly():
    params, _ = run(server_optimizers.fedavg(), [DELTA])
    chex.assert_trees_all_equal(params, jax.tree.map(jnp.add, PARAMS, DELTA))


def test_fedavgm_adds_a_decaying_sum():
    params, _ = run(server_optimizers.fedavgm(learning_rate=0.5, momentum=0.9), [DELTA, DELTA])
    expected = jax.tree.map(lambda p, d: p + 0.5 * (d + (1.0 + 0.9) * d), PARAMS, DELTA)
    chex.assert_trees_all_close(params, expected, rtol=1e-6)


def test_fedadam_takes_the_closed_form_of_two_steps():
    params, _ = run(server_optimizers.fedadam(learning_rate=0.1), [DELTA, DELTA])
    step = jax.tree.map(lambda d: 0.1 * d / (jnp.abs(d) + 1e-3), DELTA)  # bias corrected
    expected = jax.tree.map(lambda p, s: p + 2.0 * s, PARAMS, step)
    chex.assert_trees_all_close(params, expected, rtol=1e-5)


def test_fedyogi_takes_the_closed_form_of_two_steps():
    params, _ = run(server_optimizers.fedyogi(learning_rate=0.1), [DELTA, DELTA])

    def leaf(param, delta):
        # the second moment grows by (1 - b2) * delta ** 2 as long as it is smaller than delta ** 2
        first = delta / (jnp.abs(delta) + 1e-3)
        second = delta / (jnp.sqrt(2 * 0.01 / (1 - 0.99**2)) * jnp.abs(delta) + 1e-3)
        return param + 0.1 * (first + second)

    chex.assert_trees_all_close(params, jax.tree.map(leaf, PARAMS, DELTA), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(SERVERS))
def test_the_server_forgets_what_is_pruned_and_nothing_else(name):
    server = SERVERS[name]()
    spoilt = jax.tree.map(lambda d, m: jnp.where(m, d, jnp.full_like(d, jnp.nan)), DELTA, MASKS)
    _, clean = run(server, [masks_lib.apply(MASKS, DELTA)] * 2)
    _, state = run(server, [spoilt] * 2)
    forget = jax.jit(lambda state: server_optimizers.zero_pruned(server, state, MASKS))
    state, clean = forget(state), forget(clean)
    chex.assert_trees_all_equal(state, clean)
    memories = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == PARAMS["w"].shape]
    assert len(memories) == {"fedavg": 0, "fedavgm": 1, "fedadam": 2, "fedyogi": 2}[name]
    for memory in memories:
        np.testing.assert_array_equal(memory[~MASKS["w"]], 0.0)
        assert np.all(memory[MASKS["w"]] != 0.0)


@pytest.mark.parametrize("name", sorted(SERVERS))
def test_a_forgotten_weight_stays_where_no_delta_moves_it(name):
    server = SERVERS[name]()
    _, state = run(server, [DELTA] * 3)
    state = server_optimizers.zero_pruned(server, state, MASKS)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    params, _ = server_optimizers.step(server, zeros, state, masks_lib.apply(MASKS, PARAMS))
    np.testing.assert_array_equal(params["w"][~MASKS["w"]], 0.0)


@pytest.mark.parametrize("name", sorted(SERVERS))
def test_to_forget_everything_is_to_start_anew_but_for_the_count(name):
    server = SERVERS[name]()
    _, state = run(server, [DELTA])
    nothing = jax.tree.map(jnp.zeros_like, MASKS)
    forgotten = jax.tree.leaves(server_optimizers.zero_pruned(server, state, nothing))
    fresh = jax.tree.leaves(server_optimizers.init(server, PARAMS))
    for after, start in zip(forgotten, fresh, strict=True):
        if start.ndim:
            np.testing.assert_array_equal(after, start)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: server_optimizers.fedavg(learning_rate=0.0),
            "learning_rate must be positive, got 0.0",
        ),
        (
            lambda: server_optimizers.fedavgm(learning_rate=1.0, momentum=1.0),
            r"momentum must lie in \[0, 1\), got 1.0",
        ),
        (
            lambda: server_optimizers.fedadam(learning_rate=1.0, b2=-0.1),
            r"b2 must lie in .*, got -0.1",
        ),
        (
            lambda: server_optimizers.fedyogi(learning_rate=1.0, eps=0.0),
            "eps must be positive, got 0.0",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "server",
    [
        optax.masked(optax.adam(0.1), {"bias": False, "kernel": True}),
        optax.adafactor(0.1, min_dim_size_to_factor=2),
        optax.adamw(0.1, weight_decay=0.1),
        optax.lion(0.01),
    ],
    ids=["masked", "adafactor", "adamw", "lion"],
)
def test_memory_of_any_optax_server_keeps_its_shape_and_forgets_what_is_pruned(server):
    params = {"bias": jnp.ones([4]), "kernel": jnp.ones([6, 4])}
    masks = {"bias": jnp.ones([4], bool), "kernel": jnp.arange(24).reshape(6, 4) % 3 == 0}
    delta = jax.tree.map(lambda leaf: 0.5 * leaf, params)

    @jax.jit
    def play():
        start = server_optimizers.init(server, params)
        _, state = server_optimizers.step(server, delta, start, params)
        return state, server_optimizers.zero_pruned(server, state, masks)

    state, cleaned = play()
    chex.assert_trees_all_equal_shapes_and_dtypes(cleaned, state)
    for leaf in jax.tree.leaves(cleaned):
        if leaf.shape == (6, 4):
            assert not np.any(np.asarray(leaf)[~np.asarray(masks["kernel"])])
