"""FedSGC: exchanges that follow a map of directions, absent clients, and when the map travels."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import masks
from fedjaxprune.federated import aggregators
from fedjaxprune.methods import feddst, fedsgc
from fedjaxprune.pruning import drop_and_grow
from fedjaxprune.rounds import traffic
from fedjaxprune.types import PrunerInputs, RoundState
from tests import quadratic
from tests.test_feddst import KEY, build, joined, live, numbers, places, play, setup

# The specification's example: one layer, live 0-7, pruned 8-13.
LIVE = places(*range(8), size=14)
PARAMS = numbers(0.5, -0.1, 0.3, 0.05, -0.4, 0.2, 0.15, -0.6, *[0.0] * 6)
GRADS = numbers(*[0.0] * 8, 0.2, 0.9, -0.8, 0.7, 0.1, -0.3)
THERE = numbers(1, 1, -1, -1, -1, 1, 1, -1, 1, -1, 1, 0, -1, 1)
HERE = numbers(1, 1, 1, -1, 1, 1, 0, 1, 1, 1, -1, 1, -1, 1)
FIRST = ({2, 4, 7}, {8, 12, 13})


def exchanged(share, there=THERE, here=HERE, count=4):
    pruner = drop_and_grow.drop_and_grow(
        lambda masks, index: {"kernel": jnp.int32(count)},
        guide=lambda masks, inputs: drop_and_grow.agreement(masks, there, here),
        guided_share=share,
    )
    inputs = PrunerInputs(params=PARAMS, grads=GRADS, round=jnp.int32(1))
    kept = live(jax.jit(pruner.update)(KEY, LIVE, (), inputs)[0])
    return live(LIVE) - kept, kept - live(LIVE)


def test_what_goes_and_comes_first_is_what_moves_against_the_map_and_along_with_it():
    assert tuple(map(live, drop_and_grow.agreement(LIVE, THERE, HERE))) == FIRST
    flipped = [jax.tree.map(jnp.negative, tree) for tree in (THERE, HERE)]
    assert tuple(map(live, drop_and_grow.agreement(LIVE, *flipped))) == FIRST
    # With one of them flipped, conflict is agreement; zeros are neither.
    other = drop_and_grow.agreement(LIVE, flipped[0], HERE)
    assert tuple(map(live, other)) == ({0, 1, 3, 5}, {9, 10})


@pytest.mark.parametrize(
    ("share", "dropped", "grown"),
    [
        (0.0, {1, 3, 5, 6}, {9, 10, 11, 13}),
        (0.01, {1, 3, 5, 6}, {9, 10, 11, 13}),
        (0.5, {1, 2, 3, 4}, {8, 9, 10, 13}),
        (1.0, {2, 3, 4, 7}, {8, 9, 12, 13}),
    ],
)
def test_a_share_of_the_exchange_is_guided(share, dropped, grown):
    assert exchanged(share) == (dropped, grown)


def test_without_directions_it_is_the_exchange_by_size():
    nothing = jax.tree.map(jnp.zeros_like, THERE)
    assert exchanged(1.0, there=nothing) == exchanged(0.0)


def test_no_more_is_exchanged_than_is_pruned():
    dropped, grown = exchanged(0.5, count=20)
    assert len(dropped) == len(grown) == 6


def test_a_share_beyond_all_is_refused():
    with pytest.raises(ValueError, match=r"guided_share must lie in \[0, 1\], got 1.5"):
        exchanged(1.5)


def start_of(params, held):
    return RoundState(jnp.int32(0), params, held, jnp.int32(0), (), (), ())


def test_absent_clients_count_with_the_old_model():
    """Equation 7 with 100 examples: two clients take part, of 30 and of 10."""
    start, held = numbers(0.4, 0.2, 0, 0), places(0, 1, size=4)
    ends = [numbers(0.5, 0, 0.1, 0), numbers(0.3, 0.4, 0, 0)]
    own = [places(0, 2, size=4), places(0, 1, size=4)]
    moved = [
        masks.apply(mine, jax.tree.map(jnp.subtract, end, start))
        for mine, end in zip(own, ends, strict=True)
    ]
    sent = list(zip((30.0, 10.0), moved, own, strict=True))
    fields = {
        "delta": joined(aggregators.holder_mean(), sent),
        "masks": joined(aggregators.vote_weights(), [(w, m, None) for w, _, m in sent]),
        "model_state": {"steps": jnp.float32(3.0)},
        traffic.NUM_EXAMPLES: jnp.float32(40.0),
    }
    people = quadratic.population()._replace(offsets=jnp.asarray([0, 40, 100], jnp.int32))
    changed = fedsgc.count_absent(fields, start_of(start, held), people)
    ignored = jax.tree.map(jnp.add, start, fields["delta"])
    counted = jax.tree.map(jnp.add, start, changed["delta"])
    chex.assert_trees_all_close(ignored, numbers(0.45, 0.4, 0.1, 0), atol=1e-7)
    chex.assert_trees_all_close(counted, numbers(0.42, 0.228571429, 0.1, 0), atol=1e-7)
    assert float(changed["model_state"]["steps"]) == pytest.approx(1.2)
    assert live(jax.tree.map(lambda votes: votes > 0, changed["masks"])) == {0, 1, 2}
    step = jax.tree.map(jnp.subtract, counted, start)
    assert np.sign(np.asarray(step["kernel"])).tolist() == [[1, 1, 1, 0]]
    everybody = people._replace(offsets=jnp.asarray([0, 10, 40], jnp.int32))
    same = fedsgc.count_absent(fields, start_of(start, held), everybody)
    chex.assert_trees_all_equal(same["delta"], fields["delta"])
    # At most 30 examples of each count: with the two that were heard nobody is absent.
    bounded = fedsgc.count_absent(fields, start_of(start, held), people, max_weight=20.0)
    chex.assert_trees_all_equal(bounded["delta"], fields["delta"])
    del fields["masks"]  # everybody holds what is in force
    plain = fedsgc.count_absent(fields, start_of(start, held), people, max_weight=30.0)
    chex.assert_trees_all_close(
        plain["delta"], jax.tree.map(lambda leaf: leaf * 40 / 60, fields["delta"]), rtol=1e-6
    )


@pytest.mark.parametrize(("direction", "expected"), [("remembered", -1), ("last_step", 0)])
def test_a_pruned_weight_keeps_the_direction_of_its_last_live_step(direction, expected):
    """It is one when it is grown again, too; a weight that never lived has none."""
    settings = fedsgc.FedSGC(direction=direction)
    state = fedsgc._no_direction(start_of(numbers(0.5, 0, 0), places(0, size=3)))

    def step(state, values, *alive):
        after = state._replace(params=numbers(*values), masks=places(*alive, size=3))
        return fedsgc._remember(settings, state, after, ())[0]

    def directions(state):
        return np.asarray(state.method["kernel"]).ravel().tolist()

    state = step(state, (0.3, 0, 0), 0)
    assert directions(state) == [-1, 0, 0]
    state = step(state, (0, 0.2, 0), 1)
    assert directions(state) == [expected, 1, 0]
    state = step(state, (0, 0.1, 0), 1)
    assert directions(state) == [expected, -1, 0]
    state = step(state, (0.4, 0, 0), 0)
    assert directions(state) == [1, -1 if direction == "remembered" else 0, 0]


@functools.cache
def played(**options):
    return play(build(fedsgc, last_prune_round=5, **options))


def test_the_map_goes_to_all_clients_in_readjusting_rounds_and_is_as_long_as_is_written():
    states, measured = played()
    for index, (before, metrics) in enumerate(zip(states, measured, strict=False)):
        fields = metrics.sent.down["broadcast"]
        for name, sign in ((fedsgc.RISING, 1), (fedsgc.FALLING, -1)):
            field = fields[name]
            due = index in (1, 3)
            assert np.asarray(field.clients).tolist() == [due] * 6
            marks = jax.tree.map(lambda leaf, sign=sign: np.asarray(leaf) == sign, before.method)
            if due:
                counts = [int(leaf.sum()) for leaf in jax.tree.leaves(marks)]
                assert np.asarray(field.sent_counts).tolist() == counts
                assert sum(counts) > 0


def test_a_guided_run_takes_other_masks_and_keeps_its_counts():
    guided, _ = played()
    plain, _ = played(guided_share=0.0)
    assert int(masks.num_changed(guided[-1].masks, plain[-1].masks)) > 0
    for state in guided:
        assert masks.num_kept(state.masks).tolist() == [4, 10, 2, 6]


def test_a_share_of_nothing_is_feddst_to_the_bit():
    found, measured = played(guided_share=0.0)
    wanted, _ = play(build(feddst, last_prune_round=5))
    chex.assert_trees_all_equal(found, wanted)
    assert all(fedsgc.RISING not in one.sent.down["broadcast"] for one in measured)


def test_absent_clients_count_without_a_map_where_masks_stay():
    algorithm = build(fedsgc, absent="old", drop_fraction=0.0)
    state = algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})
    members = quadratic.cohort(algorithm, range(6))
    run = algorithm.stages[-1].round
    _, _, metrics = jax.eval_shape(run, KEY, state, members, quadratic.population())
    assert sorted(metrics.sent.down["broadcast"]) == ["model_state", "params"]
    assert "masks" not in metrics.sent.up


def test_absent_clients_cannot_count_under_a_robust_aggregator():
    task = quadratic.task(setup(aggregator=aggregators.median()))
    with pytest.raises(ValueError, match=r"server\.aggregator must be a mean"):
        fedsgc.build(fedsgc.FedSGC(absent="old"), task)
