"""Attacks: what hostile clients send, in leaves by hand and in rounds with known answers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import registry, trees, types
from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.config import resolve
from fedjaxprune.experiment.run import build
from fedjaxprune.federated import aggregators, attacks, local_training, uplinks
from fedjaxprune.federated.corrections import scaffold
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.rounds.training import training
from fedjaxprune.types import Client, ClientData, Message
from tests import quadratic

KEY = jax.random.key(5)
PEOPLE = quadratic.population()
STATE = {"steps": jnp.float32(0.0)}
START = np.asarray(quadratic.flatten(quadratic.PARAMS))
BASE = Protocol(3, quadratic.full_batches(1), optax.sgd(0.5))
MEAN = aggregators.unweighted_mean()
ATTACKS = {
    "sign_flip": attacks.sign_flip(),
    "scaling": attacks.scaling(factor=3.0),
    "nan": attacks.nan(),
    "label_flip": attacks.label_flip(num_classes=4),
    "little_is_enough": attacks.little_is_enough(deviations=1.5),
    "inner_product": attacks.inner_product(strength=2.0),
}


def played(ids=(0, 1, 2, 3), *, present=None, people=PEOPLE, params=quadratic.PARAMS, **changes):
    """Play one round; give the state, the rows and the metrics."""
    protocol = BASE._replace(**{"aggregator": MEAN, **changes})
    client = local_training.local_sgd(
        quadratic.MODEL.loss, batcher=protocol.batcher, optimizer=protocol.optimizer
    )
    algorithm = training(protocol, client=client)
    state = algorithm.init(params, STATE)
    members = quadratic.cohort(algorithm, ids, present, params)
    return jax.jit(algorithm.stages[0].round)(KEY, state, members, people)


def moved(result):
    return np.asarray(quadratic.flatten(result[0].params)) - START


def delta(client_id):
    """Say where one step of rate 1/2 leads an honest client."""
    return 0.5 * (quadratic.mean_point(PEOPLE, client_id) - START)


def by(attack, *client_ids):
    return attacks.Attackers(attack=attack, client_ids=client_ids)


HONEST = [delta(i) for i in (0, 2, 3)]
SENT = {
    "sign_flip": -delta(1),
    "scaling": 3.0 * delta(1),
    "little_is_enough": np.mean(HONEST, axis=0) - 1.5 * np.std(HONEST, axis=0),
    "inner_product": -2.0 * np.mean(HONEST, axis=0),
    "label_flip": delta(1),  # this loss has no labels
}


@pytest.mark.usual("sign_flip-1", "inner_product-3", "label_flip-1")
@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [
        ("sign_flip", 1),
        ("scaling", 3),
        ("label_flip", 1),
        ("little_is_enough", 1),
        ("inner_product", 3),
    ],
)
def test_a_hostile_client_sends_what_the_attack_says(name, chunk_size):
    result = played(attackers=by(ATTACKS[name], 1, 5), chunk_size=chunk_size)
    expected = (np.sum(HONEST, axis=0) + SENT[name]) / 4
    np.testing.assert_allclose(moved(result), expected, rtol=1e-4, atol=1e-5)
    assert result[2].num_rejected == 0
    np.testing.assert_array_equal(
        result[1].client.is_hostile, jnp.array([False, True, False, False])
    )


def test_nan_is_rejected_and_the_others_go_on():
    result = played(attackers=by(ATTACKS["nan"], 1))
    np.testing.assert_allclose(moved(result), np.mean(HONEST, axis=0), rtol=1e-4, atol=1e-5)
    assert result[2].num_rejected == 1


@pytest.mark.parametrize(
    ("client_ids", "said"),
    [
        ((99,), r"less than the number of clients \(6\) and not negative, got 99"),
        ((0, -1), "not negative, got -1"),
        ((1.7,), r"different client numbers, at least one, got \(1.7,\)"),
        ((True,), "different client numbers"),
        ((0, 0), "different client numbers"),
        ((), "at least one"),
    ],
)
def test_attackers_are_clients_of_the_population(client_ids, said):
    with pytest.raises(ValueError, match=said):
        played(attackers=attacks.Attackers(ATTACKS["nan"], client_ids))


def cut(tree):
    return jax.tree.map(lambda leaf: leaf[..., :1] if leaf.ndim else leaf, tree)


def test_an_uplink_and_an_aggregator_keep_the_shapes():
    narrow = uplinks.identity()._replace(
        update=lambda key, delta, state, masks: (cut(delta), state)
    )
    with pytest.raises(ValueError, match=r"what the uplink sends must have shape .* at .*, got"):
        played(uplink=narrow)
    first = types.CohortAggregator(
        reduce=lambda values, masks, weights: cut(jax.tree.map(lambda leaf: leaf[0], values))
    )
    with pytest.raises(ValueError, match=r"the aggregated delta must have shape .* at .*, got"):
        played(aggregator=first)
    none = uplinks.identity()._replace(update=lambda key, delta, state, masks: ({}, state))
    with pytest.raises(ValueError, match="must be a tree like the parameters, got no leaves"):
        played(uplink=none)


def test_without_a_hostile_client_in_the_cohort_nothing_changes():
    honest = played(present=[True, False, True, True])
    for attack, client_id in ((ATTACKS["scaling"], 5), (ATTACKS["inner_product"], 1)):
        result = played(present=[True, False, True, True], attackers=by(attack, client_id))
        chex.assert_trees_all_close(result[0], honest[0], rtol=1e-6, atol=1e-7)


def test_the_order_of_the_cohort_is_irrelevant_to_an_attack():
    given = {
        "attackers": by(ATTACKS["little_is_enough"], 1),
        "aggregator": aggregators.multi_krum(tolerated=0.3),
    }
    first, second = played((0, 1, 2, 3), **given), played((3, 1, 0, 2), **given)
    chex.assert_trees_all_close(first[0].params, second[0].params, rtol=1e-5, atol=1e-6)


def test_colluders_keep_to_the_weights_of_a_weighted_mean():
    result = played(attackers=by(ATTACKS["inner_product"], 1), aggregator=None)
    sizes = np.array([3, 5, 2, 8])
    sent = [HONEST[0], SENT["inner_product"], HONEST[1], HONEST[2]]
    np.testing.assert_allclose(moved(result), sizes @ np.array(sent) / 18, rtol=1e-4, atol=1e-5)


@pytest.mark.usual("little_is_enough")
@pytest.mark.parametrize("name", ["scaling", "little_is_enough"])
def test_masks_uplinks_and_corrections_hold_under_attack(name):
    """What is pruned stays exact zero, whatever is sent; a residual is the client's own."""

    def halved(path, leaf):
        return jnp.arange(leaf.size).reshape(leaf.shape) % 2 == 0

    protocol = BASE._replace(
        uplink=uplinks.error_feedback(uplinks.top_k(fraction=0.5)),
        correction=scaffold.control_variates(),
        attackers=by(ATTACKS[name], 1),
        aggregator=aggregators.geometric_median(num_iterations=2),
    )
    client = local_training.local_sgd(
        quadratic.MODEL.loss, batcher=protocol.batcher, optimizer=protocol.optimizer
    )
    algorithm = training(protocol, client=client)
    state = algorithm.init(quadratic.PARAMS, STATE)
    masks = trees.map_with_path(halved, state.params)
    state = state._replace(
        masks=masks, params=jax.tree.map(jnp.multiply, state.params, jax.tree.map(_ones, masks))
    )
    members = quadratic.cohort(algorithm, (0, 1, 2, 3))
    after, _, _ = jax.jit(algorithm.stages[0].round)(KEY, state, members, PEOPLE)
    for mask, leaf in zip(*map(jax.tree.leaves, (masks, after.params)), strict=True):
        assert np.all(np.asarray(leaf)[~np.asarray(mask)] == 0.0)
        assert np.all(np.isfinite(leaf))


