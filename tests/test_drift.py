"""SCAFFOLD and FedNova: known answers, and what they come to where clients are alike."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import registry, trees
from fedjaxprune.costs import ledger
from fedjaxprune.federated import local_training, personalization
from fedjaxprune.federated.corrections import fednova, scaffold
from fedjaxprune.methods import fedavg, feddip
from fedjaxprune.pruning import pruners, schedules, scores
from fedjaxprune.rounds import protocol, training
from tests import quadratic

KEY = jax.random.key(11)
PEOPLE = quadratic.population()
RATE = 0.1


def by_size(max_size=8):
    """Make a client take as many full-batch steps as it has points."""
    return quadratic.full_batches(1, max_size)._replace(num_steps=lambda data: data.size)


def setup(**changes):
    base = protocol.Protocol(
        num_rounds=4, batcher=quadratic.full_batches(2), optimizer=optax.sgd(RATE)
    )
    return base._replace(**changes)


@jax.jit
def put(rows, new, ids):
    return jax.tree.map(lambda all_, row: all_.at[ids].set(row), rows, new)


def play(algorithm, cohorts, people=PEOPLE, num_clients=6):
    """Play the cohorts in turn; give the states and all clients' rows after each."""
    run = jax.jit(algorithm.stages[0].round)
    state = jax.jit(algorithm.init)(quadratic.PARAMS, {})
    rows = quadratic.cohort(algorithm, range(num_clients)).states
    history = []
    for index, (ids, present) in enumerate(cohorts):
        ids = jnp.asarray(ids, jnp.int32)
        members = quadratic.cohort(algorithm, ids, present)._replace(
            states=trees.take_rows(rows, ids)
        )
        state, new, metrics = run(jax.random.fold_in(KEY, index), state, members, people)
        rows = put(rows, new, ids)
        history.append((state, rows, metrics))
    return history


def alike(num_clients=4):
    """Make clients that hold the same points."""
    one = quadratic.population(sizes=(5,))
    return one._replace(
        order=jnp.tile(one.order, num_clients),
        offsets=jnp.arange(num_clients + 1, dtype=jnp.int32) * 5,
    )


def dense(protocol):
    return fedavg.build(fedavg.FedAvg(), quadratic.task(protocol))


def averaged(momentum=0.0, **changes):
    rule = fednova.normalized_averaging(
        batcher=changes.get("batcher", setup().batcher), momentum=momentum
    )
    return dense(setup(correction=rule, **changes))


DROPPING = [
    ([0, 1, 2, 3], None),
    ([2, 3, 4, 5], [True, False, True, True]),
    ([1, 4], None),
    ([0, 1, 5], [True, True, False]),
]


def test_scaffold_with_equal_clients_is_fedavg():
    everyone = [(range(4), None)] * 4
    plain = play(dense(setup()), everyone, alike(), 4)
    corrected = play(dense(setup(correction=scaffold.control_variates())), everyone, alike(), 4)
    chex.assert_trees_all_equal(corrected[0][0].params, plain[0][0].params)  # nothing known yet
    for (one, _, _), (other, _, _) in zip(corrected, plain, strict=True):
        chex.assert_trees_all_close(one.params, other.params, rtol=1e-5, atol=1e-6)
    control = quadratic.flatten(corrected[-1][0].correction)
    assert np.any(np.asarray(control) != 0.0)


