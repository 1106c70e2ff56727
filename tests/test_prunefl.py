"""PruneFL: masks of most gain per second, squares at the client, and the stage before training."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pydantic
import pytest

from fedjaxprune import masks, models, trees
from fedjaxprune.costs import ledger, storage_models
from fedjaxprune.federated import squared_gradients
from fedjaxprune.methods import prunefl
from fedjaxprune.pruning import cost_benefit, pruners
from fedjaxprune.rounds import facts, protocol
from fedjaxprune.rounds import task as tasks
from fedjaxprune.types import Broadcast, Client, Message, PrunerInputs
from fedjaxprune.wire import format as wire_format
from fedjaxprune.wire import messages
from tests import quadratic

KEY = jax.random.key(5)
PEOPLE = quadratic.population()
SETUP = protocol.Protocol(num_rounds=6, batcher=quadratic.full_batches(2), optimizer=optax.sgd(0.1))

# The worked example: two layers, weights and squared gradients.
WEIGHTS = {
    "a": np.array([0.9, -0.5, 0.05, 0.3, 0, 0], np.float32),
    "b": np.array([1, -0.2, 0.6, 0, 0], np.float32),
}
GAINS = {
    "a": np.array([0.10, 0.02, 0.01, 0.09, 0.30, 0.04], np.float32),
    "b": np.array([0.20, 0.16, 0.05, 0.50, 0.03], np.float32),
}
LIVE = {name: leaf != 0 for name, leaf in WEIGHTS.items()}
ALL = 11  # as a bound, none


@jax.jit
def admit(kept, gains, times, constant, most=ALL, other_gains=0.0):
    return cost_benefit.admit(
        kept,
        gains,
        other_gains=jnp.float32(other_gains),
        times=times,
        constant=constant,
        most=jnp.int32(most),
    )


@functools.cache
def kept_of(share):
    """Mark what is kept for sure, by the pruner's own first half."""
    inputs = PrunerInputs(WEIGHTS, None, jnp.int32(0))
    return pruners.drop(share).update(KEY, jax.tree.map(jnp.asarray, LIVE), (), inputs)[0]


def rate(chosen, gains, times, constant):
    """Compute the gain per second of masks."""
    gain = sum(float(np.sum(gains[n], where=np.asarray(m))) for n, m in chosen.items())
    return gain / (constant + sum(times[name] * int(np.sum(m)) for name, m in chosen.items()))


def places(chosen):
    return [np.flatnonzero(chosen[name]).tolist() for name in ("a", "b")]


@pytest.mark.parametrize(
    ("share", "times", "constant", "most", "expected", "worth"),
    [
        (0.3, (1, 4), 10, ALL, [[0, 1, 3, 4], [0, 1, 2, 3]], 0.0473333333),
        (0.5, (1, 4), 10, ALL, [[0, 1, 3, 4], [0, 2, 3]], 0.048461538),
        (0.5, (1, 1), 10, ALL, [[0, 1, 3, 4], [0, 1, 2, 3]], 0.0788888888),
        (0.5, (1, 4), 0.5, ALL, [[0, 1, 3, 4], [0, 2, 3]], 0.076363636),
        (0.5, (1, 4), 10, 6, [[0, 1, 4], [0, 2, 3]], 0.0468),
    ],
)
def test_the_worked_example(share, times, constant, most, expected, worth):
    times = dict(zip("ab", map(np.float32, times), strict=True))
    kept = kept_of(share)
    found = admit(kept, GAINS, times, np.float32(constant), most)
    assert places(found) == expected
    assert rate(found, GAINS, times, constant) == pytest.approx(worth, rel=1e-6)
    factors = (2.0**-20, 2.0**20)
    for factor in factors:
        scaled = {name: np.float32(factor) * leaf for name, leaf in GAINS.items()}
        assert places(admit(kept, scaled, times, np.float32(constant), most)) == expected
        slower = {name: np.float32(factor) * time for name, time in times.items()}
        assert places(admit(kept, GAINS, slower, np.float32(factor * constant), most)) == expected


def test_what_is_kept_for_sure():
    assert places(kept_of(0.3)) == [[0, 1, 3], [0, 1, 2]]
    assert places(kept_of(0.5)) == [[0, 1], [0, 2]]
    assert places(kept_of(0.0)) == [[0, 1, 2, 3], [0, 1, 2]]  # a revision that only grows


