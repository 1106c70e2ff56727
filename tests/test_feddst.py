"""FedDST: the exchange at a client, the union at the server, and what travels in which round."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, trees
from fedjaxprune.costs import ledger
from fedjaxprune.experiment.run import round_costs
from fedjaxprune.federated import aggregators, local_training, mask_revision
from fedjaxprune.methods import _own_masks, feddst, random_masks
from fedjaxprune.pruning import allocation, drop_and_grow, pruners, schedules
from fedjaxprune.rounds import protocol
from fedjaxprune.traffic import EXTRA_GRADIENT
from fedjaxprune.types import Broadcast, PrunerInputs, client_data
from tests import quadratic

KEY = jax.random.key(7)
PEOPLE = quadratic.population()
DUE = (1, 3)  # of training, by index, with settings of the laws and the last round at 5


def setup(**changes):
    base = protocol.Protocol(
        num_rounds=6, batcher=quadratic.full_batches(2), optimizer=optax.sgd(0.1)
    )
    return base._replace(**changes)


def build(method, **options):
    settings = method.METHOD.settings(**{**method.METHOD.law_settings, **options})
    return method.build(settings, quadratic.task(setup(), num_epochs=2))


def play(algorithm, num_rounds=None):
    """Run all stages with all clients: the states after each round, and its metrics."""
    states = [algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})]
    members, measured = quadratic.cohort(algorithm, range(6)), []
    for stage in algorithm.stages:
        run = jax.jit(stage.round)
        for _ in range(stage.num_rounds if num_rounds is None else min(num_rounds, 1)):
            key = jax.random.fold_in(KEY, states[-1].round)
            state, rows, metrics = run(key, states[-1], members, PEOPLE)
            members = members._replace(states=rows)
            states.append(state)
            measured.append(jax.device_get(metrics))
    return states[1:], measured[1:]  # the first state is the draw's


@functools.cache
def played():
    algorithm = build(feddst, last_prune_round=5)
    return algorithm, *play(algorithm)


def numbers(*values):
    return {"kernel": jnp.asarray([values], jnp.float32)}


def places(*live, size=8):
    return {"kernel": jnp.asarray([[i in live for i in range(size)]])}


def live(tree):
    return set(np.flatnonzero(np.asarray(tree["kernel"])).tolist())


# The specification's example: one layer of 8 weights, 4 of them live, one exchanged.
START = numbers(0.6, -0.5, 0.4, 0.3, 0, 0, 0, 0)
LIVE = places(0, 1, 2, 3)
CLIENTS = (
    (30.0, numbers(0.7, -0.1, 0.5, 0.2, 0, 0, 0, 0), (0.1, 0.9, 0, 0.2, 0.3, -0.8, 0.1, 0.05)),
    (10.0, numbers(0.5, -0.6, 0.05, 0.4, 0, 0, 0, 0), (0, 0.1, 0.4, 0.1, 0.2, 0.1, -0.7, 0.3)),
)
ONE = drop_and_grow.drop_and_grow(drop_and_grow.share_counts(fraction=schedules.constant(0.25)))


def exchanged(params, grads):
    inputs = PrunerInputs(params=params, grads=numbers(*grads), round=jnp.int32(1))
    return ONE.update(KEY, LIVE, (), inputs)[0]


def joined(aggregator, messages):
    """Add messages ``(weight, value, masks)`` up."""
    sums = aggregator.init(messages[0][1])
    for weight, value, own in messages:
        sums = aggregator.add(sums, value, own, jnp.float32(weight))
    return aggregator.finish(sums)


def united(params, own):
    votes = joined(aggregators.vote_counts(), [(1.0, one, None) for one in own])
    pruner = pruners.prune_union_to(0.5, allocation=allocation.uniform())
    inputs = PrunerInputs(params, None, jnp.int32(1), statistics={"masks": votes})
    return live(pruner.update(KEY, LIVE, (), inputs)[0])


def test_a_client_exchanges_its_smallest_weight_for_the_steepest_and_not_for_itself():
    own = [exchanged(params, grads) for _, params, grads in CLIENTS]
    assert [live(one) for one in own] == [{0, 2, 3, 5}, {0, 1, 3, 6}]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_server_averages_by_holder_and_keeps_the_largest_of_the_union(order):
    own = [exchanged(params, grads) for _, params, grads in CLIENTS]
    ends = [
        numbers(0.7, 0, 0.5, 0.2, 0, -0.25, 0, 0),
        numbers(0.5, -0.6, 0, 0.4, 0, 0, 0.35, 0),
    ]
    sent = [
        (CLIENTS[i][0], masks.apply(own[i], jax.tree.map(jnp.subtract, ends[i], START)), own[i])
        for i in order
    ]
    delta = joined(aggregators.holder_mean(), sent)
    params = jax.tree.map(jnp.add, START, delta)
    wanted = numbers(0.65, -0.6, 0.5, 0.25, 0, -0.25, 0.35, 0)
    chex.assert_trees_all_close(params, wanted, atol=1e-7)
    assert united(params, own) == {0, 1, 2, 6}
    # A plain mean of the models takes weights that few clients hold towards zero.
    plain = joined(aggregators.weighted_mean(), [(CLIENTS[i][0], ends[i], own[i]) for i in order])
    wanted = numbers(0.65, -0.15, 0.375, 0.25, 0, -0.1875, 0.0875, 0)
    chex.assert_trees_all_close(plain, wanted, atol=1e-7)
    assert united(plain, own) == {0, 2, 3, 5}


def test_weights_that_are_grown_after_the_last_step_are_pruned_again():
    own = [exchanged(params, grads) for _, params, grads in CLIENTS]
    sent = [
        (weight, masks.apply(mine, jax.tree.map(jnp.subtract, params, START)), mine)
        for (weight, params, _), mine in zip(CLIENTS, own, strict=True)
    ]
    params = jax.tree.map(jnp.add, START, joined(aggregators.holder_mean(), sent))
    chex.assert_trees_all_close(params, numbers(0.65, -0.6, 0.5, 0.25, 0, 0, 0, 0), atol=1e-7)
    assert united(params, own) == {0, 1, 2, 3}


def test_a_weight_that_everybody_dropped_is_gone_and_a_small_union_is_kept():
    assert united(START, [places(0, 3), places(3)]) == {0, 3}


def test_votes_are_asked_for_where_there_are_none():
    pruner = pruners.prune_union_to(0.5)
    with pytest.raises(ValueError, match=r"needs the clients' votes 'masks', but the pruner sees"):
        pruner.update(KEY, LIVE, (), PrunerInputs(START, None, jnp.int32(1)))


def test_shares_are_rounded_down_but_not_by_a_rounding_error():
    decay = drop_and_grow.cosine_decay(initial=0.4, until=300)
    tree = {"kernel": jax.ShapeDtypeStruct((10, 100), bool)}
    found = {}
    for index in (10, 20, 100, 150, 200, 290, 300):
        counts = drop_and_grow.share_counts(fraction=lambda r: decay(r - 1))
        ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), tree)
        found[index] = int(counts(ones, jnp.int32(index))["kernel"])
    assert found == {10: 398, 20: 395, 100: 300, 150: 200, 200: 100, 290: 1, 300: 0}


def test_the_share_decays_along_a_cosine_from_round_0():
    decay = drop_and_grow.cosine_decay(initial=0.5, until=200)
    wanted = {0: 0.5, 1: 0.499969, 11: 0.496277, 50: 0.426777, 100: 0.25, 199: 0.000031, 200: 0}
    for index, share in wanted.items():
        assert abs(float(decay(jnp.float32(index) - 1)) - share) < 1e-6


@pytest.mark.parametrize(
    ("sparsity", "kept"),
    [(0.8, (436, 734, 149_660, 4682, 840)), (0.5, (450, 1853, 377_661, 10_080, 840))],
)
def test_layers_keep_what_the_specification_lists_for_the_authors_network(sparsity, kept):
    shapes = [(5, 5, 3, 6), (5, 5, 6, 16), (6400, 120), (120, 84), (84, 10)]
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    counts = allocation.erk()(leaves, schedules.evaluate(lambda r: r * 0 + sparsity, jnp.int32(0)))
    assert tuple(map(int, counts)) == kept


@pytest.mark.parametrize(
    ("num_rounds", "options", "expected"),
    [
        (400, {}, (10, 200)),
        (12, {}, (2, 6)),
        (2, {}, (1, 2)),
        (1, {}, (1, 1)),
        (40, {"prune_every": 15, "last_prune_round": 90}, (15, 40)),
    ],
)
def test_readjustments_end_at_half_of_a_run(num_rounds, options, expected):
    settings = feddst.FedDST(**options)
    assert _own_masks.readjusting_rounds(settings, num_rounds) == expected
    due = _own_masks.is_due(settings, num_rounds)
    found = [r for r in range(num_rounds) if due(jnp.int32(r))]
    assert found == list(range(1, expected[1], expected[0]))


def test_settings_that_do_not_fit_the_run_are_refused():
    with pytest.raises(ValueError, match="last_prune_round must be at least 2"):
        build(feddst, last_prune_round=1)
    with pytest.raises(ValueError, match="epochs_before must be at most the local epochs"):
        build(feddst, epochs_before=3)
    with pytest.raises(ValueError, match="num_before must lie between 0 and num_epochs"):
        mask_revision.after_epochs(4, num_epochs=3)


def test_the_part_of_the_steps_follows_from_a_clients_size():
    before = mask_revision.after_epochs(4, num_epochs=5)
    assert [int(before(jnp.int32(5 * steps))) for steps in (0, 1, 7)] == [0, 4, 28]


# The client: three steps of the quadratic, whose masks are revised after the first.
def work(client, mask_tree, round_index=1, client_id=1):
    state = {"steps": jnp.float32(0.0)}
    broadcast = Broadcast(quadratic.PARAMS, mask_tree, state, jnp.int32(round_index))
    data = client_data(PEOPLE, jnp.int32(client_id))
    return jax.jit(client.update)(KEY, broadcast, (), data)[0]


def revising(revise, **options):
    return local_training.mask_revising_sgd(
        quadratic.MODEL.loss,
        batcher=quadratic.full_batches(3),
        optimizer=optax.sgd(0.1),
        revision=mask_revision.MaskRevision(
            masks=revise, is_due=lambda r: r == 1, num_steps_before=lambda n: n // 3
        ),
        **options,
    )


def one_in(number):
    return jax.tree.map(
        lambda leaf: jnp.arange(leaf.size).reshape(leaf.shape) % number == 0, quadratic.PARAMS
    )


EVEN, THIRD = one_in(2), one_in(3)


def test_a_client_trains_on_under_the_masks_that_it_revised():
    message = work(revising(lambda key, masks, params, grads, broadcast: THIRD), EVEN)
    start = np.asarray(quadratic.flatten(quadratic.PARAMS))
    target = quadratic.mean_point(PEOPLE, 1)
    before, after = (np.asarray(quadratic.flatten(tree)) for tree in (EVEN, THIRD))
    stays = target + 0.9**3 * (start - target) - start
    grown = target - 0.9**2 * target - start  # from zero, two steps
    grown = grown + start  # the broadcast's pruned weights are zeros
    expected = np.where(after, np.where(before, stays, grown), 0.0)
    found = np.asarray(quadratic.flatten(message.fields["delta"]))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert not found[before & ~after].any()  # left out, not sent as minus the weight
    chex.assert_trees_all_equal(message.fields["masks"], THIRD)
    assert float(message.fields["metrics"][EXTRA_GRADIENT].total) == 5.0  # examples of one batch


def test_the_gradient_is_dense_at_the_present_weights_and_without_penalties():
    """Masks say where the gradient is what it must be after the first step."""
    target = quadratic.mean_point(PEOPLE, 1)

    def revise(key, masks, params, grads, broadcast):
        leaves = quadratic.flatten(params) - jnp.asarray(target, jnp.float32)
        is_right = jnp.abs(quadratic.flatten(grads) - leaves) < 1e-5
        ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(params)])[:-1]
        parts = jnp.split(is_right, ends)
        leaves, structure = jax.tree.flatten(params)
        shaped = [one.reshape(leaf.shape) for one, leaf in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(structure, shaped)

    def pulls(params, broadcast):
        return 3.0 * trees.tree_sum(jax.tree.map(jnp.sum, params), dtype=jnp.float32)

    message = work(revising(revise, penalties=(pulls,)), EVEN)
    assert all(np.all(leaf) for leaf in jax.tree.leaves(message.fields["masks"]))


def test_rounds_that_are_not_due_are_plain_training():
    message = work(revising(lambda *given: THIRD), EVEN, round_index=2)
    plain = local_training.local_sgd(
        quadratic.MODEL.loss, batcher=quadratic.full_batches(3), optimizer=optax.sgd(0.1)
    )
    chex.assert_trees_all_equal(message.fields["delta"], work(plain, EVEN).fields["delta"])
    chex.assert_trees_all_equal(message.fields["masks"], EVEN)


def test_every_layer_keeps_its_weights_and_masks_change_in_due_rounds_alone():
    _, states, _ = played()
    for index, (before, after) in enumerate(itertools.pairwise(states)):
        kept = masks.num_kept(after.masks).tolist()
        assert kept == [4, 10, 2, 6]  # biases whole; ERK of 24 and 8 weights at one half
        assert (int(masks.num_changed(before.masks, after.masks)) > 0) == (index in DUE)
        pruned = masks.apply(jax.tree.map(jnp.logical_not, after.masks), after.params)
        assert not np.any(quadratic.flatten(pruned))


def test_a_client_sends_its_masks_where_it_revised_them_and_is_sent_the_new_ones_then():
    algorithm, states, measured = played()
    for index, (before, metrics) in enumerate(zip(states, measured, strict=False)):
        traffic = ledger.account(metrics, before, algorithm)
        own = np.asarray(metrics.sent.up["masks"]["masks"].clients)
        assert own.all() == own.any() == (index in DUE)
        assert (traffic.uplink.masks > 0) == (index in DUE)
        assert (traffic.downlink.masks > 0) == (index - 1 in DUE)
        np.testing.assert_array_equal(metrics.num_uploaded, [[4, 10, 2, 6]] * 6)
        assert traffic.uplink.values == 32 * 22 * 6


def test_the_record_has_the_gradient_that_a_revision_takes():
    _, _, measured = played()
    costs = [round_costs.of_round(quadratic.profile(), one).training_flops for one in measured]
    quiet, due = costs[0], costs[DUE[0]]
    assert quiet is not None
    assert due is not None
    num_examples = sum(np.diff(np.asarray(PEOPLE.offsets)))
    assert due["forward"] * 2 == quiet["forward"] * 3  # two steps of full batches, and one more
    dense = 2 * 32 * num_examples  # multiply-adds of all weights, once
    assert due["weight_gradient"] - quiet["weight_gradient"] == dense


def test_a_share_of_nothing_gives_random_masks_to_the_bit():
    found, _ = play(build(feddst, drop_fraction=0.0), 3)
    wanted, _ = play(build(random_masks, allocation="erk"), 3)
    chex.assert_trees_all_equal(found, wanted)


def test_the_first_mask_may_be_of_the_largest_weights():
    algorithm = build(feddst, first_mask="magnitude", drop_fraction=0.0)
    state = algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})
    members = quadratic.cohort(algorithm, range(6))
    state, _, _ = jax.jit(algorithm.stages[0].round)(KEY, state, members, PEOPLE)
    for name, count in (("dense", 10), ("head", 6)):
        size = np.abs(np.asarray(quadratic.PARAMS[name]["kernel"]))
        mask = np.asarray(state.masks[name]["kernel"])
        assert mask.sum() == count
        assert size[mask].min() >= size[~mask].max()