def _ones(mask):
    return mask.astype(jnp.float32)


def test_an_attack_goes_around_any_client():
    def update(key, broadcast, state, data):
        del key, broadcast
        labels = data.examples["labels"]
        fields = {"delta": labels.astype(jnp.float32), "metrics": {"loss": jnp.float32(1.0)}}
        return Message(fields=fields, weight=jnp.float32(1.0)), state

    inner = Client(init=lambda params: (), update=update)
    data = ClientData({"labels": jnp.array([0, 1, 3, -1])}, jnp.arange(4), jnp.int32(0), 4, 0)  # pyright: ignore[reportArgumentType]
    for name, expected in (
        ("label_flip", [3.0, 2.0, 0.0, -1.0]),
        ("sign_flip", [-0.0, -1.0, -3.0, 1.0]),
        ("scaling", [0.0, 3.0, 9.0, -3.0]),
        ("inner_product", [0.0, 1.0, 3.0, -1.0]),  # which one client alone cannot do
    ):
        message, _ = attacks.hostile(inner, ATTACKS[name]).update(KEY, None, (), data)  # pyright: ignore[reportArgumentType]
        np.testing.assert_array_equal(message.fields["delta"], expected)
        assert message.fields["metrics"]["loss"] == 1.0
        both = attacks.among(inner, ATTACKS[name])
        state = both.init(None)
        assert not state.is_hostile
        message, after = both.update(KEY, None, state, data)  # pyright: ignore[reportArgumentType]
        np.testing.assert_array_equal(message.fields["delta"], [0.0, 1.0, 3.0, -1.0])
        state = state._replace(is_hostile=jnp.bool_(True))
        message, after = both.update(KEY, None, state, data)  # pyright: ignore[reportArgumentType]
        np.testing.assert_array_equal(message.fields["delta"], expected)
        assert after.is_hostile