def test_scaffold_follows_its_formulas():
    cohorts = [([0, 3], None), ([3, 4], None)]
    algorithm = dense(setup(correction=scaffold.control_variates()))
    second, after, metrics = play(algorithm, cohorts)[-1]
    sizes = np.diff(np.asarray(PEOPLE.offsets)).astype(float)
    start = np.asarray(quadratic.flatten(quadratic.PARAMS))
    centre = {i: quadratic.mean_point(PEOPLE, i) for i in range(6)}

    def work(here, client_id, own, server):
        """Take two steps; give the end and the new control variate by the paper's option II."""
        there = here
        for _ in range(2):
            there = there - RATE * (there - centre[client_id] - own + server)
        return there, own - server + (here - there) / (2 * RATE)

    own = dict.fromkeys(range(6), np.zeros_like(start))
    server = np.zeros_like(start)
    here = start
    for ids in ([0, 3], [3, 4]):
        ends = {i: work(here, i, own[i], server) for i in ids}
        total = sum(sizes[i] for i in ids)
        here = sum(sizes[i] * ends[i][0] for i in ids) / total
        server = server + sum(sizes[i] * (ends[i][1] - own[i]) for i in ids) / sizes.sum()
        own |= {i: ends[i][1] for i in ids}
    np.testing.assert_allclose(quadratic.flatten(second.params), here, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(quadratic.flatten(second.correction), server, rtol=1e-4, atol=1e-5)
    for i in (0, 3, 4):
        mine = jax.tree.map(lambda leaf, i=i: leaf[i], after.client.control)
        np.testing.assert_allclose(quadratic.flatten(mine), own[i], rtol=1e-4, atol=1e-5)
    sent = ledger.account(metrics, second, algorithm)
    assert sent.uplink.values == sent.downlink.values == 2 * 2 * 32 * quadratic.NUM_WEIGHTS


def masked_methods():
    revise = pruners.chain(
        pruners.prune_to(0.5), pruners.drop(0.3), pruners.grow_to(0.5, score=scores.gradient)
    )
    due = schedules.every(2)

    def dynamic(s):
        client = local_training.local_sgd(
            quadratic.MODEL.loss, batcher=s.batcher, optimizer=s.optimizer, report_grads=due
        )
        return training.training(s, client=client, pruner=pruners.when(due, revise))

    def dip(mode):
        # The smaller penalty of the published setting.
        settings = feddip.FedDIP(**{**feddip.METHOD.law_settings, "mode": mode})
        return lambda s: feddip.build(settings, quadratic.task(s))

    return {"dynamic": dynamic, "masked": dip("masked"), "regrow": dip("regrow")}


@pytest.mark.parametrize(
    "name",
    ["masked", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dynamic", "regrow"))],
)
def test_the_servers_control_variate_is_the_mean_of_the_clients_under_any_masks(name):
    algorithm = masked_methods()[name](setup(correction=scaffold.control_variates()))
    weights = np.diff(np.asarray(PEOPLE.offsets)).astype(np.float32)
    weights /= weights.sum()
    changed = 0
    played = play(algorithm, DROPPING)
    for state, rows, metrics in played:
        mean = jax.tree.map(
            lambda leaf: np.tensordot(weights, np.asarray(leaf), axes=1), rows.client.control
        )
        chex.assert_trees_all_close(state.correction, mean, rtol=1e-4, atol=1e-6)
        pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(state.masks), strict=True)
        assert not any(np.any(np.asarray(leaf)[~np.asarray(mask)]) for leaf, mask in pairs)
        changed += int(metrics.num_changed)
    assert changed > 0
    assert np.any(np.asarray(quadratic.flatten(played[-1][0].correction)))


@pytest.mark.slow
def test_what_is_personal_is_not_corrected_and_its_gradients_stay_at_home():
    """It has no others to drift from: it goes the way that it goes without control variates."""

    def is_own(path, leaf):
        return path == "head/bias"

    def travelling(state):
        return personalization.shared(state.masks, is_own=is_own)

    def make(s):
        client = local_training.local_sgd(
            quadratic.MODEL.loss, batcher=s.batcher, optimizer=s.optimizer
        )
        masking = protocol.Masking(upload=travelling, download=travelling)
        return training.training(
            s, client=personalization.keep_own(client, is_own=is_own), masking=masking
        )

    corrected = play(make(setup(correction=scaffold.control_variates())), DROPPING)
    plain = play(make(setup()), DROPPING)
    state, rows, metrics = corrected[-1]
    np.testing.assert_array_equal(rows.client.inner.own[0], plain[-1][1].client.own[0])
    for control in (state.correction, rows.client.control):
        assert not np.any(control["head"]["bias"])
        assert np.any(control["head"]["kernel"])
    place = trees.paths(state.params).index("head/bias")
    assert metrics.sent.up["reply"]["control"].live_counts[place] == 0
    assert metrics.sent.down["broadcast"]["drift"].live_counts[place] == 0


@pytest.mark.slow
def test_fednova_with_equal_numbers_of_steps_is_fedavg():
    plain = play(dense(setup()), DROPPING)
    for momentum in (0.0, 0.9):
        nova = play(averaged(momentum), DROPPING)
        for (one, _, _), (other, _, _) in zip(nova, plain, strict=True):
            chex.assert_trees_all_close(one.params, other.params, rtol=1e-5, atol=1e-6)


def test_fednova_averages_directions_when_steps_differ():
    ((after, _, _),) = play(averaged(batcher=by_size()), [([0, 3, 2], None)])
    start = np.asarray(quadratic.flatten(quadratic.PARAMS))
    sizes = {0: 3, 3: 8, 2: 2}
    moves = {
        i: (1.0 - (1.0 - RATE) ** n) * (quadratic.mean_point(PEOPLE, i) - start)
        for i, n in sizes.items()
    }
    direction = sum(n * moves[i] / n for i, n in sizes.items()) / 13
    steps = sum(n * n for n in sizes.values()) / 13
    expected = start + steps * direction
    np.testing.assert_allclose(quadratic.flatten(after.params), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_effective_steps_are_how_far_the_optimizer_goes(momentum):
    """Under a constant gradient of 1, SGD of rate 1 goes as far as it has effective steps."""
    optimizer = optax.sgd(1.0, momentum=momentum or None)
    place, state = jnp.float32(0.0), optimizer.init(jnp.float32(0.0))
    for count in range(1, 8):
        update, state = optimizer.update(jnp.float32(1.0), state)
        place = jnp.asarray(optax.apply_updates(place, update))
        found = fednova.effective_steps(jnp.int32(count), momentum=momentum)
        np.testing.assert_allclose(found, -place, rtol=1e-5)


def test_a_client_without_examples_changes_nothing():
    people = quadratic.population(sizes=(3, 0, 4))
    for drift in (
        scaffold.control_variates(),
        fednova.normalized_averaging(batcher=by_size(), momentum=0.5),
    ):
        algorithm = dense(setup(batcher=by_size(), correction=drift))
        with_it = play(algorithm, [([0, 1], None)] * 2, people, 3)[-1]
        without = play(algorithm, [([0, 1], [True, False])] * 2, people, 3)[-1]
        chex.assert_trees_all_equal(with_it[0], without[0])
        chex.assert_trees_all_equal(with_it[1].client, without[1].client)


class Sgd(NamedTuple):
    momentum: float = 0.9
    name: str = "sgd"


class Adam(NamedTuple):
    name: str = "adam"


@pytest.mark.slow
def test_corrections_are_parts_of_the_client():
    batcher = by_size()

    def build(name, optimizer_settings):
        found = registry.find("correction", name)
        return found.part.build(
            found.part.settings(), batcher=batcher, optimizer_settings=optimizer_settings
        )

    assert build("none", Sgd()) is None
    data = [([0, 3, 2], None)]
    for name, expected in (
        ("scaffold", scaffold.control_variates()),
        ("fednova", fednova.normalized_averaging(batcher=batcher, momentum=0.9)),
    ):
        found, wanted = (
            play(dense(setup(batcher=batcher, correction=rule)), data)[-1][0]
            for rule in (build(name, Sgd()), expected)
        )
        chex.assert_trees_all_equal(found, wanted)
    assert build("scaffold", Adam()) is not None
    with pytest.raises(ValueError, match=r"client.optimizer must be 'sgd' with .* got 'adam'"):
        build("fednova", Adam())
    variants = fedavg.METHOD.variants
    assert {name: list(values) for name, values in variants.items()} == {
        "fedprox": ["client.proximal_mu"],
        "scaffold": ["client.correction"],
        "fednova": ["client.correction"],
    }