def test_no_other_masks_gain_more_per_second():
    rng = np.random.default_rng(3)
    choices = np.array(list(itertools.product([False, True], repeat=11)))
    for _ in range(20):
        gains = {name: rng.gamma(0.5, size=leaf.size).astype("f4") for name, leaf in LIVE.items()}
        times = {"a": np.float32(rng.uniform(0.2, 2)), "b": np.float32(rng.uniform(0.2, 2))}
        constant, other = np.float32(rng.uniform(0, 8)), np.float32(rng.gamma(0.5))
        kept = {name: rng.random(leaf.size) < 0.3 for name, leaf in LIVE.items()}
        kept["a"][0] = True
        found = admit(kept, gains, times, constant, ALL, other)
        sure = np.concatenate([kept["a"], kept["b"]])
        gain = np.concatenate([gains["a"], gains["b"]]).astype(np.float64)
        time = np.repeat([float(times["a"]), float(times["b"])], [6, 5])
        possible = choices[np.all(choices | ~sure, axis=1)]
        rates = (possible @ gain + float(other)) / (possible @ time + float(constant))
        best = possible[np.argmax(rates)]
        np.testing.assert_array_equal(np.concatenate([found["a"], found["b"]]), best)


def test_a_layer_that_takes_longer_keeps_no_more():
    before = 6
    for time in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 64.0):
        times = {"a": np.float32(time), "b": np.float32(1.0)}
        number = len(places(admit(kept_of(0.5), GAINS, times, np.float32(10)))[0])
        assert number <= before
        before = number
    assert before == 2


def test_where_time_hardly_depends_on_masks_all_that_gains_is_let_in():
    gains = {**GAINS, "b": np.where(np.arange(5) == 4, 0, GAINS["b"])}
    times = dict.fromkeys("ab", np.float32(1.0))
    found = admit(kept_of(0.5), gains, times, np.float32(1e12))
    assert places(found) == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3]]
    # Without gradients there is nothing to gain.
    nothing = jax.tree.map(np.zeros_like, GAINS)
    assert places(admit(kept_of(0.5), nothing, times, np.float32(10))) == [[0, 1], [0, 2]]


def test_a_bound_is_not_exceeded():
    times = dict.fromkeys("ab", np.float32(1.0))
    for most in (0, 4, 5, 7):
        found = admit(kept_of(0.5), GAINS, times, np.float32(1e12), most)
        assert sum(map(len, places(found))) == max(most, 4)
    # As many as before, where time says nothing: those of largest gain in one pool come back.
    assert places(found) == [[0, 1, 4], [0, 1, 2, 3]]


def test_times_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="constant must be finite and not negative, got -1"):
        cost_benefit.cost_benefit(0.3, times=lambda path, leaf: 1.0, constant=-1.0)
    pruner = cost_benefit.cost_benefit(0.3, times=lambda path, leaf: 0.0, constant=1.0)
    statistics = {cost_benefit.GAINS: GAINS, cost_benefit.OTHER_GAINS: jnp.float32(0.0)}
    inputs = PrunerInputs(WEIGHTS, None, jnp.int32(0), statistics)
    with pytest.raises(ValueError, match=r"times must be positive and finite, got 0.0 for 'a'"):
        jax.eval_shape(pruner.update, KEY, LIVE, (), inputs)


def test_the_share_of_candidates_halves_every_ten_thousand_rounds():
    share = prunefl._share(prunefl.PruneFL())
    found = share(jnp.array([0, 50, 1000, 10_000], jnp.float32))
    np.testing.assert_allclose(found, [0.3, 0.298962, 0.27991, 0.15], rtol=1e-5)


def reporting(grads):
    """Make a client that reports the given gradient."""
    fields = {"grads": {"kernel": jnp.array([grads]), "bias": jnp.array([2.0])}}
    return Client(init=lambda params: (), update=lambda *_: (Message(fields, jnp.float32(1.0)), ()))


def squares(client, state, index=0):
    broadcast = Broadcast((), (), (), jnp.int32(index))
    message, state = jax.jit(client.update)(KEY, broadcast, state, ())
    assert "grads" not in message.fields
    return np.asarray(message.fields["g"]["kernel"]), message.fields, state


