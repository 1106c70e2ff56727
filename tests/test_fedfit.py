"""FedFit: scores from moments, a client's exchange, the server's decisions, what is averaged."""

import itertools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import masks, models, trees
from fedjaxprune.costs import storage_models
from fedjaxprune.federated import aggregators, local_training, penalties
from fedjaxprune.federated.corrections import fednova
from fedjaxprune.federated.mask_revision import Judgement, MaskRevision, after_epochs
from fedjaxprune.method import Needs
from fedjaxprune.methods import fedfit, fedmef, random_masks, rigl
from fedjaxprune.pruning import allocation, curvature, drop_and_grow, pruners, schedules, scores
from fedjaxprune.structure import moments
from fedjaxprune.testing import scenario
from fedjaxprune.traffic import DENSE_GRADIENT
from fedjaxprune.types import Batch, Broadcast, PrunerInputs, client_data
from tests import draws, quadratic
from tests.playing import setup as protocol_of

KEY = jax.random.key(5)
MODEL = scenario.network(Needs(products=True))
PEOPLE = quadratic.population()
KINDS = ("inputs", "outputs", "joint", "rows")


def near(found, wanted):
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=2e-6, atol=5e-7)


def of_layer(x, w, g, layer=jnp.matmul):
    """Compute gradient and moments of a layer, and its number of examples."""

    def loss(params, state, batch, key):
        del key
        return jnp.sum(layer(batch.inputs, params["w"]) * batch.labels), (state, {})

    function = moments.of_loss(loss, prunable=lambda path, leaf: True, kinds=KINDS)
    batch = Batch(jnp.asarray(x), jnp.asarray(g), jnp.ones(len(x)))
    _, grads, found = jax.jit(function)({"w": jnp.asarray(w)}, {}, batch, KEY)
    return grads, found, jnp.int32(len(x))


def scored(w, grads, curved):
    params = {"w": jnp.asarray(w)}
    return curvature.removal(params, grads, curved)["w"], curvature.gain(grads, curved)["w"]


# ---- the specification's numbers

X, G = ((1.0, 2.0), (0.0, -1.0), (2.0, 1.0)), ((0.2, -0.1), (-0.3, 0.1), (0.1, 0.3))
W = ((0.5, 0.0), (-0.25, 1.0))
DENSE = {
    ("factored", "fisher"): (
        ((0.7, 0.55), (0.84, 0.66)),
        ((-0.1125, 0), (0.22625, 0.33)),
        ((0.114286, 0.227273), (0.380952, 0)),
    ),
    ("factored", "code"): (
        ((6.3, 4.95), (7.56, 5.94)),
        ((0.5875, 0), (0.43625, 2.97)),
        ((0.012698, 0.025253), (0.042328, 0)),
    ),
    ("joint", "fisher"): (
        ((0.24, 1.11), (0.78, 0.42)),
        ((-0.17, 0), (0.224375, 0.21)),
        ((0.333333, 0.112613), (0.410256, 0)),
    ),
}


@pytest.mark.parametrize(("form", "scale"), sorted(DENSE))
def test_a_dense_layer_has_the_scores_of_the_specification(form, scale):
    grads, found, size = of_layer(X, W, G)
    near(grads["w"], ((0.4, 0.5), (0.8, 0)))
    options: Any = {"form": form, "scale": scale}
    curved = curvature.fisher(found, size, **options)
    for got, wanted in zip(
        (curved["w"], *scored(W, grads, curved)), DENSE[form, scale], strict=True
    ):
        near(got, wanted)


