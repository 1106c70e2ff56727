import functools
import inspect
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import masks as mask_trees
from fedjaxprune import trees
from fedjaxprune.pruning import allocation, pruners, schedules, scores, selection
from fedjaxprune.types import PrunerInputs
from tests import draws

KEY = jax.random.key(0)
SHAPES = {
    "conv": {"kernel": (3, 3, 4, 8), "bias": (8,)},
    "dense": [{"kernel": (24, 16)}, None],
    "scale": (16,),
}


def draw(seed):
    shapes, structure = jax.tree.flatten(SHAPES, is_leaf=lambda node: isinstance(node, tuple))
    leaves = [draws.normal(10 * seed + i, *shape) for i, shape in enumerate(shapes)]
    return jax.tree.unflatten(structure, leaves)


PARAMS, GRADS = draw(0), draw(1)
SIZE = sum(trees.sizes(PARAMS))
FULL = mask_trees.full(PARAMS)
HALF = jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf) > 0, draw(2)))
RAMP = schedules.cubic(initial_sparsity=0.2, final_sparsity=0.9, begin_round=0, end_round=10)


def inputs(round=0, params=PARAMS, grads=GRADS):
    return PrunerInputs(params=params, grads=grads, round=jnp.int32(round))


def run(pruner, masks, **given):
    new, _ = jax.jit(pruner.update)(KEY, masks, pruner.init(PARAMS), inputs(**given))
    return new


def kept(masks):
    return mask_trees.num_kept(masks).tolist()


def subset(small, large):
    within = jax.tree.map(lambda a, b: bool(jnp.all(~a | b)), small, large)
    return all(jax.tree.leaves(within))


def anew(sparsity):
    return pruners.chain(pruners.grow_to(0.0, score=scores.magnitude), pruners.prune_to(sparsity))


PRUNERS = {
    "keep": pruners.keep,
    "prune_to": lambda: pruners.prune_to(0.8),
    "prune_to_ramp": lambda: pruners.prune_to(RAMP),
    "prune_to_random": lambda: pruners.prune_to(0.5, score=scores.random),
    "prune_to_saliency": lambda: pruners.prune_to(0.5, score=scores.saliency),
    "prune_to_erk": lambda: pruners.prune_to(RAMP, allocation=allocation.erk()),
    "prune_to_uniform": lambda: pruners.prune_to(RAMP, allocation=allocation.uniform()),
    "prune_to_channels": lambda: pruners.prune_to(0.5, selection=selection.channels()),
    "drop": lambda: pruners.drop(0.3),
    "drop_ramp": lambda: pruners.drop(RAMP, score=scores.gradient),
    "grow_to": lambda: pruners.grow_to(0.2, score=scores.gradient, allocation=allocation.uniform()),
    "grow_to_pool": lambda: pruners.grow_to(0.1, score=scores.random),
    "chain": lambda: pruners.chain(pruners.drop(0.3), pruners.grow_to(RAMP, score=scores.gradient)),
    "chain_of_none": pruners.chain,
    "anew": lambda: anew(RAMP),
    "when": lambda: pruners.when(schedules.every(3, until=9), pruners.prune_to(RAMP)),
    "exempt": lambda: pruners.exempt(pruners.prune_to(RAMP), mask_trees.is_kernel),
    "exempt_all": lambda: pruners.exempt(pruners.prune_to(RAMP), allocation.nothing),
    "exempt_when_chain": lambda: pruners.exempt(
        pruners.when(
            schedules.at(0, 4),
            pruners.chain(
                pruners.drop(0.2, score=scores.random),
                pruners.prune_to(RAMP, selection=selection.n_of_m(n=2, m=4)),
                pruners.grow_to(0.5, score=scores.saliency, allocation=allocation.erk()),
            ),
        ),
        mask_trees.is_kernel,
    ),
}
DROPPING = [
    name for name in PRUNERS if name.startswith(("prune_to", "drop", "keep", "when", "exempt"))
]


@functools.cache
def compiled(name):
    """Compile each pruner once for all laws, and fail at a second trace."""
    chex.clear_trace_counter()
    pruner = PRUNERS[name]()
    return pruner.init(PARAMS), jax.jit(chex.assert_max_traces(pruner.update, n=1))