def test_gradients_are_squared_at_the_client():
    def wrap(grads, **options):
        return squared_gradients.squared_gradients(
            reporting(grads), prunable=masks.is_kernel, names=("g", "rest"), **options
        )

    one, fields, _ = squares(wrap([3.0, 1.0]), ())
    np.testing.assert_array_equal(one, [[9.0, 1.0]])
    np.testing.assert_array_equal(fields["g"]["bias"], [0.0])  # only the sum of it travels
    assert fields["rest"] == 4.0
    two, *_ = squares(wrap([-1.0, 1.0]), ())
    both, *_ = squares(wrap([1.0, 1.0]), ())  # of the mean gradient of both
    assert not np.array_equal((one + two) / 2, both)
    client = wrap([3.0, 1.0], since_last=lambda index: index % 3 == 2)
    state = client.init({"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(1)})
    sums = []
    for index in range(6):
        sent, fields, state = squares(client, state, index)
        sums.append((sent[0, 0].item(), float(fields["rest"])))
    assert sums == [(0, 0), (0, 0), (27, 12)] * 2


@functools.cache
def play(num_rounds=5, num_clients=6, **options):
    """Run all stages with some of the clients: the algorithm, states and metrics."""
    setup = SETUP._replace(num_rounds=num_rounds)
    settings = prunefl.PruneFL(**{**prunefl.METHOD.law_settings, **options})
    algorithm = prunefl.build(settings, quadratic.task(setup))
    states = [algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})]
    members, rounds = quadratic.cohort(algorithm, range(num_clients)), []
    for stage in algorithm.stages:
        run = jax.jit(stage.round)
        for _ in range(stage.num_rounds):
            key = jax.random.fold_in(KEY, states[-1].round)
            state, rows, metrics = run(key, states[-1], members, PEOPLE)
            members = members._replace(states=rows)
            states.append(state)
            rounds.append(jax.device_get(metrics))
    return algorithm, states, rounds


def num_live(state):
    flags = masks.prunable_leaves(state.masks, masks.is_kernel)
    leaves = zip(jax.tree.leaves(state.masks), flags, strict=True)
    return sum(int(np.sum(mask)) for mask, flag in leaves if flag)


def test_one_client_prunes_until_the_size_settles():
    _, states, rounds = play(initial_passes=200)
    num_passes = float(rounds[0].train["loss"].weight) / 3  # the client has three examples
    assert 5 * 2 <= num_passes < 100  # five revisions that change little end it
    assert 0 < num_live(states[1]) < 32
    pruned = jax.tree.map(jnp.logical_not, states[1].masks)
    assert not any(map(np.any, jax.tree.leaves(masks.apply(pruned, states[1].params))))
    assert not np.array_equal(*(s.params["head"]["kernel"] for s in states[:2]))  # no way back


def test_a_client_without_examples_finds_nothing():
    algorithm = prunefl.build(prunefl.PruneFL(), quadratic.task(SETUP))
    state = algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})
    people = PEOPLE._replace(offsets=PEOPLE.offsets.at[1].set(0))
    members = quadratic.cohort(algorithm, range(6))
    after, _, _ = jax.jit(algorithm.stages[0].round)(KEY, state, members, people)
    chex.assert_trees_all_equal((after.params, after.masks), (state.params, state.masks))


@pytest.mark.parametrize("stays", [{"drop_fraction": 0.0}, {"further_pruning": False}])
def test_a_sparsity_that_a_dense_start_never_reaches_is_refused(stays):
    with pytest.raises(ValueError, match="sparsity must not be given with start_from 'dense'"):
        prunefl.PruneFL(start_from="dense", sparsity=0.8, **stays)


def test_one_client_receives_the_dense_model_and_sends_masks_and_live_weights():
    algorithm, states, rounds = play(initial_passes=200)
    before, after = states[:2]
    traffic = ledger.account(rounds[0], before, algorithm)
    [entry] = traffic.clients
    assert entry.client_ids == (0,)
    down = messages.whole("model_state", before.model_state)
    down |= messages.whole("params", before.params)
    up = messages.whole("model_state", after.model_state)
    up |= messages.values("params", after.params, after.masks)
    flags = masks.prunable_leaves(before.params, masks.is_kernel)
    own = messages.personal_masks(after.masks, flags)
    sent = 8 * sum(len(wire_format.encode(message)) for message in (up, own))
    assert entry.downlink_bits == 8 * len(wire_format.encode(down))
    assert entry.uplink_bits == sent


def test_squares_travel_in_due_rounds_only_and_are_dense():
    algorithm, states, rounds = play(initial_passes=200)
    changed = []
    for index, (state, metrics) in enumerate(zip(states[1:], rounds[1:], strict=False)):
        gains = metrics.sent.up["reply"][cost_benefit.GAINS]
        is_due = index in (1, 3)
        assert np.all(gains.clients) == np.any(gains.clients) == is_due
        assert trees.paths(gains.template) == ["dense/kernel", "head/kernel"]
        assert isinstance(gains.live_counts, tuple)  # all of them
        changed.append(num_live(state) != num_live(states[index + 2]))
        traffic = ledger.account(metrics, state, algorithm)
        sparse = storage_models.fedrts_f4
        stored = ledger.charge_storage(metrics, state, sparse)
        kept = np.asarray(metrics.num_live if not is_due else rounds[index].num_live)
        shapes = [leaf.shape for leaf in jax.tree.leaves(state.params)]
        formulas = {
            "prunefl": storage_models.prunefl_published,
            "prunefl_corrected": storage_models.prunefl_corrected,
        }
        for name, charge in formulas.items():
            both = sum(traffic.published[name])
            assert both == (6 * charge(kept.tolist(), shapes) if is_due else sum(stored))
    assert not any(changed[::2])  # in rounds that are not due


