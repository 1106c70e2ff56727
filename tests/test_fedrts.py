"""FedRTS: votes, posteriors and draws of the specification, and when masks change."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, trees
from fedjaxprune.costs import ledger, storage_models
from fedjaxprune.federated import sparse_gradients
from fedjaxprune.methods import fedrts, random_masks
from fedjaxprune.pruning import allocation, drop_and_grow, posteriors
from fedjaxprune.rounds import protocol
from fedjaxprune.types import Broadcast, Client, Message, PrunerInputs
from fedjaxprune.wire import format as wire_format
from fedjaxprune.wire import headers, messages
from tests import quadratic

KEY = jax.random.key(5)
PEOPLE = quadratic.population()

# The worked example: eight links of which four are live, two clients of 30 and 10 examples.
LIVE = np.arange(8) < 4
WEIGHTS = np.array(
    [[0.9, -0.1, 0.5, 0.2, 0, 0, 0, 0], [0.3, 0.8, -0.6, 0.05, 0, 0, 0, 0]], np.float32
)
GRADS = np.array(
    [[0, 0, 0, 0, 0.4, -0.7, 0.1, 0.2], [0, 0, 0, 0, -0.3, 0.05, 0.6, 0.5]], np.float32
)
SHARES = np.array([0.75, 0.25], np.float32)


@jax.jit
def learn(num_reconsidered, num_places, share, due, weights=WEIGHTS, shares=SHARES):
    """Play a round of the example: outcomes, and the posteriors after it."""
    mask = jnp.asarray(LIVE)

    def core(values):
        return posteriors.core(values, mask, num_reconsidered)

    votes = jnp.einsum("c,ci->i", shares, jax.vmap(core)(weights))
    places = jnp.einsum("c,ci->i", shares, jax.vmap(lambda g: named(g, num_places))(GRADS))
    mean_core = core(shares @ weights)
    outcome = posteriors.outcome(mask, mean_core, votes, places, share=share)
    prior = posteriors.prior(jnp.zeros(8))
    return outcome, posteriors.observe(prior, outcome, mask | due, weight=10.0)


def named(grads, number):
    """Send the places of the largest gradients through the client's wrapper."""
    fields = {"grads": jnp.asarray(grads)}
    client = Client(
        init=lambda params: (), update=lambda *_: (Message(fields, jnp.float32(1.0)), ())
    )
    wrapped = sparse_gradients.top_places(client, num_places=lambda masks, round: number)
    broadcast = Broadcast(jnp.zeros(8), jnp.asarray(LIVE), (), jnp.int32(0))
    nobodys: Any = ()
    return wrapped.update(KEY, broadcast, (), nobodys)[0].fields["places"]


