"""The controls: which weights their masks keep, and what choosing them costs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, models, trees
from fedjaxprune.costs import ledger
from fedjaxprune.experiment.run import round_costs
from fedjaxprune.method import Needs, needs_of
from fedjaxprune.methods import (
    _fixed_masks,
    gradual_magnitude,
    magnitude_masks,
    random_masks,
    snip,
)
from fedjaxprune.pruning import schedules
from fedjaxprune.rounds import facts, protocol
from fedjaxprune.rounds import task as task_lib
from fedjaxprune.wire import format as wire_format
from fedjaxprune.wire import messages
from tests import quadratic

KEY = jax.random.key(2)
PEOPLE = quadratic.population()
PEOPLE = PEOPLE._replace(held=jax.tree.map(lambda leaf: leaf[3:5], PEOPLE.examples))
KERNELS = {"dense": 24, "head": 8}


def setup(**changes):
    base = protocol.Protocol(
        num_rounds=3, batcher=quadratic.full_batches(2), optimizer=optax.sgd(0.1)
    )
    return base._replace(**changes)


def start(algorithm, participated=None):
    """Play the stages before training: the state, and the traffic of each."""
    state = algorithm.init(quadratic.PARAMS, {})
    members = quadratic.cohort(algorithm, [0, 1, 2, 3, 4, 5], participated)
    traffic = []
    for stage in algorithm.stages[:-1]:
        key = jax.random.fold_in(KEY, state.round)
        state, rows, metrics = jax.jit(stage.round)(key, state, members, PEOPLE)
        members = members._replace(states=rows)
        traffic.append(ledger.account(metrics, state, algorithm))
    return state, members, traffic


def computed(algorithm):
    """Play the stages before training: what the record has of each one's arithmetic."""
    state = algorithm.init(quadratic.PARAMS, {})
    members = quadratic.cohort(algorithm, [0, 1, 2, 3, 4, 5])
    found = []
    for stage in algorithm.stages[:-1]:
        key = jax.random.fold_in(KEY, state.round)
        state, _, metrics = jax.jit(stage.round)(key, state, members, PEOPLE)
        found.append(round_costs.of_round(quadratic.profile(), metrics))
    return found


def largest(values, count):
    order = np.argsort(-np.asarray(values).ravel(), kind="stable")
    kept = np.zeros(order.size, bool)
    kept[order[:count]] = True
    return kept.reshape(np.shape(values))


def expected(values, sparsity=0.5):
    """Keep the best of each layer; biases stay."""
    return {
        name: {
            "bias": np.ones_like(values[name]["bias"], bool),
            "kernel": largest(values[name]["kernel"], size - round(sparsity * size)),
        }
        for name, size in KERNELS.items()
    }


def tree(vector):
    leaves, structure = jax.tree.flatten(quadratic.PARAMS)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = np.split(np.asarray(vector), ends)
    return jax.tree.unflatten(
        structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )


def pooled_mean():
    return np.asarray(PEOPLE.examples["inputs"]).mean(axis=0)


MEANS = {
    "server": lambda: PEOPLE.examples["inputs"][3:5].mean(axis=0),
    "one_client": lambda: quadratic.mean_point(PEOPLE, 3),
    "pooled": pooled_mean,
}


def make(method, **options):
    """Build a control; a batch holds the data of all, and the server two examples."""
    task = quadratic.task(setup(), max_size=28)
    return method.build(method.METHOD.settings(**{"sparsity": 0.5, **options}), task)


@pytest.mark.usual("one_client-trained", "pooled-initial", "server-None")
@pytest.mark.parametrize("weights", ["trained", "initial", None])
@pytest.mark.parametrize("examples", sorted(MEANS))
def test_magnitude_masks_keep_the_largest_weights_after_training_where_they_are_made(
    examples, weights
):
    algorithm = make(
        magnitude_masks, examples=examples, client_id=3, server_epochs=1, start_from=weights
    )
    state, _, traffic = start(algorithm)
    before = np.asarray(quadratic.flatten(quadratic.PARAMS))
    trained = tree(before + 0.1 * (np.asarray(MEANS[examples]()) - before))
    wanted = expected(jax.tree.map(np.abs, trained))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, state.masks), wanted)
    usual = "trained" if examples == "server" else "initial"
    goes_on = trained if (weights or usual) == "trained" else quadratic.PARAMS
    chex.assert_trees_all_close(
        state.params, masks.apply(state.masks, goes_on), rtol=1e-5, atol=1e-6
    )
    if examples != "one_client":
        assert [(t.uplink_bits, t.downlink_bits) for t in traffic] == [(0, 0)]


