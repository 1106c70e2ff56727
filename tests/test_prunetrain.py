"""PruneTrain: the lasso over channels, its coefficient, and channels that it empties."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjaxprune import masks, trees
from fedjaxprune.costs import ledger
from fedjaxprune.federated import group_lasso, optimizers
from fedjaxprune.methods import fedavg, prunetrain
from fedjaxprune.pruning.structured import channel_pruning, filters
from fedjaxprune.rounds import protocol
from fedjaxprune.structure.channels.groups import Analysis, Group, Member
from fedjaxprune.structure.compaction import compact
from fedjaxprune.types import PrunerInputs
from tests import quadratic
from tests.test_channels import network

KEY = jax.random.key(7)
PEOPLE = quadratic.population()
# The specification's example: a 1x1 kernel of two inputs and three outputs.
KERNEL = {"kernel": jnp.asarray([[[[0.3, 0, 0.4], [0.4, 0.5, 0]]]], jnp.float32)}
TOTAL = 2.540312


def one_layer(role, axis, size):
    places = np.arange(size)[:, None]
    return Group(size, (Member("kernel", axis, places, role),), (), ())


LAYER = Analysis((one_layer("filter", 3, 3), one_layer("input", 2, 2)), (), ())
CUTS = group_lasso.blocks(LAYER, KERNEL)


def build(method=prunetrain, *, chunk_size=1, **options):
    base = protocol.Protocol(
        num_rounds=6,
        batcher=quadratic.full_batches(2),
        optimizer=optax.sgd(0.1),
        chunk_size=chunk_size,
    )
    settings = {} if method is fedavg else {"penalty_ratio": 0.3, "threshold": 0.5, **options}
    task = quadratic.task(base, num_epochs=2)
    return method.build(method.METHOD.settings(**settings), task)


def play(algorithm, num_rounds=3):
    """Run all stages with all clients: the states before and after each round, and its metrics."""
    state = algorithm.init(quadratic.PARAMS, {"steps": jnp.float32(0.0)})
    members = quadratic.cohort(algorithm, range(6))
    for stage in algorithm.stages:
        run = jax.jit(stage.round)
        for _ in range(min(stage.num_rounds, num_rounds)):
            key = jax.random.fold_in(KEY, state.round)
            after, rows, metrics = run(key, state, members, PEOPLE)
            yield state, after, jax.device_get(metrics)
            state, members = after, members._replace(states=rows)


@functools.cache
def played():
    algorithm = build()
    return algorithm, list(play(algorithm))


def test_the_penalty_adds_up_the_norms_of_outputs_and_inputs():
    outputs, inputs = CUTS
    np.testing.assert_allclose(group_lasso.norms(KERNEL, outputs), [0.5, 0.5, 0.4], atol=1e-6)
    np.testing.assert_allclose(group_lasso.norms(KERNEL, inputs), [0.5, 0.640312], atol=1e-6)
    assert float(group_lasso.total(KERNEL, CUTS)) == pytest.approx(TOTAL, abs=1e-6)
    sized = group_lasso.blocks(LAYER, KERNEL, weights="sqrt_size")
    assert float(group_lasso.total(KERNEL, sized)) == pytest.approx(3.954978, abs=2e-6)


@pytest.mark.parametrize(
    ("which", "wanted"),
    [(0, [[0.6, 0, 1], [0.8, 1, 0]]), (1, [[0.6, 0, 0.8], [0.624695, 0.780869, 0]])],
)
def test_its_gradients(which, wanted):
    grad = jax.grad(lambda params: group_lasso.total(params, CUTS[which : which + 1]))(KERNEL)
    np.testing.assert_allclose(grad["kernel"][0, 0], wanted, atol=1e-6)


@pytest.mark.parametrize(("ratio", "wanted"), [(0.1, 0.100713), (0.2, 0.226605), (0.25, 0.302139)])
def test_the_coefficient_makes_the_penalty_a_share_of_the_objective(ratio, wanted):
    loss = jnp.float32(math.log(10))
    found = group_lasso.coefficient(loss, jnp.float32(TOTAL), ratio=ratio)
    assert float(found) == pytest.approx(wanted, abs=1e-6)
    penalty = float(found) * TOTAL
    assert penalty / (penalty + math.log(10)) == pytest.approx(ratio, rel=1e-6)


def test_a_ratio_of_one_is_refused():
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\), got 1.0"):
        group_lasso.coefficient(jnp.float32(1.0), jnp.float32(1.0), ratio=1.0)


@pytest.mark.parametrize(("amount", "wanted"), [(0.1, [0.24, 0.32]), (0.6, [0.0, 0.0])])
def test_the_proximal_step_shortens_a_block_or_clears_it(amount, wanted):
    block = {"kernel": jnp.asarray([[0.3], [0.4]], jnp.float32)}
    one = Analysis((one_layer("filter", 1, 1),), (), ())
    cuts = group_lasso.blocks(one, block)
    after = group_lasso.shrink(block, cuts, jnp.float32(amount))["kernel"][:, 0]
    np.testing.assert_allclose(after, wanted, atol=1e-7)
    if amount == 0.6:
        assert not np.asarray(after).any()  # exact, and it stays where nothing pushes it
        again = jax.grad(lambda params: group_lasso.total(params, cuts))({"kernel": after[:, None]})
        assert not np.asarray(again["kernel"]).any()
    unchanged = group_lasso.shrink(block, cuts, jnp.float32(0.0))
    chex.assert_trees_all_equal(unchanged, block)


@pytest.mark.parametrize("name", ["pooled_cnn", "resnet_plain"])
def test_blocks_cover_an_entry_twice_but_for_the_networks_own_ends(name):
    _, params, _, _, analysis = network(name)
    covered = {path: np.zeros(leaf.shape, int) for path, leaf in trees.items(params)}
    for cut in group_lasso.blocks(analysis, params):
        line = np.zeros(covered[cut.path].shape[cut.axis], int)
        np.add.at(line, cut.indices.ravel(), 1)
        shape = [1] * covered[cut.path].ndim
        shape[cut.axis] = -1
        covered[cut.path] += line.reshape(shape)
    kernels = [path for path, leaf in trees.items(params) if masks.is_kernel(path, leaf)]
    counts = [np.unique(covered[path]).tolist() for path in kernels]
    assert sorted(counts) == [[1], [1], *[[2]] * (len(kernels) - 2)]
    assert not any(covered[path].any() for path in set(covered) - set(kernels))


def test_a_network_without_channels_is_refused():
    with pytest.raises(ValueError, match="no layer whose channels it is free to lose"):
        group_lasso.blocks(Analysis((), (), ()), KERNEL)


@pytest.mark.parametrize("rule", [optax.sgd(0.25), optax.sgd(0.25, momentum=0.9), optax.adam(0.25)])
def test_the_learning_rate_is_told_from_the_first_step(rule):
    """Adam divides by a root that it corrects in float32."""
    assert optimizers.first_step(rule) == pytest.approx(0.25, rel=1e-5)


def test_an_optimizer_that_does_not_step_is_refused():
    with pytest.raises(ValueError, match="learning rate of the local optimizer cannot be told"):
        optimizers.first_step(optax.set_to_zero())


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_the_coefficient_comes_from_the_clients_losses_by_examples(chunk_size):
    _, after, metrics = next(play(build(chunk_size=chunk_size)))
    points = np.asarray(PEOPLE.examples["inputs"])
    start = np.asarray(quadratic.flatten(quadratic.PARAMS))
    loss = np.mean(0.5 * np.sum(np.square(start[None] - points), axis=1))
    cuts = group_lasso.blocks(quadratic.CHANNELS, quadratic.PARAMS)
    total = float(group_lasso.total(quadratic.PARAMS, cuts))
    wanted = 0.3 * loss / (total * 0.7)
    assert float(after.method.coefficient) == pytest.approx(wanted, rel=1e-5)
    assert float(metrics.train["loss"].weight) == len(points)


def test_a_number_goes_up_for_it_and_one_comes_down_once():
    algorithm, steps = played()
    charged = [ledger.account(metrics, state, algorithm) for state, _, metrics in steps]
    assert charged[0].downlink_bits == 0
    assert charged[0].uplink.values == 6 * 32  # and as many for the numbers of examples, in framing
    live = [sum(metrics.num_downloaded[0, 0].tolist()) for _, _, metrics in steps]
    assert charged[1].downlink.values == 6 * 32 * (live[1] + 1)
    assert charged[2].downlink.values == 6 * 32 * live[2]
    assert charged[2].uplink.values == 6 * 32 * live[2]  # live entries alone


def test_masks_are_nested_and_what_is_dead_has_neither_bias_nor_readers():
    _, steps = played()
    for before, after, _ in steps:
        old, new = jax.device_get((before.masks, after.masks))
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: not np.any(b & ~a), old, new)))
    _, last, metrics = steps[-1]
    (dense, head), own = last.method.keep, last.masks
    assert 0 < int(dense.sum()) < 4
    np.testing.assert_array_equal(own["dense"]["bias"], dense)
    np.testing.assert_array_equal(own["head"]["bias"], head)
    np.testing.assert_array_equal(own["head"]["kernel"], dense[:, None] & head[None])
    np.testing.assert_array_equal(metrics.sent.reports["num_filters"][0], [dense.sum(), head.sum()])
    assert not trees_held(last.params, own)
    assert played()[0].diagnostics(metrics) == {
        "coefficient": float(last.method.coefficient),
        "num_filters": [int(dense.sum()), int(head.sum())],
    }


def trees_held(params, own):
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(own), strict=True)
    return any(bool(jnp.any(jnp.where(mask, 0.0, leaf) != 0.0)) for leaf, mask in pairs)


def test_channels_die_in_the_rounds_that_are_due():
    steps = play(build(prune_every=2))
    counts = [int(masks.num_kept(after.masks).sum()) for _, after, _ in steps]
    assert counts[0] == counts[1] == quadratic.NUM_WEIGHTS > counts[2] == counts[3]


def test_a_period_beyond_the_run_is_refused():
    with pytest.raises(ValueError, match=r"prune_every must be at most .* \(6\), .* got 7"):
        build(prune_every=7)


@pytest.mark.parametrize(
    ("step", "removes"),
    [("proximal", True), pytest.param("gradient", False, marks=pytest.mark.slow)],
)
def test_proximal_steps_make_exact_zeros_where_gradient_steps_do_not(step, removes):
    """Gradient steps jump over zero, proximal ones end there."""
    algorithm = build(step=step, penalty_ratio=0.9, threshold=0.0)
    *_, (_, after, _) = play(algorithm, num_rounds=1)
    assert (int(masks.num_kept(after.masks).sum()) < quadratic.NUM_WEIGHTS) == removes


def test_a_layer_keeps_its_largest_filter():
    layers = filters.layers(
        quadratic.CHANNELS, quadratic.PARAMS, prunable=lambda path, leaf: leaf.ndim > 1
    )
    prune = channel_pruning.prune_small(layers, quadratic.CHANNELS, threshold=100.0)
    inputs = PrunerInputs(quadratic.PARAMS, None, jnp.int32(0))

    @jax.jit
    def run():
        own, _ = prune.update(KEY, masks.full(quadratic.PARAMS), (), inputs)
        return filters.of_masks(layers, own), filters.peaks(quadratic.PARAMS, layers)

    keep, peaks = jax.device_get(run())
    assert [np.flatnonzero(bits).tolist() for bits in keep] == [[int(p.argmax())] for p in peaks]
    with pytest.raises(ValueError, match="threshold must be at least 0, got -1"):
        channel_pruning.prune_small(layers, quadratic.CHANNELS, threshold=-1.0)


@pytest.mark.parametrize(
    "name", ["pooled_cnn", pytest.param("resnet_plain", marks=pytest.mark.slow)]
)
def test_the_small_network_says_what_the_pruned_one_says(name):
    model, params, state, inputs, analysis = network(name)
    layers = filters.layers(analysis, params, prunable=masks.is_kernel)
    rng = np.random.default_rng(0)
    keep = [jnp.asarray(rng.random(group.size) < 0.6) for group in layers]
    mask_of = jax.jit(
        lambda bits: filters.to_masks(analysis, layers, bits, params, drops="filters")
    )
    chosen = jax.device_get(mask_of(keep))
    params = jax.tree.map(
        lambda leaf, mask: np.where(mask | (leaf.ndim < 2), leaf, np.float32(1e-5) * np.sign(leaf)),
        jax.device_get(params),
        chosen,
    )
    prune = channel_pruning.prune_small(layers, analysis, threshold=1e-4)
    own = jax.jit(
        lambda params: prune.update(
            KEY, masks.full(params), (), PrunerInputs(params, None, jnp.int32(0))
        )[0]
    )(params)
    own = jax.device_get(own)
    pruned = jax.tree.map(lambda mask, leaf: np.where(mask, leaf, np.float32(0)), own, params)
    small = compact.compact(model, pruned, own, state=state, inputs=inputs)
    assert sum(trees.sizes(small.params)) < sum(trees.sizes(params))
    wanted = np.asarray(jax.jit(model.predict)(pruned, state, inputs))
    found = np.asarray(jax.jit(small.predict)(small.params, small.state, inputs))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