@pytest.mark.usual(
    "chain_of_none",
    "exempt_when_chain",
    "grow_to_pool",
    "prune_to_saliency",
    "prune_to_ramp",
    "drop_ramp",
    "anew",
)
@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_a_pruner_is_traced_once_and_returns_what_it_was_given(name):
    state, update = compiled(name)
    masks = HALF
    for round in range(4):
        new, after = update(jax.random.fold_in(KEY, round), masks, state, inputs(round))
        chex.assert_trees_all_equal_shapes_and_dtypes(new, masks)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        masks, state = new, after


def test_a_pruner_can_be_scanned_over_rounds():
    pruner = PRUNERS["exempt_when_chain"]()

    def step(carry, round):
        masks, state = carry
        return pruner.update(jax.random.fold_in(KEY, round), masks, state, inputs(round)), None

    scanned, _ = jax.jit(
        lambda: jax.lax.scan(step, (FULL, pruner.init(PARAMS)), jnp.arange(3, dtype=jnp.int32))[0]
    )()
    state, update = compiled("exempt_when_chain")
    masks = FULL
    for round in range(3):
        masks, state = update(jax.random.fold_in(KEY, round), masks, state, inputs(round))
    chex.assert_trees_all_equal(scanned, masks)


@pytest.mark.parametrize("name", [name for name in DROPPING if name != "exempt_when_chain"])
@pytest.mark.parametrize("masks", [FULL, HALF], ids=["full", "half"])
def test_what_prunes_never_regrows(name, masks):
    state, update = compiled(name)
    assert subset(update(KEY, masks, state, inputs())[0], masks)


@pytest.mark.parametrize("name", ["grow_to", "grow_to_pool", "keep"])
def test_what_grows_never_prunes(name):
    state, update = compiled(name)
    for masks in (FULL, HALF):
        assert subset(masks, update(KEY, masks, state, inputs())[0])


@pytest.mark.parametrize("pruner", [pruners.prune_to(RAMP), anew(RAMP)], ids=["nested", "anew"])
def test_prune_to_holds_the_exact_number_in_every_round(pruner):
    update = jax.jit(pruner.update)
    masks, state = FULL, pruner.init(PARAMS)
    for t in range(12):
        masks, state = update(KEY, masks, state, inputs(t, params=draw(t)))
        left = 1 - min(t / 10, 1)
        assert sum(kept(masks)) == SIZE - round((0.9 + (0.2 - 0.9) * left**3) * SIZE)


def test_prune_to_keeps_the_largest_of_the_live_weights():
    masks = run(pruners.prune_to(0.8), HALF)
    values = np.concatenate([np.abs(leaf).ravel() for leaf in jax.tree.leaves(PARAMS)])
    live = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(HALF)])
    after = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(masks)])
    assert values[after].min() > values[live & ~after].max()


def test_prune_to_leaves_alone_what_is_sparser_already():
    for make in (allocation.uniform, allocation.global_pool):
        chex.assert_trees_all_equal(run(pruners.prune_to(0.1, allocation=make()), HALF), HALF)


def test_counts_are_exact_where_scores_are_not_finite():
    params = jax.tree.map(lambda leaf: leaf.at[:].set(jnp.nan), PARAMS)
    masks = run(pruners.prune_to(0.75), HALF, params=params)
    assert sum(kept(masks)) == SIZE - round(0.75 * SIZE)
    infinite = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), GRADS)
    grow = pruners.grow_to(0.25, score=scores.gradient, allocation=allocation.uniform())
    masks = run(grow, HALF, grads=infinite)
    assert kept(masks) == [
        max(n - round(0.25 * n), live)
        for n, live in zip(trees.sizes(PARAMS), kept(HALF), strict=True)
    ]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.99])
def test_drop_takes_its_part_of_the_live_weights_of_every_leaf(fraction):
    masks = run(pruners.drop(fraction), HALF)
    assert kept(masks) == [live - math.floor(fraction * live) for live in kept(HALF)]
    for before, after, values in zip(
        jax.tree.leaves(HALF), jax.tree.leaves(masks), jax.tree.leaves(PARAMS), strict=True
    ):
        dropped = before & ~after
        worst_kept = jnp.min(jnp.where(after, jnp.abs(values), jnp.inf))
        best_dropped = jnp.max(jnp.where(dropped, jnp.abs(values), -jnp.inf))
        assert bool(worst_kept > best_dropped)


