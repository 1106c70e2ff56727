"""What clients see of the parameters: vectors of the papers, clocks against histories, lengths."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import masks as masks_lib
from fedjaxprune.federated import downlinks
from fedjaxprune.traffic import Payload
from fedjaxprune.wire import format as wire_format
from tests import draws

KEY = jax.random.key(0)
PARAMS = {
    "layer": {"kernel": draws.normal(1, 3, 5, 4), "bias": jnp.full(3, 0.5)},
    "none_kept": draws.normal(3, 6),
}
MASKS = {
    "layer": {
        "kernel": draws.flags(4, 3, 5, 4, probability=0.4),
        "bias": jnp.ones(3, jnp.bool_),
    },
    "none_kept": jnp.zeros(6, jnp.bool_),
}
DOWNLINKS = {
    "top_k": downlinks.top_k(fraction=0.3),
    "changes": downlinks.top_k(fraction=1.0),
    "quantize": downlinks.quantize(bits=3),
}
JITTED = {name: jax.jit(one.update) for name, one in DOWNLINKS.items()}
THIRDS = 0.666667
ROUND_TRIP = jax.jit(downlinks.quantize(bits=8).update)


def due(downlink, state, held):
    assert downlink.due is not None
    return downlink.due(state, jnp.int32(held))


def bits(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).view(np.uint32), tree)


@pytest.mark.parametrize("name", sorted(DOWNLINKS))
def test_clients_see_a_tree_like_the_parameters_and_zeros_of_what_they_do_not_receive(name):
    downlink, update = DOWNLINKS[name], JITTED[name]
    before = downlink.init(PARAMS)
    seen, after = update(KEY, PARAMS, before, MASKS)
    chex.assert_trees_all_equal_shapes_and_dtypes(seen, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    spoilt = jax.tree.map(lambda p, m: jnp.where(m, p, jnp.full_like(p, jnp.nan)), PARAMS, MASKS)
    again, _ = update(jax.random.key(9), spoilt, before, MASKS)  # no chance, either
    chex.assert_trees_all_equal(bits(again), bits(seen))
    chex.assert_trees_all_equal(bits(seen), bits(masks_lib.apply(MASKS, seen)))


def test_the_largest_changes_are_sent_first():
    """EF21-P's vector: the gap squared is .26, .1, .01, 0; clients begin with zeros."""
    downlink = downlinks.top_k(fraction=0.25)
    wanted = jnp.array([0.6, 0.3, -0.4, 0.1])
    state = downlink.init(wanted)._replace(is_fresh=jnp.bool_(False))
    everything = jnp.ones(4, jnp.bool_)
    for number, (place, gap) in enumerate([(0, 0.26), (2, 0.1), (1, 0.01), (3, 0.0)], start=1):
        before = state.params
        seen, state = downlink.update(KEY, wanted, state, everything)
        assert np.flatnonzero(seen != before).tolist() == [place]
        np.testing.assert_allclose(np.sum(np.square(wanted - seen)), gap, rtol=1e-5, atol=1e-12)
        assert gap <= 0.75**number * 0.62
    again, after = downlink.update(KEY, wanted, state, everything)
    chex.assert_trees_all_equal(again, wanted)
    chex.assert_trees_all_equal(after.clock, state.clock)  # nothing is sent any more


def test_clocks_say_what_a_client_needs_after_missed_rounds():
    """Entries 1 and 4 change, then 1, then 0 and 5, behind a round that sends everything."""
    downlink = DOWNLINKS["changes"]
    params, everything = np.zeros(6, np.float32), jnp.ones(6, jnp.bool_)
    state = downlink.init(jnp.asarray(params))
    for places in ([], [1, 4], [1], [0, 5]):
        params[places] += 1.0
        _, state = downlink.update(KEY, jnp.asarray(params), state, everything)
    assert state.clock.tolist() == [4, 3, 1, 1, 2, 4]
    needed = [int(jnp.sum(due(downlink, state, held))) for held in range(5)]
    assert needed == [6, 4, 3, 2, 0]  # the first holds nothing
    assert downlink.restart is not None
    _, state = downlink.update(KEY, jnp.asarray(params), downlink.restart(state), everything)
    assert np.all(due(downlink, state, 4))
    assert not np.any(due(downlink, state, 5))