def test_a_convolution_has_the_curvature_of_the_specification():
    x = np.array([[[1, 0, 2], [0, 1, 0], [3, 0, 1]], [[0, 1, 0], [2, 0, 0], [0, 0, 1]]], np.float32)
    g = np.array([[[0.1, 0], [-0.2, 0.1]], [[0, 0.2], [0.1, 0]]], np.float32)

    def layer(x, w):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=layout)

    w = draws.normal(0, 2, 2, 1, 1)
    _, found, size = of_layer(x[..., None], w, g[..., None], layer)
    cases: Any = (
        ({}, (0.1925, 0.165, 0.385, 0.0825)),
        ({"scale": "code"}, (49.28, 42.24, 98.56, 21.12)),
        ({"form": "joint"}, (0.2, 0.08, 0.72, 0.04)),
    )
    for options, wanted in cases:
        near(curvature.fisher(found, size, **options)["w"].ravel(), wanted)


def test_scores_are_exact_for_a_squared_error_with_its_own_curvature():
    x, w, targets = np.asarray(X), np.array([0.5, -0.25]), np.array([1.0, 0.0, 2.0])

    def loss(w):
        return 0.5 * np.mean(np.square(x @ w - targets))

    grads = x.T @ (x @ w - targets) / 3
    curved = np.mean(np.square(x), axis=0)
    trees = ({"w": jnp.asarray(tree, jnp.float32)} for tree in (grads, curved))
    removal, gain = scored(jnp.asarray(w, jnp.float32), *trees)
    near(removal, (0.791667, -0.229167))
    near(removal, [loss(w * keep) - loss(w) for keep in ((0, 1), (1, 0))])
    near(gain, (0.408333, 0.340278))


# The server's example: 8 links, of which the first four are live.
LIVE = {"kernel": jnp.arange(8)[None] < 4}
REMOVALS = ((0.9, -0.1, 0.3, 0.05, 0, 0, 0, 0), (0.2, 0.6, -0.2, 0.1, 0, 0, 0, 0))
GAINS = ((0, 0, 0, 0, 0.4, 0.7, 0.1, 0.2), (0, 0, 0, 0, 0.3, 0.05, 0.6, 0.5))


def exchange(share, drop, grow):
    counts = drop_and_grow.share_counts(fraction=schedules.constant(share))
    return drop_and_grow.drop_and_grow(
        counts, drop=scores.statistic(drop), grow=scores.statistic(grow)
    )


def revised(pruner, **statistics):
    params = {"kernel": jnp.zeros((1, 8))}
    found = {n: {"kernel": jnp.asarray(v, jnp.float32)[None]} for n, v in statistics.items()}
    inputs = PrunerInputs(params, None, jnp.int32(2), statistics=found)
    mask = jax.jit(pruner.update)(KEY, LIVE, (), inputs)[0]["kernel"]
    return set(np.flatnonzero(mask).tolist())


@pytest.mark.parametrize(
    ("count", "own", "union", "exchanged"),
    [
        (2, ({0, 2, 4, 5}, {0, 1, 6, 7}), {0, 1, 2, 4}, {0, 1, 5, 6}),
        (1, ({0, 2, 3, 5}, {0, 1, 3, 6}), {0, 1, 2, 3}, {0, 1, 3, 5}),
    ],
)
def test_clients_and_server_decide_as_in_the_specification(count, own, union, exchanged):
    at_client, sent, votes = exchange(count / 4, "removal", "gain"), [], np.zeros(8)
    for removal, gain, wanted in zip(REMOVALS, GAINS, own, strict=True):
        assert revised(at_client, removal=removal, gain=gain) == wanted
        held = np.isin(np.arange(8), list(wanted))
        votes += held
        sent.append(np.where(np.arange(8) < 4, removal, np.where(held, gain, 0)))
    mean = np.mean(sent, axis=0)
    assert revised(exchange(count / 4, "scores", "scores"), scores=mean) == exchanged
    by_removal = np.where(np.arange(8) < 4, mean, 0)
    pruner = pruners.prune_union(score=scores.statistic("scores"))
    assert revised(pruner, scores=by_removal, masks=votes) == union