def of_one_client(weights):
    return make(
        magnitude_masks, examples="one_client", client_id=3, server_epochs=1, start_from=weights
    )


def test_one_clients_mask_costs_a_dense_model_down_and_a_mask_up():
    algorithm = of_one_client("initial")
    state, members, traffic = start(algorithm)
    (costs,) = computed(algorithm)
    assert costs.training_flops is not None  # of the 8 examples of client 3, in one step
    assert list(costs.training_flops.values()) == 2 * [2 * 8 * 32, 2 * 8 * 8, 2 * 8 * 32]
    assert costs.clients_per_weight == 1.0
    (entry,) = traffic[0].clients
    assert entry.client_ids == (3,)
    assert traffic[0].downlink.values == 32 * quadratic.NUM_WEIGHTS
    assert traffic[0].uplink._replace(framing=0, masks=0) == (0, 0, 0, 0, 0)
    assert 0 < traffic[0].uplink.masks <= 24 + 8  # prunable weights, a bit each
    assert traffic[0].published["values_and_bitmaps"] == (32, 32 * quadratic.NUM_WEIGHTS)
    _, _, metrics = jax.jit(algorithm.stages[-1].round)(KEY, state, members, PEOPLE)
    assert (
        0 < ledger.account(metrics, state, algorithm).downlink.masks <= 6 * 32
    )  # then everybody is told


def test_one_clients_weights_travel_under_its_mask_where_training_starts_from_them():
    state, _, traffic = start(of_one_client("trained"))
    message = messages.values("params", state.params, state.masks)
    written = [messages.personal_masks(state.masks, [False, True, False, True]), message]
    assert traffic[0].uplink_bits == sum(8 * len(wire_format.encode(one)) for one in written)
    assert traffic[0].uplink.values == 32 * (quadratic.NUM_WEIGHTS - 16)


def test_random_masks_follow_from_the_seed_and_do_not_travel():
    algorithm = make(random_masks, sparsity=0.25)
    state, members, traffic = start(algorithm)
    kept = [int(jnp.sum(state.masks[name]["kernel"])) for name in KERNELS]
    assert kept == [18, 6]
    assert [(t.uplink_bits, t.downlink_bits) for t in traffic] == [(0, 0)]
    after, _, metrics = jax.jit(algorithm.stages[-1].round)(KEY, state, members, PEOPLE)
    assert ledger.account(metrics, after, algorithm).downlink.masks == 0
    chex.assert_trees_all_equal(after.masks, state.masks)


def sensitivity(mean, params=quadratic.PARAMS):
    grads = tree(np.asarray(quadratic.flatten(params)) - np.asarray(mean))
    return jax.tree.map(lambda w, g: np.abs(np.asarray(w) * g), params, grads)


def test_snip_keeps_the_largest_products_of_weight_and_gradient():
    algorithm = make(snip, examples="pooled")
    state, _, traffic = start(algorithm)
    wanted = expected(sensitivity(pooled_mean()))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, state.masks), wanted)
    chex.assert_trees_all_equal(state.params, masks.apply(state.masks, quadratic.PARAMS))
    assert [(t.uplink_bits, t.downlink_bits) for t in traffic] == [(0, 0)]


def test_snip_in_several_steps_takes_new_gradients_at_each():
    algorithm = make(snip, examples="pooled", sparsity=0.75, num_prune_steps=3)
    state, _, _ = start(algorithm)
    params, live = quadratic.PARAMS, masks.full(quadratic.PARAMS)
    for sparsity in (0.25, 0.5, 0.75):
        scores = jax.tree.map(
            lambda score, mask: np.where(mask, score, -1.0),
            sensitivity(pooled_mean(), params),
            live,
        )
        live = expected(scores, sparsity)
        params = masks.apply(live, params)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, state.masks), live)