@pytest.mark.parametrize("name", ["top_k", "changes"])
def test_a_client_catches_up_whatever_it_missed(name):
    """Random rounds under random masks, with and without a client, against what it holds itself."""
    downlink, update = DOWNLINKS[name], JITTED[name]
    rng = np.random.default_rng(5)
    params = jax.tree.map(np.array, PARAMS)
    copy, held, state = None, 0, downlink.init(PARAMS)
    history = []
    for number in range(30):
        masks = jax.tree.map(lambda leaf: rng.random(leaf.shape) < 0.7, PARAMS)
        params = jax.tree.map(
            lambda leaf: np.where(rng.random(leaf.shape) < 0.2, leaf + rng.normal(), leaf), params
        )
        params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
        params = jax.device_get(masks_lib.apply(masks, params))
        seen, state = jax.device_get(update(KEY, params, state, masks))
        history.append(seen)
        wanted = jax.device_get(due(downlink, state, held))
        sent = jax.tree.map(np.logical_and, wanted, masks)
        if held:  # what changed in any round that it missed, and only that
            since = history[held - 1 :]
            changed = [jax.tree.map(np.not_equal, *two) for two in itertools.pairwise(since)]
            wanted = jax.tree.map(lambda *leaves: np.any(leaves, axis=0), *changed)
            chex.assert_trees_all_equal(sent, jax.tree.map(np.logical_and, wanted, masks))
        if rng.random() < 0.4 or number == 29:
            old = jax.tree.map(np.zeros_like, seen) if copy is None else copy
            copy = jax.tree.map(
                lambda mask, fresh, new, kept: np.where(mask, np.where(fresh, new, kept), 0.0),
                masks,
                sent,
                seen,
                old,
            )
            chex.assert_trees_all_equal(copy, seen)
            held = number + 1
            assert int(state.version) == held
        if name == "changes":
            chex.assert_trees_all_equal(bits(seen), bits(params))


def test_all_changes_are_exact_parameters_even_the_sign_of_a_zero():
    downlink = DOWNLINKS["changes"]
    everything = jnp.ones(3, jnp.bool_)
    _, state = downlink.update(
        KEY, jnp.array([0.0, 1.0, 2.0]), downlink.init(jnp.zeros(3)), everything
    )
    moved = jnp.array([-0.0, 1.0, jnp.nextafter(jnp.float32(2.0), jnp.float32(3.0))])
    seen, after = downlink.update(KEY, moved, state, everything)
    chex.assert_trees_all_equal(bits(seen), bits(moved))
    assert after.clock.tolist() == [2, 1, 2]


def test_no_more_entries_change_than_the_fraction_says():
    _, state = JITTED["top_k"](KEY, PARAMS, DOWNLINKS["top_k"].init(PARAMS), MASKS)
    moved = jax.tree.map(lambda leaf: leaf + 1.0, PARAMS)
    _, after = JITTED["top_k"](KEY, moved, state, MASKS)
    changed = jax.tree.map(lambda clock: int(np.sum(clock == 2)), after.clock)
    num_kept = int(np.sum(MASKS["layer"]["kernel"]))
    assert changed == {
        "layer": {"kernel": round(0.3 * num_kept), "bias": 1},
        "none_kept": 0,
    }