def test_by_magnitudes_and_gradients_client_and_server_are_feddst():
    share = drop_and_grow.share_counts(fraction=schedules.constant(0.5))
    for number in range(3):
        params, grads = draws.normal(number, 2, 8)
        params, grads = {"kernel": params[None]}, {"kernel": grads[None]}
        found = {"removal": jax.tree.map(jnp.abs, params), "gain": jax.tree.map(jnp.abs, grads)}
        inputs = PrunerInputs(params, grads, jnp.int32(2), statistics=found)
        own, wanted = (
            pruner.update(KEY, LIVE, (), inputs)[0]
            for pruner in (exchange(0.5, "removal", "gain"), drop_and_grow.drop_and_grow(share))
        )
        chex.assert_trees_all_equal(own, wanted)
        votes = {"masks": jax.tree.map(lambda *held: jnp.float32(held[0] | held[1]), own, LIVE)}
        inputs = inputs._replace(statistics=votes)
        union, wanted = (
            pruner.update(KEY, LIVE, (), inputs)[0]
            for pruner in (
                pruners.prune_union(),
                pruners.prune_union_to(0.5, allocation=allocation.uniform()),
            )
        )
        chex.assert_trees_all_equal(union, wanted)


def test_statistics_and_votes_are_asked_for_where_there_are_none():
    with pytest.raises(ValueError, match="ranks weights by the statistic 'scores'"):
        revised(exchange(0.5, "scores", "scores"))
    with pytest.raises(ValueError, match="prune_union needs the clients' votes 'masks'"):
        revised(pruners.prune_union())


def test_the_share_decays_as_in_the_specification():
    shares = {10: 0.199452, 20: 0.197815, 50: 0.186603, 100: 0.15, 150: 0.1, 200: 0.05}
    shares |= {250: 0.013397, 290: 0.000548, 300: 0.0}
    kept = (199, 197, 186, 150, 100, 50, 13, 0, 0)
    decay = drop_and_grow.cosine_decay(initial=0.2, until=300)
    counts = drop_and_grow.share_counts(fraction=lambda index: decay(index - 1))
    ones = {"kernel": jnp.ones((10, 100), bool)}
    for (index, share), number in zip(shares.items(), kept, strict=True):
        assert abs(float(decay(jnp.float32(index) - 1)) - share) < 1e-6
        assert int(counts(ones, jnp.int32(index))["kernel"]) == number


@pytest.mark.parametrize(
    ("num_rounds", "options", "expected"),
    [
        (500, {}, (10, 300)),
        (12, {}, (2, 7)),
        (1, {}, (1, 1)),
        (40, {"prune_every": 15, "last_prune_round": 90}, (15, 40)),
    ],
)
def test_readjustments_end_at_three_fifths_of_a_run(num_rounds, options, expected):
    assert fedfit.readjusting_rounds(fedfit.FedFit(**options), num_rounds) == expected


# ---- laws of the scores


def random_layer(number, num_rows=4):
    shapes = ((num_rows, 5), (5, 3), (num_rows, 3))
    return [draws.normal(3 * number + i, *shape) for i, shape in enumerate(shapes)]


def test_a_gain_is_at_most_half_the_rows_of_an_example_and_has_no_scale():
    for number in range(4):
        x, w, g = random_layer(number)
        tokens = x.reshape(2, 2, 5), w, g.reshape(2, 2, 3)
        for given, rows in (((x, w, g), 1), (tokens, 2)):
            grads, found, size = of_layer(*given)
            curved = curvature.fisher(found, size)
            removal, gain = scored(w.at[0].set(0.0), grads, curved)
            assert gain.max() <= rows / 2
            assert not removal[0].any()
            scaled, more, _ = of_layer(given[0], w, 4 * given[2])
            _, same = scored(w, scaled, curvature.fisher(more, size))
            np.testing.assert_allclose(same, gain, rtol=1e-5)
    x, w, g = random_layer(9)
    aligned = jnp.outer(x[:, 1], jnp.array([1.0, -2.0, 0.5]))  # output gradients like one input
    grads, found, size = of_layer(x, w, aligned)
    np.testing.assert_allclose(
        scored(w, grads, curvature.fisher(found, size))[1][1], 0.5, rtol=1e-5
    )