@pytest.mark.parametrize(
    ("num_core", "share", "outcome", "alpha", "beta"),
    [
        (2, 0.5, (0.875, 0.125, 1, 0), (9.75, 2.25, 11, 1), (2.25, 9.75, 1, 11)),
        (2, 0.0, (0.75, 0.25, 1, 0), (8.5, 3.5, 11, 1), (3.5, 8.5, 1, 11)),
        (2, 1.0, (1, 0, 1, 0), (11, 1, 11, 1), (1, 11, 1, 11)),
        (3, 0.5, (1, 0.125, 1, 0.875), (11, 2.25, 11, 9.75), (1, 9.75, 1, 2.25)),
    ],
)
def test_live_links_of_the_worked_example(num_core, share, outcome, alpha, beta):
    found, posterior = learn(jnp.int32(4 - num_core), jnp.int32(0), share, False)
    np.testing.assert_array_equal(found[:4], np.float32(outcome))
    np.testing.assert_array_equal(posterior.alpha, [*alpha, 1, 1, 1, 1])
    np.testing.assert_array_equal(posterior.beta, [*beta, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("num_places", "outcome", "alpha", "beta"),
    [
        (1, (0.25, 0.625, 0.375, 0.25), (3.5, 7.25, 4.75, 3.5), (8.5, 4.75, 7.25, 8.5)),
        (2, (0.625, 0.625, 0.375, 0.375), (7.25, 7.25, 4.75, 4.75), (4.75, 4.75, 7.25, 7.25)),
    ],
)
def test_pruned_links_of_the_worked_example(num_places, outcome, alpha, beta):
    found, posterior = learn(jnp.int32(2), jnp.int32(num_places), 0.5, True)
    np.testing.assert_array_equal(found[4:], np.float32(outcome))
    np.testing.assert_array_equal(posterior.alpha[4:], alpha)
    np.testing.assert_array_equal(posterior.beta[4:], beta)
    np.testing.assert_array_equal(posterior.alpha[:4], [9.75, 2.25, 11, 1])


def test_a_client_alone_votes_as_the_averaged_model():
    for share in (0.0, 0.25, 1.0):
        outcome, _ = learn(
            jnp.int32(2), jnp.int32(0), share, False, WEIGHTS[[0, 0]], np.array([1, 0], np.float32)
        )
        np.testing.assert_array_equal(outcome[:4], [1, 0, 1, 0])


def test_as_many_links_are_reconsidered_as_published():
    counts = posteriors.reconsidered(drop_and_grow.cosine_decay(initial=0.4, until=300))
    live = {
        "whole": jnp.ones(1000, jnp.bool_),
        "nearly": jnp.arange(1050) < 1000,
        "half": jnp.arange(2000) < 1000,
    }
    rounds = np.array([10, 20, 100, 150, 200, 290, 300], np.int32)
    found = jax.jit(jax.vmap(lambda index: counts(live, index)))(rounds - 1)
    expected = np.array([398, 395, 300, 200, 100, 1, 0])
    np.testing.assert_array_equal(found["half"], expected)
    np.testing.assert_array_equal(found["nearly"], np.minimum(expected, 50))  # as many are pruned
    assert not np.any(found["whole"])


def test_draws_rank_links_by_what_is_known_of_them():
    """Chances that the first wins, by numerical integration."""
    cases = [
        ((11, 1), (3.5, 8.5), 0.99975),
        ((9.75, 2.25), (7.25, 4.75), 0.88443),
        ((2.25, 9.75), (3.5, 8.5), 0.26087),
        ((1, 101), (3.5, 8.5), 0.0002),
        ((4, 4), (4, 4), 0.5),
    ]
    num = 10_000

    def repeat(which):
        return [[jnp.full(num, float(one[which])) for one in case[:2]] for case in cases]

    scores = jax.jit(posteriors.draw)(KEY, posteriors.Posterior(repeat(0), repeat(1)))
    for (first, second), (*_, chance) in zip(scores, cases, strict=True):
        deviation = math.sqrt(chance * (1 - chance) / num)
        assert abs(float(jnp.mean(first > second)) - chance) < 4 * deviation + 1e-9


def test_means_decide_where_that_is_asked_for():
    pruner = posteriors.thompson_sampling(
        lambda masks, round: jax.tree.map(lambda mask: jnp.int32(1), masks),
        is_due=lambda round: round == 1,
        until=2,
        weight=10.0,
        share=0.5,
        decision="mean",
    )
    # Links 0 and 1 are live. Link 1 is never in the core, everybody names link 3.
    tree = [jnp.array([0.5, 0.1, 0.0, 0.0])]
    statistics = {
        posteriors.VOTES: [jnp.array([1.0, 0.0, 0.0, 0.0])],
        posteriors.PLACES: [jnp.array([0.0, 0.0, 0.0, 1.0])],
    }
    kept, state = [jnp.array([True, True, False, False])], pruner.init(tree)
    update = jax.jit(pruner.update)
    seen = []
    for index in range(3):
        inputs = PrunerInputs(tree, None, jnp.int32(index), statistics)
        kept, state = update(KEY, kept, state, inputs)
        seen.append((kept[0].tolist(), state.alpha[0].tolist(), state.beta[0].tolist()))
    assert seen[0] == ([True, True, False, False], [11, 1, 1, 1], [1, 11, 1, 1])
    assert seen[1] == ([True, False, False, True], [21, 1, 3.5, 8.5], [1, 21, 8.5, 3.5])
    assert seen[2] == seen[1]  # the posteriors are no longer needed


@functools.cache
def play(build=fedrts.build, method=fedrts.FedRTS, num_rounds=6, **options):
    """Run the draw and all rounds with all clients: the algorithm, states and metrics."""
    setup = protocol.Protocol(
        num_rounds=num_rounds, batcher=quadratic.full_batches(2), optimizer=optax.sgd(0.1)
    )
    algorithm = build(method(**options), quadratic.task(setup, cohort_size=6))
    states = [algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})]
    members, rounds = quadratic.cohort(algorithm, range(6)), []
    for stage in algorithm.stages:
        run = jax.jit(stage.round)
        for _ in range(stage.num_rounds):
            key = jax.random.fold_in(KEY, states[-1].round)
            state, rows, metrics = run(key, states[-1], members, PEOPLE)
            members = members._replace(states=rows)
            states.append(state)
            rounds.append(jax.device_get(metrics))
    return algorithm, states[1:], rounds[1:]  # without the draw's