def test_grow_to_switches_on_the_best_dead_weights():
    grow = pruners.grow_to(0.25, score=scores.gradient, allocation=allocation.uniform())
    masks = run(grow, HALF)
    assert kept(masks) == [n - round(0.25 * n) for n in trees.sizes(PARAMS)]
    for before, after, values in zip(
        jax.tree.leaves(HALF), jax.tree.leaves(masks), jax.tree.leaves(GRADS), strict=True
    ):
        grown, dead = after & ~before, ~after
        worst_grown = jnp.min(jnp.where(grown, jnp.abs(values), jnp.inf))
        best_dead = jnp.max(jnp.where(dead, jnp.abs(values), -jnp.inf))
        assert bool(worst_grown > best_dead)


def test_grow_to_in_one_pool_fills_the_pool():
    masks = run(pruners.grow_to(0.25, score=scores.gradient), HALF)
    assert sum(kept(masks)) == SIZE - round(0.25 * SIZE)
    assert subset(HALF, masks)


def test_growing_everything_first_means_choosing_anew():
    sparse = run(pruners.prune_to(0.9, score=scores.random), FULL)
    fresh = run(pruners.prune_to(0.8), FULL)
    chex.assert_trees_all_equal(run(anew(0.8), sparse), fresh)


def test_drop_then_grow_keeps_the_sparsity_and_moves_the_weights():
    for shares in (allocation.uniform(), allocation.erk(), allocation.global_pool()):
        sparse = run(pruners.prune_to(0.8, allocation=shares), FULL)
        grow = pruners.grow_to(0.8, score=scores.gradient, allocation=shares)
        revised = run(pruners.chain(pruners.drop(0.3), grow), sparse)
        assert sum(kept(revised)) == sum(kept(sparse))
        assert int(mask_trees.num_changed(sparse, revised)) > 0


def test_chain_gives_each_pruner_a_key_of_its_own():
    seen = []

    def spy():
        def update_fn(key, masks, state, inputs):
            seen.append(jax.random.key_data(key).tolist())
            return masks, state

        return pruners.keep()._replace(update=update_fn)

    pruners.chain(spy(), spy()).update(KEY, FULL, ((), ()), inputs())
    assert seen[0] != seen[1]


def counting():
    """Make a pruner whose state counts how often it ran."""

    def update_fn(key, masks, state, inputs):
        return masks, jax.tree.map(lambda leaf: leaf + 1, state)

    return pruners.keep()._replace(
        init=lambda params: {path: jnp.int32(0) for path in trees.paths(params)}, update=update_fn
    )


def test_when_runs_its_pruner_and_moves_its_state_only_if_due():
    pruner = pruners.when(
        schedules.every(2, start=1), pruners.chain(counting(), pruners.prune_to(RAMP))
    )
    masks, state = FULL, pruner.init(PARAMS)
    update = jax.jit(pruner.update)
    for round in range(5):
        before = masks
        masks, state = update(KEY, masks, state, inputs(round))
        changed = int(mask_trees.num_changed(before, masks)) > 0
        assert changed == (round % 2 == 1)
    assert {int(leaf) for leaf in jax.tree.leaves(state)} == {2}


def test_exempt_leaves_are_not_touched_and_count_in_no_pool():
    masks = run(pruners.exempt(pruners.prune_to(0.75), mask_trees.is_kernel), FULL)
    flags = mask_trees.prunable_leaves(PARAMS, mask_trees.is_kernel)
    sizes = trees.sizes(PARAMS)
    assert [n for n, flag in zip(kept(masks), flags, strict=True) if not flag] == [8, 16]
    pool = sum(n for n, flag in zip(sizes, flags, strict=True) if flag)
    live = sum(n for n, flag in zip(kept(masks), flags, strict=True) if flag)
    assert live == pool - round(0.75 * pool)
    partly = run(pruners.exempt(anew(0.75), mask_trees.is_kernel), HALF)
    chex.assert_trees_all_equal(partly["scale"], HALF["scale"])
    chex.assert_trees_all_equal(partly["conv"]["bias"], HALF["conv"]["bias"])


def test_the_state_of_an_exempt_pruner_knows_only_the_prunable_leaves():
    pruner = pruners.exempt(counting(), mask_trees.is_kernel)
    state = pruner.init(PARAMS)
    assert sorted(state) == ["conv/kernel", "dense/0/kernel"]
    _, after = pruner.update(KEY, FULL, state, inputs(grads=None))
    assert {int(leaf) for leaf in jax.tree.leaves(after)} == {1}


def test_channels_are_pruned_whole():
    pruner = pruners.exempt(
        pruners.prune_to(0.5, allocation=allocation.uniform(), selection=selection.channels()),
        mask_trees.is_kernel,
    )
    for leaf in jax.tree.leaves(run(pruner, FULL)):
        if leaf.ndim >= 2:
            rows = np.asarray(leaf).reshape(-1, leaf.shape[-1])
            assert (rows.all(axis=0) | ~rows.any(axis=0)).all()
            assert rows.all(axis=0).sum() == leaf.shape[-1] // 2