def test_a_little_is_enough_by_its_table():
    # Of 50 clients 24 are hostile: two of 26 honest ones must lie further out, 24 / 26 -> 1.426.
    values = jnp.concatenate([jnp.full(24, 1e9), jnp.tile(jnp.array([-1.0, 3.0]), 13)])
    hostile = jnp.arange(50) < 24
    forged = attacks.little_is_enough(deviations=None).collude(values, hostile, ~hostile)  # pyright: ignore[reportOptionalCall]
    np.testing.assert_allclose(forged[:24], 1.0 - 1.426 * 2.0, rtol=1e-3)
    np.testing.assert_array_equal(forged[24:], values[24:])
    few = jnp.arange(50) < 5  # of 31: 11 of 26 must lie further out, 15 / 26 -> 0.194
    forged = attacks.little_is_enough(deviations=None).collude(values, few, ~hostile)  # pyright: ignore[reportOptionalCall]
    np.testing.assert_allclose(forged[:5], 1.0 - 0.194 * 2.0, rtol=1e-3)
    two = jnp.arange(50) >= 48  # one of two must: the mean itself is sent
    forged = attacks.little_is_enough(deviations=None).collude(values, jnp.arange(50) < 1, two)  # pyright: ignore[reportOptionalCall]
    np.testing.assert_allclose(forged[0], 1.0, rtol=1e-6)


def test_what_a_personal_mask_switches_off_stays_zero_for_colluders():
    values = jnp.array([[4.0, 0.0], [1.0, 3.0], [3.0, 5.0]])
    masks = jnp.array([[True, False], [True, True], [True, True]])
    hostile = jnp.array([True, False, False])
    rule = attacks.together(aggregators.stack(), ATTACKS["inner_product"], hostile)
    np.testing.assert_array_equal(
        rule.reduce(values, masks, jnp.ones(3)), [[-4.0, 0.0], [1.0, 3.0], [3.0, 5.0]]
    )
    rule = attacks.together(aggregators.holder_mean(), ATTACKS["inner_product"], hostile)
    np.testing.assert_allclose(rule.reduce(values, masks, jnp.ones(3)), [0.0, 4.0], atol=1e-6)


def test_counts_and_flags_of_a_message_are_not_attacked():
    values = {"count": jnp.array([1, 2]), "flag": jnp.array([True, False]), "x": jnp.ones(2)}
    hostile = jnp.array([True, False])
    rule = attacks.together(aggregators.stack(), ATTACKS["inner_product"], hostile)
    result = rule.reduce(values, None, jnp.ones(2))
    chex.assert_trees_all_equal(result, {**values, "x": jnp.array([-2.0, 1.0])})
    inner = Client(
        init=lambda params: (),
        update=lambda key, broadcast, state, data: (
            Message(fields={"delta": values}, weight=jnp.float32(1.0)),
            state,
        ),
    )
    message, _ = attacks.hostile(inner, ATTACKS["sign_flip"]).update(KEY, None, (), None)  # pyright: ignore[reportArgumentType]
    chex.assert_trees_all_equal(message.fields["delta"], {**values, "x": -jnp.ones(2)})