def usual():
    return play(**fedrts.METHOD.law_settings)


def kernels(tree):
    return {path: np.asarray(leaf) for path, leaf in trees.items(tree) if "kernel" in path}


def test_masks_change_in_the_rounds_that_are_due_and_counts_never():
    _, states, _ = usual()
    for state in states:
        live = {path: int(mask.sum()) for path, mask in kernels(state.masks).items()}
        assert live == {"dense/kernel": 10, "head/kernel": 6}
    changed = [
        int(masks.num_changed(before.masks, after.masks)) > 0
        for before, after in itertools.pairwise(states)
    ]
    assert changed == [False, True, False, True, False, False]
    before, after = states[1:3]
    for path, mask in kernels(after.masks).items():
        grown = mask & ~kernels(before.masks)[path]
        assert not kernels(after.params)[path][grown].any()
        assert not kernels(after.params)[path][~mask].any()


def test_posteriors_learn_of_pruned_links_in_due_rounds_only():
    _, states, _ = usual()
    for index, (before, after) in enumerate(itertools.pairwise(states)):
        for path, mask in kernels(before.masks).items():
            name = path.partition("/")[0]
            alpha, beta = (
                np.asarray(getattr(after.pruner, which)[name]["kernel"])
                - np.asarray(getattr(before.pruner, which)[name]["kernel"])
                for which in ("alpha", "beta")
            )
            seen = index < 5 and (mask | (index in (1, 3)))  # outcomes weigh as six clients
            np.testing.assert_allclose(
                alpha + beta, 6.0 * np.broadcast_to(seen, mask.shape), rtol=1e-5
            )
            if index < 5:  # everybody's core has as many links
                share = 0.4 * (1.0 + math.cos(math.pi * (index + 1) / 6))
                number = min(int(share * mask.sum()), mask.size - mask.sum())
                assert alpha[mask].sum() == pytest.approx(6.0 * (mask.sum() - number), rel=1e-5)


def test_places_travel_in_due_rounds_only_and_cost_what_is_written():
    algorithm, states, rounds = usual()
    for index, (state, metrics) in enumerate(zip(states, rounds, strict=False)):
        reply = metrics.sent.up["reply"]
        places = reply["places"]
        assert bool(np.any(places.clients)) == (index in (1, 3))
        traffic = ledger.account(metrics, state, algorithm)
        stored = ledger.charge_storage(metrics, state, storage_models.fedrts_f4)
        published = traffic.published["fedrts"]
        assert published.downlink == stored.downlink
        if index not in (1, 3):
            assert published == stored
            continue
        kept = [int(np.sum(mask)) for mask in jax.tree.leaves(state.masks)]
        sizes = trees.sizes(state.masks)
        pruned = [size - n for size, n in zip(sizes, kept, strict=True)]
        np.testing.assert_array_equal(places.live_counts, pruned)
        share = 0.4 * (1.0 + math.cos(math.pi * (index + 1) / 6))
        wanted = [0, min(int(share * 10), 14), 0, min(int(share * 6), 2)]
        np.testing.assert_array_equal(places.sent_counts, [wanted] * 6)
        assert published.uplink - stored.uplink == 6 * (5 * wanted[1] + 3 * wanted[3])
        without = metrics._replace(
            sent=metrics.sent._replace(
                up={"reply": {name: one for name, one in reply.items() if name != "places"}}
            )
        )
        difference = traffic.uplink_bits - ledger.account(without, state, algorithm).uplink_bits
        named = jax.tree.map(lambda mask: np.zeros(mask.shape, np.float32), state.masks)
        for mask, leaf, number in zip(
            jax.tree.leaves(state.masks), jax.tree.leaves(named), wanted, strict=True
        ):
            leaf.reshape(-1)[np.flatnonzero(~np.asarray(mask).ravel())[:number]] = 1.0
        written = messages.places("places", named, jax.tree.map(jnp.logical_not, state.masks))
        frame = wire_format.frame_bytes(len(written))
        # The names are written as what differs from the name before, so the first pays for more.
        assert abs(difference - 6 * 8 * (len(wire_format.encode(written)) - frame)) <= 6 * 8 * 8


