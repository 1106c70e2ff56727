"""Laws of what a delta looks like after the wire, over every uplink."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import masks as masks_lib
from fedjaxprune.federated import _fractions, uplinks
from fedjaxprune.traffic import Payload
from tests import draws

KEY = jax.random.key(0)
DELTA = {
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
KEPT = [int(n) for n in masks_lib.num_kept(MASKS)]

PLAIN = {
    "identity": uplinks.identity(),
    "top_k": uplinks.top_k(fraction=0.3),
    "random_k": uplinks.random_k(fraction=0.3),
    "unbiased_random_k": uplinks.unbiased_random_k(fraction=0.3),
    "sign": uplinks.sign(),
    "quantize": uplinks.quantize(bits=3),
    "nearest": uplinks.quantize(bits=3, rounding="nearest"),
}
WITH_FEEDBACK = {
    f"error_feedback({name})": uplinks.error_feedback(inner) for name, inner in PLAIN.items()
}
UPLINKS = PLAIN | WITH_FEEDBACK  # made once, so that each is compiled once
RANDOM = ["quantize", "random_k", "unbiased_random_k"]
SELECTING = ["identity", "top_k", "random_k"]  # what they send, they send as it is


def send(component, delta=DELTA, masks=MASKS, key=KEY, state=None):
    state = component.init(delta) if state is None else state
    return jax.jit(component.update)(key, delta, state, masks)


@pytest.mark.parametrize("name", sorted(UPLINKS))
def test_what_is_sent_looks_like_the_delta_and_the_state_like_the_state(name):
    component = UPLINKS[name]
    before = component.init(DELTA)
    sent, after = send(component)
    chex.assert_trees_all_equal_shapes_and_dtypes(sent, DELTA)
    chex.assert_trees_all_equal_structs(after, before)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)


@pytest.mark.parametrize("name", sorted(UPLINKS))
def test_what_may_not_travel_is_an_exact_zero_whatever_it_was(name):
    spoilt = jax.tree.map(lambda d, m: jnp.where(m, d, jnp.full_like(d, jnp.nan)), DELTA, MASKS)
    sent, after = send(UPLINKS[name], delta=spoilt)
    chex.assert_trees_all_equal(sent, masks_lib.apply(MASKS, sent))
    clean, _ = send(UPLINKS[name])
    chex.assert_trees_all_equal(sent, clean)
    assert not any(jnp.any(jnp.signbit(jnp.where(m, 0.0, s))) for s, m in _pairs(sent, MASKS))
    if name in WITH_FEEDBACK:
        chex.assert_trees_all_equal(after.residual, masks_lib.apply(MASKS, after.residual))


@pytest.mark.parametrize("name", sorted(UPLINKS))
def test_the_key_decides_and_only_where_there_is_chance(name):
    component = UPLINKS[name]
    first, _ = send(component)
    again, _ = send(component)
    other, _ = send(component, key=jax.random.key(9))
    chex.assert_trees_all_equal(first, again)
    same = all(bool(jnp.all(a == b)) for a, b in _pairs(first, other))
    assert same == (not any(random in name for random in RANDOM))


@pytest.mark.usual("quantize", "sign", "error_feedback(top_k)", "unbiased_random_k")
@pytest.mark.parametrize("name", sorted(UPLINKS))
def test_mapping_over_clients_is_sending_one_by_one(name):
    component = UPLINKS[name]
    keys = jax.random.split(KEY, 3)
    deltas = jax.tree.map(lambda d: jnp.stack([d, 2.0 * d, d - 0.1]), DELTA)
    flipped = jax.tree.map(jnp.logical_not, MASKS)
    masks = jax.tree.map(lambda a, b: jnp.stack([a, b, a]), MASKS, flipped)
    states = jax.vmap(component.init)(deltas)
    sent, _ = jax.jit(jax.vmap(component.update))(keys, deltas, states, masks)
    for i in range(3):
        delta, mask = jax.tree.map(lambda leaf, i=i: leaf[i], (deltas, masks))
        alone, _ = send(component, delta=delta, masks=mask, key=keys[i])
        chex.assert_trees_all_close(jax.tree.map(lambda s, i=i: s[i], sent), alone, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(WITH_FEEDBACK))
def test_the_residual_is_what_was_computed_less_what_was_sent(name):
    component = UPLINKS[name]
    state = component.init(DELTA)
    masks = MASKS
    for r in range(4):
        delta = jax.tree.map(lambda d, r=r: d * (1.0 + r), DELTA)
        if r == 2:  # the masks shrink: what is pruned is forgotten
            masks = jax.tree.map(lambda m: m.at[..., :1].set(False), masks)
        sent, after = send(component, delta, masks, jax.random.fold_in(KEY, r), state)
        corrected = masks_lib.apply(masks, jax.tree.map(jnp.add, delta, state.residual))
        together = jax.tree.map(jnp.add, sent, after.residual)
        if any(f"({selecting})" in name for selecting in SELECTING):
            chex.assert_trees_all_equal(together, corrected)
        else:  # float subtraction rounds
            chex.assert_trees_all_close(together, corrected, rtol=1e-5, atol=1e-5)
        state = after


def test_nothing_is_lost_but_delayed_by_feedback():
    component = uplinks.error_feedback(uplinks.top_k(fraction=0.1))
    values = {"w": jnp.arange(1.0, 21.0)}
    masks = masks_lib.full(values)
    state, received = component.init(values), jnp.zeros(20)
    for r in range(40):
        delta = values if r == 0 else {"w": jnp.zeros(20)}
        sent, state = send(component, delta, masks, state=state)
        received = received + sent["w"]
        if r == 9:
            chex.assert_trees_all_equal(received, values["w"])  # 2 entries a round
    chex.assert_trees_all_equal(state.residual["w"], jnp.zeros(20))


@pytest.mark.usual(
    "top_k-0.01",
    "top_k-0.9",
    "top_k-1.0",
    "random_k-0.25",
    "random_k-1.0",
    "unbiased_random_k-0.01",
    "unbiased_random_k-0.5",
)
@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("make", [uplinks.top_k, uplinks.random_k, uplinks.unbiased_random_k])
def test_selecting_uplinks_send_the_count_that_they_charge_for(make, fraction):
    values = {"w": draws.normal(0, 61), "short": jnp.float32(1.0).reshape(1)}
    masks = {"w": jnp.arange(61) % 3 != 0, "short": jnp.ones(1, jnp.bool_)}
    sent, _ = send(make(fraction=fraction), values, masks)
    expected = min(max(round(fraction * 40), 1), 40)
    assert int(jnp.sum(sent["w"] != 0)) == expected
    assert int(jnp.sum(sent["short"] != 0)) == 1
    payloads = [make(fraction=fraction).payload(n) for n in (1, 40)]
    assert [payload.num_values for payload in payloads] == [1, expected]
    if make is uplinks.top_k:
        chosen = np.abs(np.where(masks["w"], values["w"], 0.0))
        threshold = np.sort(chosen)[-expected]
        kept = np.where(chosen >= threshold, values["w"], np.float32(0.0))
        np.testing.assert_array_equal(sent["w"], kept)


def test_counts_are_those_of_the_host_where_float32_would_miscount():
    size = 2**24 + 2
    for fraction in (0.5 + 2**-25, 0.1, 0.9999999):
        host = _fractions.num_sent(fraction, size)
        mask = jax.ShapeDtypeStruct((size,), jnp.bool_)
        count = jax.jit(lambda mask, f=fraction: _fractions.num_sent_traced(f, mask))
        assert int(count(jnp.ones(mask.shape, mask.dtype))) == host


@pytest.mark.parametrize("name", ["quantize", "unbiased_random_k"])
def test_unbiased_uplinks_are_right_on_average(name):
    num_keys = 4000
    keys = jax.random.split(jax.random.key(11), num_keys)
    component = UPLINKS[name]
    sent, _ = jax.jit(jax.vmap(component.update, (0, None, None, None)))(keys, DELTA, (), MASKS)
    expected = masks_lib.apply(MASKS, DELTA)
    for samples, true in _pairs(sent, expected):
        error = np.abs(np.mean(samples, axis=0) - true)
        bound = 5.0 * np.std(samples, axis=0) / np.sqrt(num_keys) + 1e-5
        assert np.all(error <= bound)


def test_random_k_chooses_every_entry_equally_often():
    masks = {"w": jnp.arange(12) < 8}
    keys = jax.random.split(jax.random.key(12), 4000)
    update = uplinks.random_k(fraction=0.25).update
    sent, _ = jax.vmap(update, (0, None, None, None))(keys, {"w": jnp.ones(12)}, (), masks)
    rate = np.mean(sent["w"], axis=0)
    np.testing.assert_allclose(rate[:8], 0.25, atol=5 * np.sqrt(0.25 * 0.75 / 4000))
    np.testing.assert_array_equal(rate[8:], 0.0)


def test_signs_carry_the_mean_magnitude_and_zero_travels_as_plus():
    delta = {"w": jnp.array([1.0, -2.0, 0.0, 9.0])}
    masks = {"w": jnp.array([True, True, True, False])}
    sent, _ = send(uplinks.sign(), delta, masks)
    chex.assert_trees_all_equal(sent, {"w": jnp.array([1.0, -1.0, 1.0, 0.0])})


@pytest.mark.parametrize("bits", [1, 2, 8, 16])
def test_quantize_has_its_levels_and_sends_the_ends_as_they_are(bits):
    values = draws.normal(13, 3000)
    masks = {"w": jnp.arange(3000) % 2 == 0}
    sent, _ = send(uplinks.quantize(bits=bits), {"w": values}, masks)
    sent, kept = sent["w"][::2], values[::2]
    assert len(np.unique(sent)) <= 2**bits
    assert jnp.min(sent) == jnp.min(kept)
    assert jnp.max(sent) == jnp.max(kept)
    step = (jnp.max(kept) - jnp.min(kept)) / (2**bits - 1)
    assert jnp.max(jnp.abs(sent - kept)) <= step * 1.01


def test_quantize_to_the_nearest_level_is_off_by_half_a_level_at_most():
    values = jnp.array([-1.0, -0.8, -0.5, 0.0, 0.1, 0.5, 2.0])  # levels -1, 0, 1 and 2
    component = uplinks.quantize(bits=2, rounding="nearest")
    sent, _ = send(component, {"w": values}, masks_lib.full({"w": values}))
    # half to even: -0.5 is half a level above level 0, and 0.5 half a level above level 1
    np.testing.assert_allclose(sent["w"], [-1.0, -1.0, -1.0, 0.0, 0.0, 1.0, 2.0], atol=1e-6)
    assert component.payload(10) == uplinks.quantize(bits=2).payload(10)
    delta, _ = send(UPLINKS["nearest"])
    for found, true, mask in zip(*map(jax.tree.leaves, (delta, DELTA, MASKS)), strict=True):
        off, kept = np.abs(found - true)[mask], true[mask]
        assert not kept.size or off.max() <= (kept.max() - kept.min()) / 7 * 0.5001


def test_small_leaves_are_sent_whole_and_leave_no_residual():
    component = uplinks.error_feedback(uplinks.except_small(uplinks.sign(), fewer_than=4))
    sent, after = send(component)
    plain, _ = send(UPLINKS["sign"])
    chex.assert_trees_all_equal(sent["layer"]["bias"], DELTA["layer"]["bias"])
    chex.assert_trees_all_equal(sent["layer"]["kernel"], plain["layer"]["kernel"])
    assert not np.any(after.residual["layer"]["bias"])
    assert np.any(after.residual["layer"]["kernel"])
    shaped = component.shaped_payload
    assert shaped is not None
    assert shaped(3, (3,)) == Payload(3)
    assert shaped(3, (4,)) == Payload(3, level_bits=1, num_scales=1)
    outer = uplinks.except_small(uplinks.except_small(uplinks.sign(), fewer_than=9), fewer_than=4)
    assert outer.shaped_payload is not None
    assert outer.shaped_payload(3, (2, 4)) == Payload(3)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        uplinks.except_small(uplinks.sign(), fewer_than=-1)


def test_a_rounding_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"must be 'random' or 'nearest', got 'up'"):
        uplinks.quantize(bits=8, rounding="up")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("value", [0.0, 0.3, -1e-20])
def test_quantize_sends_a_constant_leaf_as_it_is(value):
    delta = {"w": jnp.full((4,), value)}
    sent, _ = send(uplinks.quantize(bits=2), delta, masks_lib.full(delta))
    chex.assert_trees_all_equal(sent, delta)


def test_everything_is_sent_by_the_fraction_one():
    expected = masks_lib.apply(MASKS, DELTA)
    for make in (uplinks.top_k, uplinks.random_k, uplinks.unbiased_random_k):
        sent, _ = send(make(fraction=1.0))
        chex.assert_trees_all_equal(sent, expected)
        for n in KEPT:
            assert make(fraction=1.0).payload(n) == uplinks.identity().payload(n)


def test_payloads_are_as_the_doc_strings_say():
    assert uplinks.identity().payload(1000) == Payload(1000)
    assert uplinks.top_k(fraction=0.01).payload(1000) == Payload(10, indices="explicit")
    for make in (uplinks.random_k, uplinks.unbiased_random_k):
        assert make(fraction=0.01).payload(10) == Payload(1, indices="from_seed")
    assert uplinks.sign().payload(10) == Payload(10, level_bits=1, num_scales=1)
    assert uplinks.quantize(bits=4).payload(10) == Payload(10, level_bits=4, num_scales=2)


@pytest.mark.parametrize("name", sorted(UPLINKS))
def test_payloads_are_python_integers_none_for_nothing(name):
    component = UPLINKS[name]
    assert component.payload(0).num_values == component.payload(0).num_scales == 0
    assert type(component.payload(2**31 - 1).num_values) is int
    if name in WITH_FEEDBACK:
        inner = PLAIN[name.removeprefix("error_feedback(").removesuffix(")")]
        assert [component.payload(n) for n in KEPT] == [inner.payload(n) for n in KEPT]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("make", [uplinks.top_k, uplinks.random_k, uplinks.unbiased_random_k])
def test_a_fraction_that_makes_no_sense_is_refused(make, fraction):
    with pytest.raises(ValueError, match=rf"\(0, 1\], got {fraction}"):
        make(fraction=fraction)


@pytest.mark.parametrize("bits", [0, 17])
def test_bits_that_make_no_sense_are_refused(bits):
    with pytest.raises(ValueError, match=rf"\[1, 16\], got {bits}"):
        uplinks.quantize(bits=bits)


def _pairs(first, second):
    return list(zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
