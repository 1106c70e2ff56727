"""SSFL: scores of all clients are averaged, not gradients; what is kept, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks
from fedjaxprune.costs import ledger
from fedjaxprune.federated import aggregators
from fedjaxprune.methods import snip, ssfl
from fedjaxprune.pruning import pruners, scores
from fedjaxprune.rounds import protocol
from fedjaxprune.types import Population, PrunerInputs
from fedjaxprune.wire import format as wire_format
from fedjaxprune.wire import messages
from tests import quadratic

KEY = jax.random.key(4)
PEOPLE = quadratic.population()


def kept(values, density):
    """Mark the entries that are kept of scores."""
    tree = jnp.asarray(values, jnp.float32)
    seen = PrunerInputs(params=tree, grads=None, round=jnp.int32(0))
    pruner = pruners.prune_to(1 - density, score=scores.value)
    found, _ = pruner.update(KEY, masks.full(tree), (), seen)
    return np.flatnonzero(found).tolist()


def mean(values, weights):
    joined = aggregators.weighted_mean()
    total = joined.init(jnp.asarray(values[0], jnp.float32))
    for value, weight in zip(values, weights, strict=True):
        total = joined.add(total, jnp.asarray(value, jnp.float32), None, jnp.float32(weight))
    return np.asarray(joined.finish(total))


@pytest.mark.parametrize(
    ("weights", "expected", "places"),
    [((1, 1), [2, 2, 1, 2], [0, 1]), ((30, 10), [1.5, 3, 0.75, 2], [1, 3])],
)
def test_scores_are_averaged_and_exactly_as_many_kept(weights, expected, places):
    found = mean([[1, 4, 0.5, 2], [3, 0, 1.5, 2]], weights)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert kept(found, 0.5) == places
    assert kept([5, 5, 5, 0.1], 0.25) == [0]


def test_weights_that_clients_pull_apart_keep_their_worth():
    weights, grads = np.array([1, 0.8, -0.6]), np.array([[0.5, -0.2, 0.1], [-0.5, -0.2, 0.3]])
    by_score, by_gradient = (
        np.abs(weights * grads).mean(axis=0),
        np.abs(weights * grads.mean(axis=0)),
    )
    np.testing.assert_allclose(by_score, [0.5, 0.16, 0.12])
    np.testing.assert_allclose(by_gradient, [0, 0.16, 0.12], atol=1e-12)
    assert (kept(by_score, 1 / 3), kept(by_gradient, 1 / 3)) == ([0], [1])


def start(method=ssfl, people=PEOPLE, participated=None, **options):
    """Play the stages before training: states and metrics of each."""
    setup = protocol.Protocol(
        num_rounds=1, batcher=quadratic.full_batches(1), optimizer=optax.sgd(0.1)
    )
    settings = method.METHOD.settings(**{"sparsity": 0.5, "allocation": "global", **options})
    algorithm = method.build(settings, quadratic.task(setup, max_size=28))
    members = quadratic.cohort(algorithm, range(6), participated)
    states, metrics = [algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})], []
    for stage in algorithm.stages[:-1]:
        run = jax.jit(stage.round)
        for _ in range(stage.num_rounds):
            key = jax.random.fold_in(KEY, states[-1].round)
            after, rows, found = run(key, states[-1], members, people)
            members = members._replace(states=rows)
            states.append(after)
            metrics.append(found)
    return algorithm, states, metrics


def expected_scores(weights):
    params = np.asarray(quadratic.flatten(quadratic.PARAMS))
    each = [np.abs(params * (params - quadratic.mean_point(PEOPLE, i))) for i in range(6)]
    return np.average(each, axis=0, weights=weights)


@pytest.mark.parametrize(
    ("weighing", "weights"), [("examples", (3, 5, 2, 8, 4, 6)), ("clients", None)]
)
def test_all_clients_decide_one_mask(weighing, weights):
    algorithm, states, _ = start(score_weights=weighing)
    assert algorithm.stages[0].cohort == "everyone"
    live = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(states[-1].masks)])
    kernels = np.concatenate(
        [np.full(leaf.size, leaf.ndim > 1) for leaf in jax.tree.leaves(quadratic.PARAMS)]
    )
    worth = np.where(kernels, expected_scores(weights), -1)
    wanted = np.isin(np.arange(38), np.argsort(-worth, kind="stable")[:16]) | ~kernels
    np.testing.assert_array_equal(live, wanted)
    before, after = states[0], states[1]
    for name in ("params", "model_state"):  # scoring moves nothing
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))


def test_one_client_alone_is_snip():
    people = Population(PEOPLE.examples, PEOPLE.order, jnp.asarray([0, *[28] * 6], jnp.int32))
    _, states, _ = start(people=people)
    _, others, _ = start(snip, examples="pooled", num_prune_steps=1)
    jax.tree.map(np.testing.assert_array_equal, states[-1].masks, others[-1].masks)


def test_if_nobody_answers_the_largest_weights_are_kept():
    _, states, _ = start(participated=[False] * 6)
    sizes = np.abs(np.asarray(quadratic.PARAMS["dense"]["kernel"])).ravel()
    live = np.asarray(states[-1].masks["dense"]["kernel"]).ravel()
    assert live.sum() + int(states[-1].masks["head"]["kernel"].sum()) == 16
    assert sizes[live].min() >= sizes[~live].max()


def test_scores_of_kernels_travel_and_each_client_is_sent_the_mask_once():
    algorithm, states, metrics = start()
    traffic = ledger.account(metrics[0], states[0], algorithm)
    assert traffic.downlink.values == 6 * 32 * quadratic.NUM_WEIGHTS
    assert traffic.uplink.values == 6 * 32 * quadratic.NUM_PRUNABLE
    assert traffic.downlink.masks == 0
    settled = ledger.account(metrics[1], states[1], algorithm)
    assert (settled.uplink_bits, settled.downlink_bits) == (0, 0)
    assert int(states[-1].masks_id) == 1


def test_masks_of_a_step_go_to_those_who_lack_them_and_gradients_of_live_weights_come_up():
    algorithm, states, metrics = start(snip, examples="clients", num_prune_steps=3)
    flags = masks.prunable_leaves(quadratic.PARAMS, masks.is_kernel)
    for step, (state, found) in enumerate(zip(states, metrics[:3], strict=False)):
        traffic = ledger.account(found, state, algorithm)
        live = int(sum(int(leaf.sum()) for leaf in jax.tree.leaves(state.masks)))
        assert traffic.downlink.values == traffic.uplink.values == 6 * 32 * live
        assert (traffic.downlink.masks > 0) == (step > 0)
        down = messages.values("params", quadratic.PARAMS, state.masks)
        down |= messages.whole("model_state", state.model_state)
        written = [down] + [messages.personal_masks(state.masks, flags)] * (step > 0)
        assert traffic.downlink_bits == 6 * sum(8 * len(wire_format.encode(one)) for one in written)
