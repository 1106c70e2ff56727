"""What a method may add to a round: fields, ways of masks, hooks, stages before it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, trees
from fedjaxprune.costs import ledger
from fedjaxprune.federated import aggregators, local_training
from fedjaxprune.pruning import pruners
from fedjaxprune.rounds import server_work, stages
from fedjaxprune.rounds.protocol import (
    FieldSpec,
    Hooks,
    Masking,
    MaskTransport,
    Protocol,
    add_reports,
)
from fedjaxprune.rounds.reporting import Exchange, reporting_round
from fedjaxprune.rounds.training import training
from fedjaxprune.traffic import EVALUATED, FieldLength
from fedjaxprune.types import Client, Message
from tests import quadratic

KEY = jax.random.key(1)
PEOPLE = quadratic.population()
SIZES = np.diff(PEOPLE.offsets)[:4]
SHARED = Protocol(3, quadratic.full_batches(1), optax.sgd(0.1))
CLIENT = local_training.local_sgd(
    quadratic.MODEL.loss, batcher=SHARED.batcher, optimizer=SHARED.optimizer
)
NUM_LEAVES = len(jax.tree.leaves(quadratic.PARAMS))


def start(algorithm):
    return algorithm.init(quadratic.PARAMS, {}), quadratic.cohort(algorithm, range(4))


def run(algorithm, state=None, members=None):
    fresh = start(algorithm)
    state, members = state or fresh[0], members or fresh[1]
    after, rows, metrics = jax.jit(algorithm.stages[0].round)(KEY, state, members, PEOPLE)
    return after, rows, jax.device_get(metrics)


def with_sizes(inner):
    def update(key, broadcast, state, data):
        message, state = inner.update(key, broadcast, state, data)
        return message._replace(fields={**message.fields, "size": data.size}), state

    return inner._replace(update=update)


def halved(state):
    """Prune every second entry of the kernels."""
    every_second = jax.tree.map(
        lambda leaf: jnp.arange(leaf.size).reshape(leaf.shape) % 2 == 0, state.params
    )
    pruned = masks.restrict(every_second, masks.is_kernel)
    return state._replace(masks=pruned, params=masks.apply(pruned, state.params))


def test_a_report_comes_from_each_client_and_costs_nothing():
    plain = training(SHARED, client=CLIENT)
    reporting = training(
        SHARED, client=with_sizes(CLIENT), fields={"size": FieldSpec(send="nothing")}
    )
    state, _, without = run(plain)
    _, _, metrics = run(reporting)
    np.testing.assert_array_equal(metrics.sent.reports["size"], SIZES)
    assert ledger.account(metrics, state, reporting) == ledger.account(without, state, plain)


def test_a_field_must_be_sent_in_a_known_way():
    with pytest.raises(ValueError, match="'size' must be sent as one of whole, masked"):
        training(SHARED, client=CLIENT, fields={"size": FieldSpec(send="half")})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'size' of the exchange 'ask' must be sent as"):
        asking({"size": FieldSpec(send="pairs")})


def test_what_the_server_reads_off_deltas_reaches_the_pruner():
    def update(key, mask_tree, state, inputs):
        del key, state
        return mask_tree, inputs.statistics["squares"]["head"]["kernel"]

    remember = pruners.keep()._replace(
        init=lambda params: jnp.zeros_like(params["head"]["kernel"]), update=update
    )
    squares = FieldSpec(
        aggregators.unweighted_sum(),
        send="nothing",
        read=lambda delta, broadcast: jax.tree.map(jnp.square, delta),
    )
    after, _, metrics = run(
        training(SHARED, client=CLIENT, pruner=remember, fields={"squares": squares})
    )
    begin = quadratic.flatten(quadratic.PARAMS)
    expected = np.zeros(begin.shape)
    for client in range(4):
        expected = expected + np.square(0.1 * (quadratic.mean_point(PEOPLE, client) - begin))
    np.testing.assert_allclose(np.ravel(after.pruner), expected[-8:], rtol=1e-4)
    assert metrics.sent.reports == {}


def test_hooks_see_the_state_that_came_in():
    def before_round(state):
        return state._replace(params=jax.tree.map(lambda leaf: leaf + 1.0, state.params))

    def after_round(before, after, metrics):
        moved = after.params["head"]["bias"] - before.params["head"]["bias"]
        return after, add_reports(metrics, {"moved": moved})

    plain = training(SHARED, client=CLIENT)
    hooked = training(SHARED, client=CLIENT, hooks=Hooks(before_round, after_round))
    state, _ = start(plain)
    expected, _, _ = run(plain, before_round(state))
    found, _, metrics = run(hooked, state)
    np.testing.assert_array_equal(
        quadratic.flatten(found.params), quadratic.flatten(expected.params)
    )
    moved = found.params["head"]["bias"] - state.params["head"]["bias"]
    np.testing.assert_array_equal(metrics.sent.reports["moved"], np.tile(moved, (4, 1)))


def test_masks_travel_as_the_method_says_and_to_those_who_lack_them():
    bit = {"half": jnp.array([True, False])}
    own = MaskTransport(
        encode=lambda state: FieldLength(
            template=trees.shape_only(bit), sent_counts=masks.num_kept(bit)
        )
    )
    never = own._replace(is_needed=lambda state: jnp.bool_(False))
    charged = {}
    for name, transport in {"shortest": MaskTransport(), "own": own, "never": never}.items():
        algorithm = training(SHARED, client=CLIENT, masking=Masking(transport=transport))
        state, members = start(algorithm)
        state = halved(state)._replace(masks_id=jnp.int32(1))
        held = members.states._replace(masks_held=jnp.array([1, 0, 1, 1], jnp.int32))
        _, rows, metrics = run(algorithm, state, members._replace(states=held))
        np.testing.assert_array_equal(rows.masks_held, [1, 1, 1, 1])
        traffic = ledger.account(metrics, state, algorithm)
        charged[name] = traffic.downlink.masks + traffic.downlink.indices
        assert len({entry.downlink_bits for entry in traffic.clients}) == 1 + (name != "never")
    assert charged["shortest"] > charged["own"] == 8  # a byte, to one client
    assert charged["never"] == 0


def asking(fields, **options):
    """Make an exchange in which clients say how many examples they have."""

    def update(key, broadcast, state, data):
        del key, broadcast
        fields = {"size": data.size.astype(jnp.float32), "metrics": server_work.no_loss()}
        return Message(fields, jnp.float32(1.0)), state

    def server_update(key, state, aggregated):
        del key
        return state._replace(method=aggregated["size"])

    return reporting_round(
        SHARED,
        name="ask",
        client=Client(init=lambda params: (), update=update),
        fields=fields,
        server_update=server_update,
        exchange=Exchange(**options),
    )


def test_an_exchange_reports_models_and_ends_when_it_is_over():
    algorithm = training(SHARED, client=CLIENT)
    state, members = start(algorithm)
    state = state._replace(method=jnp.float32(0.0))
    sizes = jnp.asarray(trees.sizes(state.params), jnp.int32)
    stage = asking(
        {"size": FieldSpec()},
        num_rounds=2,
        cohort="everyone",
        compute=lambda state: {EVALUATED: sizes[None]},
        is_over=lambda state: state.method > 0,
    )
    assert (stage.num_rounds, stage.cohort) == (2, "everyone")
    first, _, metrics = jax.jit(stage.round)(KEY, state, members, PEOPLE)
    assert first.method == np.mean(SIZES)
    assert metrics.num_downloaded.shape == (4, 1, NUM_LEAVES)
    assert metrics.sent.reports[EVALUATED].shape == (4, 1, NUM_LEAVES)
    assert not np.any(metrics.num_uploaded)
    second, _, metrics = jax.jit(stage.round)(KEY, first, members, PEOPLE)
    assert second.method == first.method
    assert metrics.num_participating == 0
    traffic = ledger.account(jax.device_get(metrics), state, algorithm)
    assert traffic.uplink_bits == traffic.downlink_bits == 0


@pytest.mark.parametrize(
    ("known_to", "changes", "masks_id"),
    [
        ("holders", True, 1),
        ("holders", False, 0),
        ("everybody", True, 0),
        ("nobody", False, 1),
        ("nobody", True, 1),
    ],
)
def test_who_holds_the_masks_of_a_round_at_the_server(known_to, changes, masks_id):
    def work(key, state, population):
        del key, population
        return (halved(state) if changes else state), server_work.no_loss()

    state, members = start(training(SHARED, client=CLIENT))
    stage = server_work.server_round("work", work, masks_known_to=known_to)
    after, _, metrics = jax.jit(stage.round)(KEY, state, members, PEOPLE)
    assert after.masks_id == masks_id
    assert metrics.num_downloaded.shape == (4, 1, NUM_LEAVES)


def test_stages_count_their_own_rounds_and_deploy_under_masks():
    def work(key, state, population):
        del key, population
        return state._replace(method=state.method + state.round), server_work.no_loss()

    prepare = server_work.server_round("prepare", work, num_rounds=2)
    algorithm = stages.in_order(
        training(SHARED, client=CLIENT),
        (prepare, prepare),
        init=lambda state: state._replace(method=jnp.int32(0)),
    )
    assert [stage.num_rounds for stage in algorithm.stages] == [2, 2, 3]
    state, members = start(algorithm)
    for stage in algorithm.stages[:2]:
        for _ in range(2):
            state, _, _ = jax.jit(stage.round)(KEY, state, members, PEOPLE)
    assert (state.round, state.method) == (4, 2)
    state, _, metrics = jax.jit(algorithm.stages[2].round)(KEY, state, members, PEOPLE)
    assert (state.round, metrics.sent.round) == (5, 0)
    pruned = state._replace(masks=halved(state).masks)
    np.testing.assert_array_equal(
        quadratic.flatten(algorithm.deployed_params(pruned)),
        quadratic.flatten(masks.apply(pruned.masks, state.params)),
    )


def test_nothing_to_prune_is_one_sentence():
    sentence = "there is nothing to prune: none of the leaves dense/bias, dense/kernel"
    plain = training(SHARED, client=CLIENT, prunable=lambda path, leaf: False)
    pruning = training(
        SHARED, client=CLIENT, pruner=pruners.prune_to(0.5), prunable=lambda path, leaf: False
    )
    for algorithm in (pruning, stages.in_order(plain, (), sparsity=0.5)):
        with pytest.raises(ValueError, match=sentence):
            algorithm.init(quadratic.PARAMS, {})
    assert stages.in_order(plain, ()).init(quadratic.PARAMS, {}).round == 0