def test_scores_do_not_change_where_a_unit_is_scaled_up_and_its_weights_down():
    x, w, g = random_layer(2)
    results = []
    for scale in (1.0, 8.0):
        row = w / scale
        grads, found, size = of_layer(scale * x, row, g)
        results.append(scored(row, grads, curvature.fisher(found, size)))
    chex.assert_trees_all_close(*results, rtol=1e-6)


def test_a_dead_input_gives_no_gain_and_no_worth():
    x, w, g = random_layer(3)
    grads, found, size = of_layer(x.at[:, 2].set(0.0), w, g)
    removal, gain = scored(w, grads, curvature.fisher(found, size))
    assert not removal[2].any()
    assert not gain[2].any()
    assert gain[1].all()


def test_the_curvature_of_a_batch_is_not_the_mean_of_those_of_its_halves():
    x, w, g = random_layer(4)
    whole = of_layer(x, w, g)
    halves = [of_layer(x[i : i + 2], w, 2 * g[i : i + 2]) for i in (0, 2)]
    grads = [one[0]["w"] for one in (whole, *halves)]
    np.testing.assert_allclose(grads[0], (grads[1] + grads[2]) / 2, rtol=1e-5)
    curved = [curvature.fisher(found, size)["w"] for _, found, size in (whole, *halves)]
    assert not np.allclose(curved[0], (curved[1] + curved[2]) / 2, rtol=0.1)


# ---- a client


def judge(params, model_state, batch, key):
    """Score by where a step begins."""
    found, grads = jax.value_and_grad(MODEL.loss, has_aux=True)(params, model_state, batch, key)
    return found, grads, {"at": params, "slope": grads}


def client_of(*, again=None, revise=None, penalties=()):
    def report(found, before, after):
        return jax.tree.map(lambda at, mask: jnp.where(mask, at, 0.0), found["at"], after)

    return local_training.mask_revising_sgd(
        MODEL.loss,
        batcher=quadratic.full_batches(3),
        optimizer=protocol_of().optimizer,
        penalties=penalties,
        revision=MaskRevision(
            masks=revise or (lambda key, masks, params, found, broadcast: ODD),
            is_due=lambda index: index == 1,
            num_steps_before=after_epochs(1, num_epochs=3),
            judgement=Judgement(judge, report, again),
        ),
    )


def nth(number, rest=0):
    return jax.tree.map(
        lambda leaf: jnp.arange(leaf.size).reshape(leaf.shape) % number == rest, quadratic.PARAMS
    )


EVEN, ODD = nth(2), nth(2, 1)


def work(client, round_index=1):
    state = {"steps": jnp.float32(0.0)}
    broadcast = Broadcast(quadratic.PARAMS, EVEN, state, jnp.int32(round_index))
    data = client_data(PEOPLE, jnp.int32(1))
    return jax.jit(client.update)(KEY, broadcast, (), data)[0].fields


def test_scores_are_means_of_the_steps_before_the_revision_or_of_the_last_epoch():
    start = masks.apply(EVEN, quadratic.PARAMS)
    early = work(client_of())
    chex.assert_trees_all_equal(early["scores"], masks.apply(ODD, start))  # of the first step
    assert float(early["metrics"][DENSE_GRADIENT].total) == 5.0  # examples of one step of three
    assert float(early["metrics"][DENSE_GRADIENT].weight) == 15.0
    late = work(client_of(again=after_epochs(2, num_epochs=3)))
    target = np.split(quadratic.mean_point(PEOPLE, 1), [4, 28, 30])[1].reshape(6, 4)
    odd = np.asarray(ODD["dense"]["kernel"])
    rate = 1 - 0.9  # grown weights start at zero, and have made one step
    np.testing.assert_allclose(
        late["scores"]["dense"]["kernel"], np.where(odd, rate * target, 0), rtol=1e-4, atol=1e-6
    )
    assert float(late["metrics"][DENSE_GRADIENT].total) == 10.0
    for name in ("delta", "masks"):
        chex.assert_trees_all_equal(late[name], early[name])


