"""One conformance table: every law over every method, uplink and server."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, trees
from fedjaxprune.algorithms import compose, fedavg, feddip
from fedjaxprune.base import ClientData
from fedjaxprune.federated import aggregators, clients, servers, uplink
from fedjaxprune.pruning import pruners, schedules, scores
from tests import quadratic

KEY = jax.random.key(3)
PEOPLE = quadratic.population()
ROUNDS = 6
STATE = {"steps": jnp.float32(0.0)}


def setup(**changes):
    base = compose.Setup(
        num_rounds=ROUNDS, batcher=quadratic.full_batches(2), optimizer=optax.sgd(0.1)
    )
    return base._replace(**changes)


def dip(**options):
    settings = {
        "final_sparsity": 0.75,
        "initial_sparsity": 0.25,
        "period": 2,
        "num_segments": 3,
        "max_penalty": 0.01,
        **options,
    }
    return lambda s: feddip.feddip(quadratic.MODEL, s, **settings)


def dynamic_sparse(s):
    revise = pruners.chain(
        pruners.prune_to(0.6), pruners.drop(0.3), pruners.grow_to(0.6, score=scores.gradient)
    )
    due = schedules.every(2)
    client = clients.local_sgd(
        quadratic.MODEL.loss, batcher=s.batcher, optimizer=s.optimizer, report_grads=due
    )
    return compose.compose(s, client=client, pruner=pruners.when(due, revise))


ALGORITHMS = {
    "fedavg": lambda s: fedavg.fedavg(quadratic.MODEL, s),
    "fedprox": lambda s: fedavg.fedprox(quadratic.MODEL, s, mu=0.1),
    "feddip": dip(),
    "feddip_regrow": dip(mode="regrow"),
    "feddip_dense": dip(mode="dense"),
    "feddip_without_penalty": dip(max_penalty=0.0),
    "feddip_without_pruning": lambda s: feddip.feddip_without_pruning(quadratic.MODEL, s),
    "dynamic_sparse": dynamic_sparse,
}
SERVERS = {
    "fedavg": servers.fedavg(),
    "fedavgm": servers.fedavgm(learning_rate=0.5, momentum=0.9),
    "fedadam": servers.fedadam(learning_rate=0.1),
    "fedyogi": servers.fedyogi(learning_rate=0.1),
}
UPLINKS = {
    "identity": uplink.identity(),
    "feedback_top_k": uplink.error_feedback(uplink.top_k(fraction=0.25)),
    "feedback_sign": uplink.error_feedback(uplink.sign()),
    "random_k": uplink.random_k(fraction=0.5),
    "quantise": uplink.quantise(bits=4),
}
every_algorithm = pytest.mark.parametrize("name", sorted(ALGORITHMS))


def each_once(name, others, usual):
    """Pair every algorithm with the usual part, and FedDIP with every part: not the product."""
    pairs = {(algorithm, usual) for algorithm in ALGORITHMS} | {("feddip", o) for o in others}
    return pytest.mark.parametrize(("name", name), sorted(pairs))


@functools.cache
def built(name, *, server="fedavg", wire="identity", chunk_size=1):
    """Build and jit once for all tests: compiling is what they spend their time on."""
    parts = setup(server=SERVERS[server], uplink=UPLINKS[wire], chunk_size=chunk_size)
    algorithm = ALGORITHMS[name](parts)
    return algorithm, jax.jit(algorithm.stages[0].round)


def simulate(algorithm, cohorts, *, num_rounds=ROUNDS, start=None, run=None):
    """Run rounds over a population's rows; give all states, the last rows and all metrics."""
    run = jax.jit(algorithm.stages[0].round) if run is None else run
    state = algorithm.init(quadratic.PARAMS, STATE) if start is None else start
    everyone = quadratic.cohort(algorithm, range(6)).states
    history, states = [], []
    for index in range(num_rounds):
        ids, present = cohorts(index)
        ids = jnp.asarray(ids, jnp.int32)
        members = quadratic.cohort(algorithm, ids, present)._replace(
            states=trees.take(everyone, ids)
        )
        state, rows, metrics = run(jax.random.fold_in(KEY, index), state, members, PEOPLE)
        everyone = jax.tree.map(lambda all_, new, ids=ids: all_.at[ids].set(new), everyone, rows)
        history.append(metrics)
        states.append(state)
    return states, everyone, history