@pytest.mark.parametrize(
    ("num_bits", "values", "step", "zero", "levels", "seen"),
    [
        (
            8,
            [-0.5, -0.1, 0.0, 0.2, 0.77],
            0.00498039,
            100,
            [0, 80, 100, 140, 255],
            [-0.498039, -0.099608, 0.0, 0.199216, 0.771961],
        ),
        (
            2,
            [-1.0, -0.3, 0.2, 0.5, 1.0],
            0.666667,
            1,
            [0, 1, 1, 2, 2],
            [-THIRDS, 0, 0, THIRDS, THIRDS],
        ),
        (8, [0.2, 0.3, 0.9], 0.00352941, 0, [57, 85, 255], [0.201176, 0.3, 0.9]),
    ],
)
def test_weights_are_rounded_as_in_the_paper_with_a_range_that_contains_zero(
    num_bits, values, step, zero, levels, seen
):
    values = jnp.array(values)
    everything = jnp.ones(values.shape, jnp.bool_)
    found = downlinks.levels(values, everything, bits=num_bits)
    np.testing.assert_allclose(found.step, step, rtol=2e-6)
    assert (int(found.zero), found.level.astype(int).tolist()) == (zero, levels)
    shown, _ = downlinks.quantize(bits=num_bits).update(KEY, values, (), everything)
    np.testing.assert_allclose(shown, seen, rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("low", [-1.0, -0.003, 0.0, 0.4])
def test_rounded_weights_are_off_by_half_a_step_at_most_and_zeros_stay(low):
    values = jax.random.uniform(KEY, (2000,), minval=low, maxval=0.9).at[:5].set(0.0)
    masks = jnp.arange(2000) % 3 != 0
    seen, _ = ROUND_TRIP(KEY, values, (), masks)
    found = downlinks.levels(values, masks, bits=8)
    off = np.abs(seen - values)[masks]
    assert off.max() <= found.step * 0.5001
    assert not np.any(seen[:5])
    assert not np.any(seen[~masks])
    assert len(np.unique(seen)) <= 256


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
def test_a_constant_leaf_is_rounded_to_itself(value):
    values = jnp.full(4, value)
    seen, _ = downlinks.quantize(bits=2).update(KEY, values, (), jnp.ones(4, jnp.bool_))
    np.testing.assert_allclose(seen, values, rtol=1e-6)


def test_levels_arrive_as_what_clients_see():
    values, masks = PARAMS["layer"]["kernel"], np.asarray(MASKS["layer"]["kernel"])
    seen, _ = ROUND_TRIP(KEY, values, (), masks)
    found = jax.jit(downlinks.levels, static_argnames="bits")(values, masks, bits=8)
    payload = downlinks.quantize(bits=8).payload(int(masks.sum()))
    assert payload == Payload(int(masks.sum()), level_bits=8, num_scales=2)
    part = wire_format.levels(
        np.where(masks, found.level, 0).astype(np.uint16),
        bits=payload.level_bits,
        scales=np.array([found.step, found.zero]),
        known=masks,
    )
    arrived = wire_format.decode(wire_format.encode({"w": part}), known={"w": masks})["w"]
    assert isinstance(arrived, wire_format.Levels)
    step, zero = arrived.scales
    decoded = np.where(masks, step * (arrived.levels.astype(np.float32) - zero), np.float32(0.0))
    np.testing.assert_array_equal(decoded, seen)


def test_nothing_of_an_empty_leaf_is_sent():
    assert downlinks.quantize(bits=8).payload(0) == Payload(0, level_bits=8, num_scales=0)
    assert downlinks.top_k(fraction=0.5).payload(7) == Payload(7)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_a_fraction_that_makes_no_sense_is_refused(fraction):
    with pytest.raises(ValueError, match=rf"\(0, 1\], got {fraction}"):
        downlinks.top_k(fraction=fraction)


@pytest.mark.parametrize("num_bits", [1, 17])
def test_bits_that_make_no_sense_are_refused(num_bits):
    with pytest.raises(ValueError, match=rf"\[2, 16\], got {num_bits}"):
        downlinks.quantize(bits=num_bits)