def test_places_are_written_as_bits_of_pruned_entries():
    rng = np.random.default_rng(0)
    known = {"a": rng.random((7, 9)) < 0.8, "b": rng.random(5) < 0.5, "c": np.ones(4, np.bool_)}
    tree = {name: (mask & (rng.random(mask.shape) < 0.2)) * 1.0 for name, mask in known.items()}
    tree["c"][:] = 0.0
    message = messages.places("places", tree, known)
    data = wire_format.encode(message)
    back = wire_format.decode(data)
    assert sorted(back) == [f"places/{name}" for name in ("a", "b") if tree[name].any()]
    for name, bits in back.items():
        mask = known[name[-1]]
        np.testing.assert_array_equal(bits, tree[name[-1]][mask] != 0)
    plans = messages.plan_places(
        messages.specs("places", jax.tree.map(lambda leaf: leaf != 0, tree)),
        [int(known[name].sum()) for name in "abc"],
        [int(np.count_nonzero(tree[name])) for name in "abc"],
    )
    assert all(plan.dtype == headers.BOOL for plan in plans)
    lengths = sum(map(sum, wire_format.measure(plans)))
    assert len(data) == wire_format.frame_bytes(len(plans)) + lengths


def test_resnet18_names_as_many_places_as_published():
    """Density 0.2 of all parameters, the output layer whole: 40 % of what is live elsewhere."""
    widths = [(64, 64), (64, 128), (128, 256), (256, 512)]
    shapes = [(3, 3, 3, 64), *[(3, 3, 64, 64)] * 4]
    for before, width in widths[1:]:
        shapes += [(3, 3, before, width), *[(3, 3, width, width)] * 3, (1, 1, before, width)]
    num_params, num_kernels = 11_173_962, sum(map(math.prod, shapes))
    wanted = int(0.2 * num_params) - (num_params - num_kernels)
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    with jax.enable_x64(True):
        counts = allocation.erk()(leaves, jnp.float64(1.0 - wanted / num_kernels))
    kept = list(map(int, counts))
    assert sum(kept) == 2_220_056
    # The published 888,022 are 40 % of all together, without rounding each layer down.
    assert 888_022 - len(kept) < sum(int(0.4 * number) for number in kept) <= 888_022
    assert storage_models.places(888_022, 2**23) == 23 * 888_022  # 2.55 MB


def test_a_run_without_any_draw_is_refused():
    setup = protocol.Protocol(
        num_rounds=6, batcher=quadratic.full_batches(2), optimizer=optax.sgd(0.1)
    )
    with pytest.raises(ValueError, match=r"prune_every must be at most 2, the last round in which"):
        fedrts.build(fedrts.FedRTS(prune_every=3), quadratic.task(setup))


@pytest.mark.slow
def test_without_exchanges_it_trains_under_random_masks():
    _, states, _ = play(sparsity=0.5, drop_fraction=0.0, num_rounds=3)
    _, expected, _ = play(
        random_masks.build, random_masks.RandomMasks, num_rounds=3, sparsity=0.5, allocation="erk"
    )
    for state, other in zip(states, expected, strict=True):
        for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