def test_penalties_move_the_weights_and_not_their_scores():
    def revise(key, masks, params, found, broadcast):
        slopes = jax.grad(MODEL.loss, has_aux=True)(
            jax.tree.map(lambda at: at, found["at"]),
            {"steps": jnp.float32(0.0)},
            quadratic.full_batches(3).batch(KEY, client_data(PEOPLE, jnp.int32(1)), jnp.int32(0)),
            KEY,
        )[0]
        return jax.tree.map(lambda a, b: jnp.abs(a - b) < 1e-5, found["slope"], slopes)

    terms = (penalties.proximal(mu=0.5),)
    fields = work(client_of(revise=revise, penalties=terms))
    assert all(np.all(leaf) for leaf in jax.tree.leaves(fields["masks"]))
    plain = local_training.local_sgd(
        MODEL.loss,
        batcher=quadratic.full_batches(3),
        optimizer=protocol_of().optimizer,
        penalties=terms,
    )
    keep = client_of(revise=lambda key, masks, *rest: masks, penalties=terms)
    chex.assert_trees_all_close(work(keep)["delta"], work(plain)["delta"], rtol=1e-6)


def test_rounds_that_are_not_due_are_plain_training_and_have_no_scores():
    fields = work(client_of(), round_index=2)
    plain = local_training.local_sgd(
        MODEL.loss, batcher=quadratic.full_batches(3), optimizer=protocol_of().optimizer
    )
    chex.assert_trees_all_equal(fields["delta"], work(plain)["delta"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(fields["scores"]))
    assert float(fields["metrics"][DENSE_GRADIENT].total) == 0.0


def test_a_judge_scores_a_batch_at_the_present_weights_and_without_filling():
    data = client_data(PEOPLE, jnp.int32(1))
    batch = quadratic.full_batches(1).batch(KEY, data, jnp.int32(0))
    few = jax.tree.map(lambda leaf: leaf[:5], batch)
    assert float(batch.weights.sum()) == 5 < len(batch.weights)
    start = masks.apply(EVEN, quadratic.PARAMS)
    look = fedfit.judge(fedfit.FedFit(), MODEL.loss)
    given = {"steps": jnp.float32(0.0)}
    results = [jax.jit(look)(start, given, one, KEY) for one in (batch, few)]
    chex.assert_trees_all_close(*results, rtol=1e-5)
    _, grads, found = results[0]
    wanted = jax.jit(jax.grad(MODEL.loss, has_aux=True))(start, given, batch, KEY)[0]
    chex.assert_trees_all_close(grads, wanted, rtol=1e-6)
    kernel = EVEN["dense"]["kernel"]
    assert not found[fedfit.REMOVAL]["dense"]["kernel"][~kernel].any()
    assert found[fedfit.GAIN]["dense"]["kernel"].all()


@pytest.mark.parametrize("worth", ["first_order", "second_order", "magnitude"])
def test_scores_can_be_taken_apart(worth):
    grads, found, size = of_layer(X, W, G)
    curved, params = curvature.fisher(found, size), {"w": jnp.asarray(W)}
    settings = fedfit.FedFit(drop_score=worth, grow_score="gradient")
    parts = fedfit._scores(settings, params, grads, curved)
    w, g = np.asarray(W), np.asarray(grads["w"])
    wanted = {
        "first_order": -g * w,
        "second_order": w**2 * np.asarray(curved["w"]) / 2,
        "magnitude": np.abs(w),
    }
    near(parts[fedfit.REMOVAL]["w"], wanted[worth])
    near(parts[fedfit.GAIN]["w"], np.abs(g))


# ---- rounds


def build(method, num_epochs=2, aggregator=None, correction=None, **options):
    settings = method.METHOD.settings(**{**method.METHOD.law_settings, **options})
    base = protocol_of(num_rounds=6, aggregator=aggregator, correction=correction)
    return method.build(settings, quadratic.task(base, model=MODEL, num_epochs=num_epochs))


def play(algorithm, num_rounds, participants=(0, 1, 2, 3, 4, 5)):
    """Run all stages: the states after each round of training."""
    states = [algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})]
    members = quadratic.cohort(algorithm, participants)
    for stage in algorithm.stages:
        run = jax.jit(stage.round)
        for _ in range(min(stage.num_rounds, num_rounds)):
            key = jax.random.fold_in(KEY, states[-1].round)
            state, rows, _ = run(key, states[-1], members, PEOPLE)
            members = members._replace(states=rows)
            states.append(state)
    return states[1 + sum(stage.num_rounds for stage in algorithm.stages[:-1]) :]