def test_scores_are_what_they_are_called():
    given = inputs()
    for name, function in {
        "magnitude": lambda weight, grad: np.abs(weight),
        "gradient": lambda weight, grad: np.abs(grad),
        "saliency": lambda weight, grad: np.abs(weight * grad),
    }.items():
        got = getattr(scores, name)(KEY, given)
        chex.assert_trees_all_equal_shapes_and_dtypes(got, PARAMS)
        chex.assert_trees_all_close(got, jax.tree.map(function, PARAMS, GRADS), rtol=1e-6)
    first, again = scores.random(KEY, given), scores.random(KEY, given)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, PARAMS)
    chex.assert_trees_all_equal(first, again)
    other = scores.random(jax.random.key(1), given)
    assert not np.array_equal(first["scale"], other["scale"])
    same_shape = given._replace(params={"a": jnp.zeros(9), "b": jnp.zeros(9)})
    twins = scores.random(KEY, same_shape)
    assert not np.array_equal(twins["a"], twins["b"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_scores_of_narrow_parameters_are_float32(dtype):
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    for score in (scores.magnitude, scores.random, scores.gradient, scores.saliency):
        got = score(KEY, inputs(params=narrow, grads=narrow))
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("score", [scores.gradient, scores.saliency])
def test_a_score_that_needs_gradients_says_so(score):
    pruner = pruners.when(schedules.every(2), pruners.grow_to(0.5, score=score))
    with pytest.raises(ValueError, match=r"PrunerInputs.grads is None: the clients must report"):
        run(pruner, HALF, grads=None)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_its_range_is_refused(value):
    for make in (pruners.prune_to, lambda given: pruners.grow_to(given, score=scores.random)):
        with pytest.raises(ValueError, match=rf"sparsity must lie in \[0, 1\) .* got {value}"):
            make(value)
    with pytest.raises(ValueError, match=rf"fraction must lie in \[0, 1\) .* got {value}"):
        pruners.drop(value)


@pytest.mark.parametrize("module", [allocation, pruners, schedules, selection])
def test_options_of_factories_are_keyword_only(module):
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("_") or function.__module__ != module.__name__:
            continue
        for parameter in inspect.signature(function).parameters.values():
            if parameter.default is not inspect.Parameter.empty:
                assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, (name, parameter.name)


LAMP = [[0.5, -0.1, 0.2, 0.4], [2.0, -1.0, 1.5, 0.5, 0.1, 3.0]]


def lamp(values):
    tree = [jnp.asarray(leaf, jnp.float32) for leaf in values]
    return tree, scores.lamp(KEY, inputs(params=tree))


def test_lamp_divides_squares_by_those_that_are_larger():
    _, (first, second) = lamp(LAMP)
    np.testing.assert_allclose(first, [1, 0.021739, 0.088889, 0.390244], atol=1e-6)
    expected = [0.307692, 0.061538, 0.147541, 0.015152, 0.000606, 1]
    np.testing.assert_allclose(second, expected, atol=1e-6)
    rest = np.delete(np.asarray(first), 0)
    np.testing.assert_allclose(np.prod(1 - rest), 0.25 / 0.46, rtol=1e-5)


def test_lamp_in_one_pool_keeps_the_printed_weights_whatever_the_scale():
    def largest(tree):
        order = np.argsort(-np.concatenate(tree), kind="stable")[:5]
        text = "".join("01"[int(i in order)] for i in range(10))
        return f"{text[:4]} {text[4:]}"

    for scale in (1.0, 2.0**-40, 2.0**100):
        tree, found = lamp([[scale * value for value in LAMP[0]], LAMP[1]])
        assert largest(found) == "1001 101001"
        assert scale != 1.0 or largest(jax.tree.map(jnp.abs, tree)) == "1000 111001"


def test_lamp_of_equal_weights_takes_the_lower_index_for_the_larger():
    _, (found, zeros) = lamp([[1.0, -1.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(found, [1, 1 / 2, 1 / 3], rtol=1e-6)
    np.testing.assert_array_equal(zeros, 0)


def test_the_flow_of_gradients_needs_the_curvature():
    with pytest.raises(ValueError, match="must have a tree named 'curvature'"):
        scores.gradient_flow(KEY, inputs())