def test_hostile_clients_are_drawn_by_the_seed_and_in_decimals():
    draw = functools.partial(attacks.choose, num_clients=100)
    chosen = draw(np.random.default_rng(0), fraction=0.29)
    assert chosen == draw(np.random.default_rng(0), fraction=0.29)
    assert chosen == tuple(sorted(set(chosen)))
    assert len(chosen) == 29
    assert chosen != draw(np.random.default_rng(1), fraction=0.29)
    with pytest.raises(ValueError, match=r"0\.001 of 100 clients is nobody"):
        draw(np.random.default_rng(0), fraction=0.001)
    for wrong in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\), got"):
            draw(np.random.default_rng(0), fraction=wrong)


def test_the_server_judges_by_training_on_its_own_examples():
    """It takes a client's step from the same start, so it trusts those who step as it does."""
    rule = aggregators.server_trust()
    points = np.asarray(PEOPLE.examples["inputs"])[:3].mean(axis=0)
    own = 0.5 * (points - START)
    sent = np.stack([-delta(0), *(delta(i) for i in (1, 2, 3))])
    cosines = sent @ own / np.linalg.norm(sent, axis=1) / np.linalg.norm(own)
    trust = np.maximum(cosines, 0.0)
    lengths = np.linalg.norm(sent, axis=1)[:, None]
    expected = trust @ (sent / lengths * np.linalg.norm(own)) / trust.sum()
    # The small network's state is a count of steps: the server counts as the clients do.
    result = played(attackers=by(ATTACKS["sign_flip"], 0), aggregator=rule)
    np.testing.assert_allclose(moved(result), expected, rtol=1e-4, atol=1e-5)


def test_a_server_without_examples_cannot_judge():
    with pytest.raises(ValueError, match=r"set `server\.data_fraction`"):
        played(aggregator=aggregators.server_trust(), people=PEOPLE._replace(held=()))


SMALL = {
    "method": "fedavg",
    "federation": {"num_rounds": 2, "cohort_size": 2},
    "data.num_clients": 5,
    "client.steps": 1,
    "execution": {"devices": 1, "chunk_size": 1},
}


def test_a_config_names_attack_and_aggregator():
    attack = {"name": "little_is_enough", "deviations": 1.5}
    config = resolve.resolve(
        {**SMALL, "federation.attack": attack, "server.aggregator": "server_trust"}
        | {"server.data_fraction": 0.1}
    )
    parts = build.build(config)
    assert parts.config.federation.attack.deviations == 1.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"server.aggregator": "server_trust"}, r"'server_trust' .* set server\.data_fraction"),
        ({"federation.hostile_fraction": 0.2}, r"hostile_fraction needs a federation\.attack"),
        (
            {"federation.attack": "nan", "federation.hostile_fraction": 0.1},
            "a fraction of 0.1 of 5 clients is nobody",
        ),
        ({"federation.attack": "sign_flips"}, "federation.attack must be one of .*'sign_flip'"),
        (
            {"federation.attack": "nan", "federation.hostile_fraction": 1.0},
            r"federation\.hostile_fraction must be a number in \(0, 1\)",
        ),
        ({"server.aggregator": {"name": "krum", "tolerated": 0.5}}, r"tolerated .* \[0, 0.5\)"),
    ],
)
def test_a_config_of_hostile_clients_that_makes_no_sense_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        build.build(resolve.resolve({**SMALL, **changes}))


@pytest.mark.parametrize("name", registry.names("attack"))
def test_every_attack_is_built_by_its_name(name):
    part = registry.find("attack", name).part
    made = part.build(part.settings(), num_classes=10)
    assert (made is None) == (name == "none")


def test_labels_that_are_no_classes_cannot_be_flipped():
    with pytest.raises(ValueError, match="needs at least 2 classes, and the data have 0"):
        attacks.label_flip(num_classes=0)
    data = ClientData(
        {"labels": jnp.ones(4)}, jnp.arange(4), jnp.int32(0), jnp.int32(4), jnp.int32(0)
    )
    with pytest.raises(ValueError, match="needs integer classes, and the labels are float32"):
        attacks.label_flip(num_classes=2).poison(data)  # pyright: ignore[reportOptionalCall]