def test_without_exchanges_it_is_random_masks_to_the_bit():
    wanted = play(build(random_masks, allocation="erk"), 2)
    chex.assert_trees_all_equal(play(build(fedfit, drop_fraction=0.0), 2), wanted)


def test_layers_keep_their_weights_while_masks_change():
    states = play(build(fedfit), 4)
    changes = []
    for before, after in itertools.pairwise(states):
        assert masks.num_kept(after.masks).tolist() == [4, 10, 2, 6]
        changes.append(int(masks.num_changed(before.masks, after.masks)))
    assert [number > 0 for number in changes] == [False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("decision", ["union", "fresh"])
def test_of_one_client_the_server_takes_the_mask(decision):
    found, wanted = (
        play(build(fedfit, decision=one), 4, participants=(1,)) for one in (decision, "exchange")
    )
    changed = [int(masks.num_changed(a.masks, b.masks)) for a, b in itertools.pairwise(found)]
    assert changed == [0, 10, 0]  # 3 of 10 and 2 of 6, out and in
    chex.assert_trees_all_equal(found, wanted)


def test_a_dropped_weight_counts_as_zero_in_any_mean():
    """The mean of what each client alone would leave, whatever its number of examples."""
    algorithm = build(fedfit, aggregator=aggregators.unweighted_mean())
    draw, train = algorithm.stages
    start = algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})
    start = jax.jit(draw.round)(KEY, start, quadratic.cohort(algorithm, range(6)), PEOPLE)[0]
    start = start._replace(round=jnp.int32(1 + 2))  # exchanges weights
    run = jax.jit(train.round)

    def after(present):
        members = quadratic.cohort(algorithm, range(6), np.isin(np.arange(6), present))
        return run(KEY, start, members, PEOPLE)[0]

    alone, together = [after([i]) for i in (1, 3)], after([1, 3])
    assert int(masks.num_changed(alone[0].masks, alone[1].masks)) > 0
    mean = jax.tree.map(lambda one, other: (one + other) / 2, *(one.params for one in alone))
    wanted = masks.apply(together.masks, mean)
    chex.assert_trees_all_close(together.params, wanted, rtol=1e-5, atol=1e-6)


def test_where_nobody_answers_dense_training_ends_with_the_largest_weights():
    algorithm = build(fedfit, dense_rounds=1, allocation="uniform")
    assert [stage.name for stage in algorithm.stages] == ["start", "settle", "train"]
    state = algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})
    state = state._replace(round=jnp.int32(1))
    members = quadratic.cohort(algorithm, range(6))
    after = jax.jit(algorithm.stages[1].round)(KEY, state, members, PEOPLE)[0]
    assert masks.num_kept(after.masks).tolist() == [4, 12, 2, 4]
    sizes, kept = (np.asarray(tree["dense"]["kernel"]) for tree in (quadratic.PARAMS, after.masks))
    assert np.abs(sizes[kept]).min() >= np.abs(sizes[~kept]).max()