def test_snip_of_the_clients_is_snip_of_the_pooled_data():
    algorithm = make(snip, examples="clients")
    state, members, traffic = start(algorithm)
    wanted = expected(sensitivity(pooled_mean()))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, state.masks), wanted)
    scored, settled = computed(algorithm)
    assert settled.training_flops is not None
    assert scored.training_flops is not None
    assert set(settled.training_flops.values()) == {0}  # by magnitude, in case nobody answers
    assert list(scored.training_flops.values()) == 2 * [2 * 28 * 32, 2 * 28 * 8, 2 * 28 * 32]
    assert scored.clients_per_weight == 0.0  # gradients move nothing
    every = 6 * 32 * quadratic.NUM_WEIGHTS
    assert (traffic[1].uplink_bits, traffic[1].downlink_bits) == (0, 0)
    for link in (traffic[0].uplink, traffic[0].downlink):
        assert link._replace(framing=0) == (every, 0, 0, 0, 0)
    _, _, metrics = jax.jit(algorithm.stages[-1].round)(KEY, state, members, PEOPLE)
    assert 0 < ledger.account(metrics, state, algorithm).downlink.masks <= 6 * 32


def test_snip_of_clients_that_do_not_answer_falls_back_to_magnitude():
    algorithm = make(snip, examples="clients")
    state, _, _ = start(algorithm, participated=[False] * 6)
    wanted = expected(jax.tree.map(np.abs, quadratic.PARAMS))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, state.masks), wanted)


def test_one_pool_lets_layers_compete():
    algorithm = make(magnitude_masks, examples="pooled", server_epochs=1, allocation="global")
    state, _, _ = start(algorithm)
    kept = [int(jnp.sum(state.masks[name]["kernel"])) for name in KERNELS]
    assert sum(kept) == 16
    assert kept != [12, 4]


def test_gradual_magnitude_follows_its_curve_and_nothing_returns():
    algorithm = make(
        gradual_magnitude, sparsity=0.75, initial_sparsity=0.0, prune_every=2, end_round=6
    )
    curve = schedules.cubic(initial_sparsity=0.0, final_sparsity=0.75, begin_round=0, end_round=6)
    state = algorithm.init(quadratic.PARAMS, {})
    run = jax.jit(algorithm.stages[0].round)
    members = quadratic.cohort(algorithm, range(6))
    for r in range(8):
        before = state.masks
        state, _, metrics = run(jax.random.fold_in(KEY, r), state, members, PEOPLE)
        due = r - r % 2
        kept = int(np.asarray(metrics.num_live).sum()) - 6  # without biases
        assert kept == 32 - round(float(curve(jnp.float32(due))) * 32)
        grown = jax.tree.map(lambda new, old: jnp.any(new & ~old), state.masks, before)
        assert not any(jax.tree.leaves(grown))


