"""FL-PQSU: filters kept once, clients that are silent, and what a round of it costs."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import metrics as metrics_lib
from fedjaxprune import trees
from fedjaxprune.costs import ledger
from fedjaxprune.experiment.run import round_costs
from fedjaxprune.federated import downlinks, local_training, selective_sending, uplinks
from fedjaxprune.methods import flpqsu
from fedjaxprune.pruning.structured import filters
from fedjaxprune.rounds import protocol
from fedjaxprune.structure.channels.groups import Group, Member
from fedjaxprune.traffic import SILENT
from fedjaxprune.types import Broadcast, Client, Message, client_data
from fedjaxprune.wire import format as wire_format
from tests import quadratic

KEY = jax.random.key(9)
PEOPLE = quadratic.population()
DATA = client_data(PEOPLE, jnp.int32(0))


def build(*, changes=None, **options):
    base = protocol.Protocol(
        num_rounds=6, batcher=quadratic.full_batches(2), optimizer=optax.sgd(0.1)
    )
    settings = flpqsu.FLPQSU(**{"layers": "all", **options})
    task = quadratic.task(base._replace(**(changes or {})), num_epochs=2)
    return flpqsu.build(settings, task)


def prepared(algorithm):
    """Run the first stage, and compile the second."""
    state = algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})
    first, train = algorithm.stages
    members = quadratic.cohort(algorithm, range(6))
    state, _, _ = jax.jit(first.round)(KEY, state, members, PEOPLE)
    return state, members, jax.jit(train.round)


def test_the_filters_of_largest_l1_norm_stay():
    kernel = jnp.asarray(
        [[0.1, -0.2, 0.3], [0.5, 0, 0], [-0.1, 0.1, 0.05], [0.2, 0.2, -0.2]], jnp.float32
    ).T
    places = np.arange(4)[:, None]
    layer = Group(4, (Member("kernel", 1, places, "filter"),), (), ())
    params = {"kernel": kernel}
    (norms,) = filters.norms(params, (layer,), order=1)
    np.testing.assert_allclose(norms, [0.6, 0.5, 0.25, 0.6], atol=1e-7)
    (keep,) = filters.ranked((layer,), params, filters.full((layer,)), [jnp.int32(2)], order=1)
    assert np.flatnonzero(keep).tolist() == [0, 3]


def test_kept_filters_keep_their_weights_and_their_readers_go():
    algorithm = build(widths=(3, 2), send="always")
    state, _, _ = prepared(algorithm)
    own = jax.device_get(state.masks)
    kernel = np.asarray(quadratic.PARAMS["dense"]["kernel"])
    largest = np.sort(np.argsort(-np.abs(kernel).sum(axis=0), kind="stable")[:3])
    assert np.flatnonzero(own["dense"]["bias"]).tolist() == largest.tolist()
    np.testing.assert_array_equal(own["head"]["kernel"][:, 0], own["dense"]["bias"])
    wanted = jax.tree.map(lambda mask, leaf: np.where(mask, leaf, 0), own, quadratic.PARAMS)
    chex.assert_trees_all_equal(jax.device_get(state.params), wanted)


@pytest.mark.parametrize("widths", [(3,), (5, 2), (1, 2, 3)])
def test_widths_that_do_not_fit_are_refused(widths):
    with pytest.raises(
        ValueError, match=r"method\.widths must have a number for each of the 2 lay"
    ):
        build(widths=widths)


def saying(losses):
    """Make a client that takes one step a round, of the next of some losses."""

    def make(loss, post_step):
        del loss

        def update_fn(key, broadcast, state, data):
            del key, data
            found = {"loss": metrics_lib.Mean(2.0 * losses[state], jnp.float32(2.0))}
            before = local_training.Local((), (), broadcast.model_state)
            step = local_training.LocalStep(before, before, found, jnp.int32(0), jnp.int32(1))
            model_state = post_step(step).model_state
            moved = jax.tree.map(jnp.subtract, model_state, broadcast.model_state)
            return Message({"model_state": moved}, jnp.float32(1.0)), state + 1

        return Client(init=lambda params: jnp.int32(0), update=update_fn)

    return selective_sending.if_improved(make, quadratic.MODEL.loss, num_epochs=1)


def test_a_client_sends_if_its_loss_is_below_that_of_the_last_time():
    client = saying(jnp.asarray([2.3, 1.9, 2.0, 1.8, 1.85], jnp.float32))
    broadcast = Broadcast((), (), {"steps": jnp.float32(1.0)}, jnp.int32(0))
    state, sent, remembered = client.init(()), [], []
    update = jax.jit(client.update)
    for _ in range(5):
        message, after = update(KEY, broadcast, state, DATA)
        silent = bool(message.fields[SILENT])
        state = after._replace(loss=state.loss) if silent else after  # as `rounds` does
        sent.append(not silent)
        remembered.append(round(float(state.loss), 6))
        assert set(message.fields["model_state"]) == {"steps"}
    assert sent == [True, True, False, True, False]
    assert remembered == [2.3, 1.9, 1.9, 1.8, 1.8]


def test_the_loss_is_that_of_the_last_epoch():
    algorithm = build(sparsity=0.0)
    state, members, run = prepared(algorithm)
    _, rows, metrics = run(KEY, state, members, PEOPLE)
    start = quadratic.flatten(quadratic.PARAMS)
    for client in range(6):
        mean = quadratic.mean_point(PEOPLE, client)
        rest = np.asarray(PEOPLE.examples["inputs"])[
            np.asarray(PEOPLE.order)[PEOPLE.offsets[client] : PEOPLE.offsets[client + 1]]
        ]
        at = mean + 0.9 * (np.asarray(start) - mean)  # after the first of two steps
        wanted = np.mean(0.5 * np.sum(np.square(at[None] - rest), axis=1))
        assert float(rows.client.loss[client]) == pytest.approx(wanted, rel=1e-5)
    assert algorithm.diagnostics(jax.device_get(metrics)) == {"num_silent": 0}


def silent_from(rows, clients):
    """Let some clients remember a loss that they cannot fall below."""
    loss = rows.client.loss.at[jnp.asarray(clients)].set(-1.0)
    return rows._replace(client=rows.client._replace(loss=loss))


@functools.cache
def with_feedback():
    feedback = uplinks.error_feedback(uplinks.top_k(fraction=0.25))
    algorithm = build(changes={"uplink": feedback})
    return algorithm, *prepared(algorithm)


def test_a_silent_client_sends_a_bit_and_keeps_what_it_owes():
    algorithm, state, members, run = with_feedback()
    state, rows, _ = run(KEY, state, members, PEOPLE)
    _, _, everybody = run(KEY, state, members, PEOPLE)
    members = members._replace(states=silent_from(rows, [1, 4]))
    after, later, metrics = jax.device_get(run(KEY, state, members, PEOPLE))
    pick = functools.partial(trees.take_rows, rows=jnp.asarray([1, 4]))
    chex.assert_trees_all_equal(pick(later.uplink), pick(rows.uplink))
    chex.assert_trees_all_equal(pick(later.client), pick(members.states.client))
    alone = members._replace(participated=jnp.asarray([i not in (1, 4) for i in range(6)]))
    without, _, _ = run(KEY, state, alone, PEOPLE)
    chex.assert_trees_all_equal(after.params, jax.device_get(without.params))
    assert algorithm.diagnostics(metrics) == {"num_silent": 2}
    assert metrics.num_uploaded[[1, 4]].sum() == 0
    one, all_of_them = (round_costs.of_round(quadratic.profile(), m) for m in (metrics, everybody))
    assert one._replace(unchanged_fraction=1.0) == all_of_them._replace(unchanged_fraction=1.0)
    assert (one.training_flops or {})["forward"] > 0  # they trained all the same
    written = 8 * len(wire_format.encode({SILENT: wire_format.counted(np.ones([], np.bool_))}))
    traffic = ledger.account(metrics, state, algorithm)
    by_client = {i: entry for entry in traffic.clients for i in entry.client_ids}
    assert by_client[1].uplink_bits == by_client[4].uplink_bits == written
    assert by_client[0].uplink_bits > written
    assert by_client[0].downlink_bits == by_client[1].downlink_bits


def test_dense_rounds_are_fedavg_and_what_clients_remember_begins_behind_them():
    """A loss before filters were pruned would keep clients silent after it."""
    algorithm = build(dense_rounds=1)
    assert [stage.name for stage in algorithm.stages] == ["start", "prepare", "train"]
    state = algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})
    members = quadratic.cohort(algorithm, range(6))
    after, rows, metrics = jax.jit(algorithm.stages[0].round)(KEY, state, members, PEOPLE)
    chex.assert_trees_all_equal(rows.client, members.states.client)
    assert SILENT not in metrics.sent.up
    assert not np.array_equal(after.params["head"]["kernel"], state.params["head"]["kernel"])


def test_a_round_in_which_nobody_sends_moves_nothing():
    _, state, members, run = with_feedback()
    members = members._replace(states=silent_from(members.states, range(6)))
    after, rows, metrics = run(KEY, state, members, PEOPLE)
    chex.assert_trees_all_equal(after._replace(round=state.round), state)
    chex.assert_trees_all_equal(
        (rows.client, rows.uplink), (members.states.client, members.states.uplink)
    )
    assert int(metrics.num_rejected) == 0


def test_eight_bits_both_ways_cost_eight_bits_an_entry_and_two_numbers_a_leaf():
    changes = {
        "uplink": uplinks.quantize(bits=8, rounding="nearest"),
        "downlink": downlinks.quantize(bits=8),
    }
    algorithm = build(changes=changes, widths=(3, 2), send="always")
    state, members, run = prepared(algorithm)
    _, _, metrics = run(KEY, state, members, PEOPLE)
    traffic = ledger.account(jax.device_get(metrics), state, algorithm)
    entries = 6 * 3 + 3 + 3 * 2 + 2
    each = 8 * entries + 64 * 4
    assert traffic.uplink.values == traffic.downlink.values == 6 * each