def test_controls_find_masks_that_are_not_exchanged_to_be_fixed():
    for method in (fedfit, fedmef, rigl):
        assert build(method, drop_fraction=0.0).has_fixed_masks
        assert not build(method).has_fixed_masks


def test_settings_that_do_not_fit_the_run_are_refused():
    with pytest.raises(ValueError, match="prune_every must be less than 6"):
        build(fedfit, prune_every=6)
    with pytest.raises(ValueError, match="epochs_before must be at most 2, as clients train 2"):
        build(fedfit, epochs_before=3)
    with pytest.raises(ValueError, match=r"at most 1, .* and score again in the last, got 2"):
        build(fedfit, epochs_before=2, decision="fresh")
    with pytest.raises(ValueError, match=r"'fresh' scores .* must be at least 2, got 1"):
        build(fedfit, num_epochs=1, decision="fresh")
    divided = fednova.normalized_averaging(batcher=quadratic.full_batches(2))
    with pytest.raises(ValueError, match=r"set method\.absent to 'holders'"):
        build(fedfit, correction=divided)
    build(fedfit, correction=divided, absent="holders")
    build(fedfit, prune_every=6, drop_fraction=0.0)  # as the first sentence says


# ---- traffic


@pytest.mark.parametrize(
    ("density", "num_live", "model", "more"),
    [
        (0.5, 5_572_247, 23.74, 26.73),
        (0.3, 3_337_453, 14.80, 16.01),
        (0.2, 2_220_056, 10.33, 10.65),
        (0.1, 1_102_655, 5.86, 5.29),
    ],
)
def test_models_and_scores_take_what_the_specification_lists(density, num_live, model, more):
    """MB (10^6) one way on ResNet-18 for CIFAR-10, in round 10."""
    init = models.resnet18(input_shape=(32, 32, 3), num_classes=10, norm="batch").init
    params, _ = jax.eval_shape(init, KEY)
    kernels = {path: leaf for path, leaf in trees.items(params) if len(leaf.shape) == 4}
    total, size = sum(trees.sizes(params)), sum(trees.sizes(kernels))
    with jax.enable_x64(True):
        sparsity = jnp.float64((1 - density) * total / size)
        shares = np.asarray(allocation.erk_densities(kernels, sparsity))
    pairs = zip(kernels, shares, trees.sizes(kernels), strict=True)
    live = {path: math.floor(share * n) for path, share, n in pairs}
    exchanged = sum(math.floor(0.199452 * n) for n in live.values())
    assert abs(sum(live.values()) - num_live) < len(live)  # rounded down in each layer
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    kept = [live.get(path, leaf.size) for path, leaf in trees.items(params)]
    with_bitmaps = storage_models.values(kept, shapes) + size  # of full leaves, too
    assert round(with_bitmaps / 8e6, 2) == model
    assert round(4 * (num_live + exchanged) / 1e6, 2) == more


def test_scores_are_charged_in_readjusting_rounds_alone():
    algorithm = build(fedfit)
    state = algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})
    members, bits = quadratic.cohort(algorithm, range(6)), []
    for stage, number in zip(algorithm.stages, (1, 3), strict=True):
        run = jax.jit(stage.round)
        for _ in range(number):
            before = state
            state, rows, metrics = run(jax.random.fold_in(KEY, state.round), state, members, PEOPLE)
            members = members._replace(states=rows)
            charged = fedfit.formula(jax.device_get(metrics), before)
            bits.append((charged.uplink, charged.downlink))
    model = 32 * (4 + 10 + 2 + 6) + 24 + 8
    assert bits[1:3] == [(6 * model, 6 * model)] * 2
    num_grown = 3 + 2  # of 10 and 6
    assert bits[3] == (6 * (model + 32 * (10 + 6 + num_grown)), 6 * model)