def grown(states):
    """Give what weights start from that come back, of all rounds together."""
    values = []
    for before, after in itertools.pairwise(states):
        new = jax.tree.map(lambda old, mask: np.asarray(mask & ~old), before.masks, after.masks)
        pairs = zip(jax.tree.leaves(new), jax.tree.leaves(after.params), strict=True)
        values += [np.asarray(leaf)[mask] for mask, leaf in pairs]
    return np.concatenate(values)


def test_what_comes_back_starts_from_zero_or_where_it_left():
    _, states, _ = play(initial_passes=200)
    assert grown(states).size > 0
    assert not grown(states).any()
    dense = {"start_from": "dense", "sparsity": 0.3, "prune_every": 1}
    algorithm, states, _ = play(regrown="stale", num_clients=4, **dense)
    assert grown(states).any()
    deployed = algorithm.deployed_params(states[-1])
    pruned = jax.tree.map(jnp.logical_not, states[-1].masks)
    assert not any(map(np.any, jax.tree.leaves(masks.apply(pruned, deployed))))


def test_modeled_times_follow_the_multiply_adds_of_a_layer():
    model = models.lenet5(input_shape=(28, 28, 1), num_classes=10)
    setup = protocol.Protocol(
        num_rounds=4, batcher=quadratic.full_batches(2), optimizer=optax.sgd(0.1)
    )
    task = tasks.make(model, setup, inputs=facts.float_inputs((28, 28, 1)))
    task = task._replace(largest_client=50, num_epochs=2)
    settings = prunefl.PruneFL(times="modeled", seconds_per_multiply_add=1e-6, seconds_per_bit=1e-5)
    seconds = prunefl._times(settings, task)
    found = {
        path: seconds(path, leaf)
        for path, leaf in trees.items(task.facts.params)
        if masks.is_kernel(path, leaf)
    }
    # 100 examples in a round; a weight of a convolution is used at every place of its output.
    expected = {"conv_1": 28 * 28, "conv_2": 10 * 10, "dense_1": 1, "dense_2": 1, "dense_3": 1}
    for layer, uses in expected.items():
        assert found.pop(f"{layer}/kernel") == pytest.approx(1e-4 * uses + 64e-5)
    assert not found
    # Of local steps that a protocol counts, it is their examples that take time.
    by_steps = prunefl._times(settings, task._replace(examples_per_round=300, num_epochs=1))
    kernel = task.facts.params["dense_1"]["kernel"]
    assert by_steps("dense_1/kernel", kernel) == pytest.approx(3e-4 + 64e-5)


@pytest.mark.parametrize(
    ("options", "reached"),
    [
        ({"start_from": "dense", "prune_every": 2}, "0.657"),  # 1 - 0.7 ** 3
        ({"start_from": "dense", "prune_every": 1}, None),
        ({"start_from": "random"}, None),
        ({"start_from": "client"}, None),
        ({"start_from": "client", "further_pruning": False, "initial_passes": 60}, "0.51"),
        ({"initial_sparsity": 0.2, "prune_every": 2}, "0.65"),  # half is live before the last
    ],
)
def test_a_run_that_may_end_short_of_its_sparsity_says_so(options, reached):
    settings = prunefl.PruneFL(sparsity=0.8, last_prune_round=6, halve_every=10**9, **options)
    notes = prunefl.build(settings, quadratic.task(SETUP)).notes
    assert [f"the masks may stop at {reached}, " in note for note in notes] == [True] * bool(
        reached
    )


@pytest.mark.parametrize("wrong", [{"start_from": "random"}, {"initial_sparsity": 0.5}])
def test_a_bound_that_is_needed_must_be_given(wrong):
    with pytest.raises(pydantic.ValidationError, match="sparsity must be given with"):
        prunefl.PruneFL(**wrong)


def test_a_client_that_is_not_there_is_refused():
    setup = protocol.Protocol(
        num_rounds=4, batcher=quadratic.full_batches(2), optimizer=optax.sgd(0.1)
    )
    with pytest.raises(ValueError, match=r"client_id must be less than data.num_clients \(6\)"):
        prunefl.build(prunefl.PruneFL(client_id=6), quadratic.task(setup))