def test_gradual_magnitude_says_what_its_last_revision_reaches():
    (note,) = make(gradual_magnitude, sparsity=0.9, prune_every=2, end_round=6).notes
    assert "after round 3 of 3, reaches 0.781: " in note  # 0.9 - 0.4 (2 / 3)^3
    assert make(gradual_magnitude, sparsity=0.9, prune_every=1, end_round=2).notes == ()


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        (gradual_magnitude, {"initial_sparsity": 0.75}, r"at most sparsity \(0.5\).*, got 0.75"),
        (gradual_magnitude, {"sparsity": 0.99}, "leave at least one of the 32 prunable weights"),
        (gradual_magnitude, {"sparsity": 0.9, "prune_every": 3}, r"federation.num_rounds \(3\)"),
        (random_masks, {"sparsity": 0.99}, "leave at least one of the 32 prunable weights"),
        (
            random_masks,
            {"sparsity": 0.95, "least_per_layer": 0},
            "at least one of the 8 weights of 'head/kernel'.*0.95",
        ),
        (random_masks, {"sparsity": 0.97}, "keeps 2 weights of 2 layers, more than the 1 that"),
        (random_masks, {"allocation": "uniform_but_first"}, "the first convolution dense, and the"),
        (
            random_masks,
            {"allocation": "uniform_but_depthwise"},
            "depthwise convolutions dense, and",
        ),
        (magnitude_masks, {"sparsity": 0.99}, "leave at least one of the 32 prunable weights"),
        (snip, {"sparsity": 0.95}, "at least one of the 8 weights of 'head/kernel'"),
        (
            magnitude_masks,
            {"examples": "one_client", "client_id": 6},
            r"method.client_id must be less than data.num_clients \(6\), got 6",
        ),
    ],
)
def test_what_leaves_nothing_or_cannot_be_is_refused(method, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(method, **options)


def test_other_allocations_keep_more_of_small_layers():
    for allocation, num_live in (("erk", 1), ("global", 2)):  # ERK rounds layer by layer
        options = {"sparsity": 0.95, "allocation": allocation, "least_per_layer": 0}
        state, _, _ = start(make(random_masks, **options))
        assert sum(int(jnp.sum(state.masks[name]["kernel"])) for name in KERNELS) == num_live


@pytest.mark.parametrize("allocation", ["uniform", "er", "erk", "global"])
def test_random_masks_leave_a_weight_in_every_layer(allocation):
    state, _, _ = start(make(random_masks, sparsity=0.95, allocation=allocation))
    assert [int(jnp.sum(state.masks[name]["kernel"])) for name in KERNELS] == [1, 1]


def test_magnitude_masks_may_rank_by_lamp():
    algorithm = make(
        magnitude_masks, examples="pooled", server_epochs=1, allocation="global", score="lamp"
    )
    state, _, _ = start(algorithm)
    trained = jax.tree.map(
        lambda leaf, mean: leaf + 0.1 * (mean - leaf), quadratic.PARAMS, tree(pooled_mean())
    )
    found = {name: np.sort(np.square(trained[name]["kernel"]).ravel())[::-1] for name in KERNELS}
    worth = np.sort(np.concatenate([values / np.cumsum(values) for values in found.values()]))
    for name, values in found.items():
        wanted = int(np.sum(values / np.cumsum(values) >= worth[-16]))
        assert int(jnp.sum(state.masks[name]["kernel"])) == wanted


def test_the_first_convolution_stays_dense_where_that_is_asked_for():
    model = models.lenet5(input_shape=(28, 28, 1), num_classes=10)
    task = task_lib.make(model, setup(), inputs=facts.float_inputs((28, 28, 1)))
    params, _ = jax.eval_shape(model.init, KEY)
    settings = random_masks.RandomMasks(sparsity=0.9, allocation="uniform_but_first")
    share = _fixed_masks.share_out(settings, task)
    scores = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    counts = share(scores, jnp.float32(0.9))
    first = facts.first_convolution(task.facts)
    sizes = facts.sizes(task.facts, masks.is_kernel)
    by_path = dict(zip(trees.paths(params), jax.tree.leaves(counts), strict=True))
    assert first is not None
    assert by_path[first] == sizes[first]
    assert all(int(by_path[path]) < 0.11 * size for path, size in sizes.items() if path != first)
    tight = random_masks.RandomMasks(sparsity=0.999, allocation="uniform_but_first")
    with pytest.raises(ValueError, match=r"method.sparsity must be less than 0.99.* got 0.999"):
        _fixed_masks.share_out(tight, task)


def test_depthwise_convolutions_stay_dense_where_that_is_asked_for():
    shapes = {"a": (3, 3, 1, 40), "b": (3, 3, 1, 40), "c": (1, 1, 40, 60), "d": (60, 10)}
    params = {
        name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in shapes.items()
    }
    task = quadratic.task(setup())  # "a" reads images of one channel
    own = task.facts._replace(params=params, reading_order=lambda: trees.paths(params))
    settings = random_masks.RandomMasks(sparsity=0.8, allocation="uniform_but_depthwise")
    counts = _fixed_masks.share_out(settings, task._replace(facts=own))(params, jnp.float32(0.8))
    assert [int(leaf) for leaf in jax.tree.leaves(counts)] == [
        41,
        360,
        274,
        68,
    ]  # of 744, 384 are shared


def test_only_masks_from_the_servers_data_need_examples_there():
    for method, examples, needed in (
        (magnitude_masks, "server", True),
        (magnitude_masks, "one_client", False),
        (magnitude_masks, "pooled", False),
        (snip, "server", True),
        (snip, "clients", False),
    ):
        settings = method.METHOD.settings(examples=examples)
        assert needs_of(method.METHOD, settings).server_examples is needed
    bare = quadratic.task(setup(), num_server_examples=0)
    with pytest.raises(ValueError, match="the method needs examples at the server"):
        snip.build(snip.Snip(sparsity=0.5), bare)
    assert needs_of(random_masks.METHOD, random_masks.RandomMasks()) == Needs()