def some(index):
    ids = [(index + j) % 6 for j in range(4)]
    return ids, [True, index % 3 != 1, True, True]


@each_once("server", SERVERS, "fedavgm")
def test_pruned_entries_are_exact_zeros_in_parameters_and_server_memory(name, server):
    algorithm, run = built(name, server=server)
    states, _, _ = simulate(algorithm, some, run=run)
    for state in states:
        chex.assert_trees_all_equal_shapes(state.masks, state.params)
        assert all(leaf.dtype == jnp.bool_ for leaf in jax.tree.leaves(state.masks))
        pruned = jax.tree.map(jnp.logical_not, state.masks)
        assert not np.any(quadratic.flatten(masks.apply(pruned, algorithm.deployed(state))))
        if name != "feddip_dense":  # whose server keeps dense values on purpose
            optax.tree.map_params(
                SERVERS[server],
                lambda leaf, hidden: np.testing.assert_array_equal(leaf[hidden], 0.0),
                state.server,
                pruned,
            )
        assert np.all(state.masks["dense"]["bias"])


@every_algorithm
def test_a_round_is_traced_once_whatever_changes(name):
    chex.clear_trace_counter()
    algorithm = ALGORITHMS[name](setup())
    run = jax.jit(chex.assert_max_traces(algorithm.stages[0].round, n=1))
    simulate(algorithm, some, run=run)


@each_once("wire", UPLINKS, "feedback_top_k")
def test_the_order_of_the_cohort_is_irrelevant(name, wire):
    algorithm, run = built(name, wire=wire)
    first, _, _ = simulate(algorithm, lambda r: ([0, 1, 2, 5], None), num_rounds=2, run=run)
    second, _, _ = simulate(algorithm, lambda r: ([5, 2, 0, 1], None), num_rounds=2, run=run)
    chex.assert_trees_all_close(first[-1], second[-1], rtol=1e-4, atol=1e-5)


