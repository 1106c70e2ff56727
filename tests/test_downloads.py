"""What clients of a round are sent by what each holds: parameters, announced constants, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, registry, trees
from fedjaxprune.costs import ledger
from fedjaxprune.federated import downlinks, local_training, uplinks
from fedjaxprune.rounds import controls, protocol
from fedjaxprune.rounds.protocol import Announcement, Hooks, Masking, MaskTransport
from fedjaxprune.rounds.training import training
from fedjaxprune.wire import format as wire_format
from fedjaxprune.wire import messages
from tests import quadratic

KEY = jax.random.key(1)
PEOPLE = quadratic.population()
STATE = {"steps": jnp.float32(0.0)}
SHARED = protocol.Protocol(3, quadratic.full_batches(2), optax.sgd(0.1))
CLIENT = local_training.local_sgd(
    quadratic.MODEL.loss, batcher=SHARED.batcher, optimizer=SHARED.optimizer
)
SIZES = trees.sizes(quadratic.PARAMS)


def play(algorithm, cohorts, *, start=None):
    """Play a round for each cohort of ids and who takes part; yield what comes before and after."""
    state = algorithm.init(quadratic.PARAMS, STATE) if start is None else start(algorithm)
    rows = quadratic.cohort(algorithm, range(6)).states
    run = jax.jit(algorithm.stages[-1].round)
    for index, (ids, present) in enumerate(cohorts):
        ids = jnp.asarray(ids)
        members = quadratic.cohort(algorithm, ids, present)
        members = members._replace(states=trees.take_rows(rows, ids))
        before, held = state, rows
        state, own, metrics = run(jax.random.fold_in(KEY, index), state, members, PEOPLE)
        rows = jax.tree.map(lambda all_, new, ids=ids: all_.at[ids].set(new), rows, own)
        yield before, held, state, rows, jax.device_get(metrics)


def downloads(algorithm, metrics, state):
    """Say what each client is sent, in bits, and of what kind."""
    traffic = ledger.account(metrics, state, algorithm)
    by_client = {i: one.downlink_bits for one in traffic.clients for i in one.client_ids}
    return by_client, traffic.downlink


def trained(downlink, **options):
    return training(SHARED._replace(downlink=downlink), client=CLIENT, **options)


def test_by_default_there_is_no_downlink_and_nothing_is_remembered():
    part = registry.find("downlink", "identity").part
    algorithm = trained(part.build(part.settings()))
    assert algorithm.init(quadratic.PARAMS, STATE).downlink == ()
    assert algorithm.init_client(quadratic.PARAMS).held == {}


COHORTS = [
    (range(4), [True] * 4),
    (range(4), [True, False, True, True]),
    ([2, 3, 4, 5], [True] * 4),
    (range(4), [False] * 4),
    (range(4), [True] * 4),
]


def test_all_changes_are_no_downlink_to_the_bit_and_cost_as_much_where_all_change():
    plain, exact = trained(None), trained(downlinks.top_k(fraction=1.0))
    for one, two in zip(play(plain, COHORTS), play(exact, COHORTS), strict=True):
        (before, _, after, _, metrics), (_, held, again, rows, others) = one, two
        jax.tree.map(np.testing.assert_array_equal, after.params, again.params)
        wanted, kinds = downloads(plain, metrics, before)
        found, own = downloads(exact, others, before)
        ids, present = others.sent.client_ids, others.participated
        number = int(again.downlink.version)
        assert rows.held["params"][ids].tolist() == [
            number if here else int(held.held["params"][i])
            for i, here in zip(ids.tolist(), present.tolist(), strict=True)
        ]
        if int(before.round) != 4:  # in which nothing has changed since a round without messages
            assert (found, own) == (wanted, kinds)


def test_a_round_that_does_not_count_leaves_what_clients_hold():
    algorithm = trained(downlinks.top_k(fraction=0.25))
    *_, (before, held, after, rows, metrics) = play(algorithm, COHORTS[:4])
    assert not np.any(metrics.participated)
    jax.tree.map(np.testing.assert_array_equal, after.downlink, before.downlink)
    jax.tree.map(np.testing.assert_array_equal, rows, held)
    assert sorted(downloads(algorithm, metrics, before)[0]) == [0, 1, 2, 3]  # all the same


def test_clients_train_from_what_they_see_and_the_server_moves_what_it_has():
    """Two steps of rate .1 on full batches lead from `s` to ``.81 s + .19 c`` for a center `c`."""
    algorithm = trained(downlinks.quantize(bits=3))
    [(before, _, after, _, _)] = play(algorithm, [([0], [True])])
    center = quadratic.mean_point(PEOPLE, 0)
    seen, _ = downlinks.quantize(bits=3).update(KEY, before.params, (), before.masks)
    exact, seen = (quadratic.flatten(tree) for tree in (before.params, seen))
    assert np.max(np.abs(exact - seen)) > 0.05
    wanted = exact + 0.19 * (center - seen)
    np.testing.assert_allclose(quadratic.flatten(after.params), wanted, rtol=1e-5, atol=1e-6)


def test_eight_bits_both_ways_are_charged_by_entry_and_leaf():
    """FL-PQSU: 8 bits an entry and two numbers a leaf, both ways, beside framing."""
    given = SHARED._replace(
        uplink=uplinks.quantize(bits=8, rounding="nearest"), downlink=downlinks.quantize(bits=8)
    )
    algorithm = training(given, client=CLIENT)
    [(before, _, _, _, metrics)] = play(algorithm, COHORTS[1:2])
    traffic = ledger.account(metrics, before, algorithm)
    each = 8 * sum(SIZES) + 64 * len(SIZES)
    assert (traffic.downlink.values, traffic.uplink.values) == (4 * each, 3 * each)
    blank = {
        f"params/{path}": wire_format.levels(
            np.zeros(leaf.shape, np.uint16), bits=8, scales=np.zeros(2)
        )
        for path, leaf in trees.items(quadratic.PARAMS)
    }
    data = wire_format.encode({**messages.whole("model_state", STATE), **blank})
    assert traffic.downlink_bits == 4 * 8 * len(data)


def test_a_control_starts_its_downlink_afresh():
    given = SHARED._replace(downlink=downlinks.top_k(fraction=0.25), num_rounds=2)
    task = quadratic.task(given)
    method = training(given, client=CLIENT)
    algorithm = controls.reinitialized(method, task)
    state = algorithm.init(quadratic.PARAMS, STATE)
    members, number, sent = quadratic.cohort(algorithm, range(6)), 0, None
    for stage in algorithm.stages:
        for _ in range(stage.num_rounds):
            run = jax.jit(stage.round)
            state, rows, metrics = run(jax.random.fold_in(KEY, number), state, members, PEOPLE)
            members, number, sent = members._replace(states=rows), number + 1, metrics.sent
            if stage.name == "retrain" and number == 4:  # behind two rounds and the control
                counts = metrics.sent.down["downlink"]["params"].sent_counts
                assert np.array_equal(counts, [SIZES] * 6)
    assert int(state.downlink.version) == 4
    assert sent is not None
    assert members.states.held["params"].tolist() == [4] * 6
    counts = sent.down["downlink"]["params"].sent_counts
    assert np.array_equal(counts, [[1, 6, 1, 2]] * 6)  # a quarter of each leaf


def announcing(**options):
    """Tell clients a constant that grows in the third round, and a bit that follows from it."""

    def fields(state):
        return {"constant": jnp.where(state.round < 2, 1.0, 2.0), "bits": jnp.ones(16, jnp.bool_)}

    version = {"constant": lambda state: jnp.where(state.round < 2, 1, 2).astype(jnp.int32)}
    told = Announcement(fields, lambda state: state.round != 1, **options | {"versions": version})
    return training(SHARED, client=CLIENT, hooks=Hooks(announcement=told))


def test_a_constant_is_sent_to_those_who_hold_another_one():
    algorithm = announcing(derived=("bits",))
    cohorts = [(range(4), [True, True, False, True])] * 2 + [([0, 1, 2, 5], [True] * 4)] * 2
    ids, sent, held = [], [], []
    for _, _, _, rows, metrics in play(algorithm, cohorts):
        fields = metrics.sent.down["broadcast"]
        assert "bits" not in fields
        ids.append(metrics.sent.client_ids.tolist())
        sent.append(np.asarray(metrics.sent.client_ids)[fields["constant"].clients].tolist())
        held.append(rows.held["constant"].tolist())
    assert sent == [[0, 1, 2, 3], [], [0, 1, 2, 5], []]  # in the second round it is not due
    assert held == [[1, 1, 0, 1, 0, 0]] * 2 + [[2, 2, 2, 1, 0, 2]] * 2


def test_a_constant_costs_its_length_where_it_is_sent():
    plain = training(SHARED, client=CLIENT)
    told = announcing()
    cohorts = [(range(4), [True] * 4), (range(4), [True] * 4), ([0, 1, 4, 5], [True] * 4)]
    extra = []
    for one, two in zip(play(plain, cohorts), play(told, cohorts), strict=True):
        (before, _, _, _, metrics), (_, _, _, _, others) = one, two
        without, own = (downloads(*each, before)[0] for each in ((plain, metrics), (told, others)))
        extra.append([own[i] - without[i] for i in sorted(own)])
    bit, constant = (
        8 * (len(wire_format.encode(message)) - wire_format.frame_bytes(1))
        for message in (
            {"bits": wire_format.counted(np.ones(16, np.bool_))},
            messages.whole("constant", np.float32(1.0)),
        )
    )
    assert extra == [[bit + constant] * 4, [0] * 4, [bit + constant] * 4]


def test_masks_are_sent_never_or_where_they_changed_or_always():
    charged = {}
    for word in ("never", "changed", "always"):
        algorithm = trained(None, masking=Masking(transport=MaskTransport(charged=word)))
        half = jax.tree.map(
            lambda leaf: jnp.arange(leaf.size).reshape(leaf.shape) % 2 == 0, quadratic.PARAMS
        )
        half = masks.restrict(half, masks.is_kernel)
        state = algorithm.init(quadratic.PARAMS, STATE)._replace(masks=half, masks_id=jnp.int32(1))
        members = quadratic.cohort(algorithm, range(4))
        rows = members.states._replace(masks_held=jnp.array([1, 0, 1, 1], jnp.int32))
        members = members._replace(states=rows)
        _, _, metrics = jax.jit(algorithm.stages[0].round)(KEY, state, members, PEOPLE)
        charged[word], _ = downloads(algorithm, jax.device_get(metrics), state)
    flags = masks.prunable_leaves(half, masks.is_kernel)
    length = 8 * len(wire_format.encode(messages.masks_in_force(half, flags)))
    extra = {
        word: [bits[i] - charged["never"][i] for i in range(4)] for word, bits in charged.items()
    }
    assert extra == {"never": [0] * 4, "changed": [0, length, 0, 0], "always": [length] * 4}


def test_an_own_downlink_is_held_to_its_shapes_and_to_both_of_its_halves():
    own = downlinks.top_k(fraction=0.5)
    with pytest.raises(ValueError, match=r"both `version` and `due`, .* got only `version`"):
        trained(own._replace(due=None))

    def narrow(key, params, state, received):
        return jax.tree.map(lambda leaf: leaf[:1], params), state

    algorithm = trained(own._replace(update=narrow))
    with pytest.raises(
        ValueError, match=r"what the downlink shows must have shape \(4,\) at dense"
    ):
        next(play(algorithm, COHORTS[:1]))