@every_algorithm
def test_absent_clients_change_nothing(name):
    algorithm, run = built(name, wire="feedback_top_k")
    few, few_rows, few_metrics = simulate(algorithm, lambda r: ([1, 4], None), num_rounds=3)
    many, many_rows, many_metrics = simulate(
        algorithm,
        lambda r: ([0, 1, 2, 4], [False, True, False, True]),
        num_rounds=3,
        run=run,
    )
    chex.assert_trees_all_close(few[-1], many[-1], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(few_rows, many_rows, rtol=1e-5, atol=1e-6)
    for one, other, before in zip(few_metrics, many_metrics, many, strict=True):
        assert algorithm.num_bits(one, before) == algorithm.num_bits(other, before)


@each_once("server", SERVERS, "fedavgm")
def test_a_round_without_anybody_moves_nothing(name, server):
    algorithm, run = built(name, server=server)
    states, _, _ = simulate(algorithm, some, num_rounds=2, run=run)
    nobody = [0, 1, 2, 3], [False] * 4
    after, _, history = simulate(
        algorithm, lambda r: nobody, num_rounds=1, start=states[-1], run=run
    )
    kept = jax.tree.map(jnp.logical_and, states[-1].masks, after[-1].masks)
    chex.assert_trees_all_equal(
        masks.apply(kept, after[-1].params), masks.apply(kept, states[-1].params)
    )
    assert history[-1].num_present == 0
    traffic = algorithm.num_bits(history[-1], after[-1])
    assert traffic == (0, 0, 0, 0)


@each_once("chunk_size", [2, 3, 4], 3)
def test_every_chunk_size_gives_the_same_result(name, chunk_size):
    def final(size):
        algorithm, run = built(name, wire="feedback_top_k", chunk_size=size)
        return simulate(algorithm, some, num_rounds=3, run=run)[0][-1]

    chex.assert_trees_all_close(final(chunk_size), final(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["masked", "regrow", "dense"])
def test_nothing_pruned_and_no_penalty_is_fedavg_to_the_bit(mode):
    nothing = dip(final_sparsity=0.0, initial_sparsity=0.0, max_penalty=0.0, mode=mode)
    algorithm, run = built("fedavg")
    expected = simulate(algorithm, some, run=run)[0][-1]
    result = simulate(nothing(setup()), some)[0][-1]
    chex.assert_trees_all_equal(result.params, expected.params)
    chex.assert_trees_all_equal(result.masks, expected.masks)


def test_fedprox_without_pull_is_fedavg_to_the_bit():
    plain = fedavg.fedprox(quadratic.MODEL, setup(), mu=0.0)
    algorithm, run = built("fedavg")
    expected = simulate(algorithm, some, run=run)[0][-1]
    chex.assert_trees_all_equal(simulate(plain, some)[0][-1].params, expected.params)


def test_fedavg_gives_the_known_answer():
    states, _, history = simulate(
        ALGORITHMS["fedavg"](setup()), lambda r: ([0, 3], None), num_rounds=3
    )
    mean = (3 * quadratic.mean_point(PEOPLE, 0) + 8 * quadratic.mean_point(PEOPLE, 3)) / 11
    start = np.asarray(quadratic.flatten(quadratic.PARAMS))
    expected = mean + 0.9 ** (2 * 3) * (start - mean)  # two steps a round, three rounds
    np.testing.assert_allclose(quadratic.flatten(states[-1].params), expected, rtol=1e-4, atol=1e-6)
    assert states[-1].model_state["steps"] == 6.0  # BatchNorm-like state is averaged too
    assert history[0].train["loss"].weight == 2 * 11  # every example, in each of two steps


def test_error_feedback_forgets_nothing_over_rounds():
    algorithm = ALGORITHMS["fedavg"](setup(uplink=UPLINKS["feedback_top_k"]))
    dense = ALGORITHMS["fedavg"](setup())
    run = jax.jit(algorithm.stages[0].round)
    state = algorithm.init(quadratic.PARAMS, STATE)
    members = quadratic.cohort(algorithm, [2])
    after, rows, _ = run(KEY, state, members, PEOPLE)
    exact, _, _ = jax.jit(dense.stages[0].round)(
        KEY, dense.init(quadratic.PARAMS, STATE), quadratic.cohort(dense, [2]), PEOPLE
    )
    sent = jax.tree.map(jnp.subtract, after.params, quadratic.PARAMS)
    computed = jax.tree.map(jnp.subtract, exact.params, quadratic.PARAMS)
    held_back = jax.tree.map(lambda leaf: leaf[0], rows.uplink.residual)
    assert np.count_nonzero(quadratic.flatten(held_back)) == 28  # 6+18 of kernels, 3+1 of biases
    chex.assert_trees_all_close(
        jax.tree.map(jnp.add, sent, held_back), computed, rtol=1e-5, atol=1e-6
    )


def test_personal_masks_are_averaged_over_their_holders():
    inner = clients.local_sgd(
        quadratic.MODEL.loss, batcher=quadratic.full_batches(1), optimizer=optax.sgd(0.1)
    )

    def personal_masks(data: ClientData):
        odd = (data.size % 2) == 1  # clients 0 and 1 hold even positions, the others odd ones
        return jax.tree.map(
            lambda leaf: (jnp.arange(leaf.size).reshape(leaf.shape) % 2 == 0) == odd,
            quadratic.PARAMS,
        )

    def update(key, broadcast, state, data):
        mine = personal_masks(data)
        message, state = inner.update(key, broadcast._replace(masks=mine), state, data)
        return message._replace(fields={**message.fields, "masks": mine}), state

    algorithm = compose.compose(
        setup(aggregator=aggregators.holder_mean()), client=inner._replace(update=update)
    )
    state, _, metrics = jax.jit(algorithm.stages[0].round)(
        KEY, algorithm.init(quadratic.PARAMS, STATE), quadratic.cohort(algorithm, [0, 2]), PEOPLE
    )
    even = np.concatenate(
        [np.arange(leaf.size) % 2 == 0 for leaf in jax.tree.leaves(quadratic.PARAMS)]
    )
    start = np.asarray(quadratic.flatten(quadratic.PARAMS))

    def stepped(client_id, mine):
        seen = np.where(mine, start, 0.0)
        return 0.1 * (quadratic.mean_point(PEOPLE, client_id) - seen)

    expected = start + np.where(even, stepped(0, even), stepped(2, ~even))
    np.testing.assert_allclose(quadratic.flatten(state.params), expected, rtol=1e-4, atol=1e-6)
    assert np.asarray(metrics.uplink_kept).sum() == quadratic.NUM_WEIGHTS
