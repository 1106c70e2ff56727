import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import trees
from fedjaxprune.pruning import allocation, schedules
from tests import draws

# Weight tensors, first axis the outputs (the order of axes plays no part in a raw score).
LENET5 = [(6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]
ALEXNET = [
    (64, 3, 3, 3),
    (192, 64, 3, 3),
    (384, 192, 3, 3),
    (256, 384, 3, 3),
    (256, 256, 3, 3),
    (4096, 1024),
    (4096, 4096),
    (10, 4096),
]


def resnet18():
    """List ResNet-18's weight tensors for 100 classes, normalization and shortcuts included."""
    tree = {"conv1": (64, 3, 3, 3), "bn1": (64,)}
    before = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            tree[f"{name}.conv1"] = (width, before, 3, 3)
            tree[f"{name}.bn1"] = (width,)
            tree[f"{name}.conv2"] = (width, width, 3, 3)
            tree[f"{name}.bn2"] = (width,)
            if before != width:
                tree[f"{name}.downsample.conv"] = (width, before, 1, 1)
                tree[f"{name}.downsample.bn"] = (width,)
            before = width
    tree["linear"] = (100, 512)
    return tree


def shapes(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def sparsities(tree, sparsity, **options):
    densities = jax.jit(
        lambda value: allocation.erk_densities(shapes(tree), value, **options).astype(jnp.float32)
    )(jnp.float32(sparsity))
    return dict(zip(trees.paths(shapes(tree)), 1.0 - np.asarray(densities), strict=True))


@pytest.mark.parametrize(
    ("tree", "sparsity", "expected"),
    [
        (LENET5, 0.5, [0, 0.4754, 0.5738, 0.2037, 0]),
        (LENET5, 0.9, [0.1965, 0.9055, 0.9232, 0.8565, 0.2066]),
        (ALEXNET, 0.5, [0, 0, 0.3314, 0.4434, 0.3306, 0.0695, 0.6278, 0]),
        (ALEXNET, 0.9, [0, 0.6469, 0.8693, 0.8912, 0.8691, 0.8180, 0.9272, 0]),
    ],
)
def test_erk_gives_the_layer_sparsities_of_feddip(tree, sparsity, expected):
    got = list(sparsities(tree, sparsity).values())
    np.testing.assert_allclose(got, expected, rtol=0, atol=5.1e-5)


def test_erk_gives_the_layer_sparsities_of_feddip_for_resnet18():
    def dense(path, leaf):
        return "bn" in path or "downsample" in path

    got = sparsities(resnet18(), 0.5, dense=dense)
    expected = dict.fromkeys(resnet18(), 0.0)
    expected |= {f"layer3.{name}": 0.2836 for name in ("0.conv2", "1.conv1", "1.conv2")}
    expected |= {"layer4.0.conv1": 0.4648}
    expected |= {f"layer4.{name}": 0.6439 for name in ("0.conv2", "1.conv1", "1.conv2")}
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=5.1e-5), name


def erk_by_the_loop(tree, density, power):
    """Follow the paper's loop in Python, adding one set of leaves to the whole ones at a time."""
    sizes = [int(np.prod(shape)) for shape in tree]
    raw = [(sum(shape) / size) ** power for shape, size in zip(tree, sizes, strict=True)]
    whole = set()
    while len(whole) < len(tree):
        rest = [i for i in range(len(tree)) if i not in whole]
        budget = density * sum(sizes) - sum(sizes[i] for i in whole)
        scale = budget / sum(raw[i] * sizes[i] for i in rest)
        largest = max(raw[i] for i in rest)
        if scale * largest <= 1:
            return [1.0 if i in whole else scale * raw[i] for i in range(len(tree))]
        whole |= {i for i in rest if raw[i] == largest}
    return [1.0] * len(tree)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.6, 0.97])
def test_erk_is_the_loop_of_the_paper(power, sparsity):
    rng = np.random.default_rng(int(100 * sparsity))
    tree = [tuple(rng.integers(1, 40, rng.integers(1, 5)).tolist()) for _ in range(9)]
    got = allocation.erk_densities(
        shapes(tree), schedules.evaluate(schedules.constant(sparsity), jnp.int32(0)), power=power
    )
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, erk_by_the_loop(tree, 1 - sparsity, power), rtol=1e-12)


SCORES = {
    "a": {"kernel": draws.uniform(0, 30, 20)},
    "b": [draws.uniform(1, 5, 5, 2, 7), None],
    "c": draws.uniform(2, 11),
    "empty": jnp.zeros((0, 4)),
}
ALLOCATIONS = {
    "uniform": allocation.uniform,
    "erk": allocation.erk,
    "erk_dense": lambda: allocation.erk(dense=lambda path, leaf: path == "c"),
    "whole_model": allocation.global_pool,
}


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9])
def test_an_allocation_gives_counts_that_the_leaves_can_hold(name, sparsity):
    allocate = ALLOCATIONS[name]()
    schedule = schedules.constant(sparsity)
    counts = jax.jit(lambda t: allocate(SCORES, schedules.evaluate(schedule, t)))(jnp.int32(0))
    assert jax.tree.structure(counts) == jax.tree.structure(SCORES)
    assert all(leaf.dtype == jnp.int32 and leaf.shape == () for leaf in jax.tree.leaves(counts))
    kept = np.array(jax.tree.leaves(counts))
    sizes = np.array(trees.sizes(SCORES))
    assert ((kept >= 0) & (kept <= sizes)).all()
    asked = sizes.sum() - round(sparsity * sizes.sum())
    if name == "whole_model":
        assert kept.sum() == asked
    if name == "uniform":
        assert kept.tolist() == [n - round(sparsity * n) for n in sizes.tolist()]
    if name.startswith("erk") and sparsity < 0.9:
        assert asked - len(sizes) <= kept.sum() <= asked
    if name == "erk_dense":
        assert int(counts["c"]) == 11
    if sparsity == 0.0:
        assert (kept == sizes).all()


def test_erk_keeps_a_whole_number_of_weights_where_the_density_is_plain():
    for size in range(1, 200, 11):  # one leaf: the density is 1/2 but for rounding
        counts = allocation.erk()([jnp.zeros((size, 2))], jnp.float32(0.5))
        assert int(counts[0]) == size


def test_erk_leaves_nothing_where_the_whole_leaves_exceed_the_budget():
    allocate = allocation.erk(dense=lambda path, leaf: path.startswith("a"))
    counts = allocate(SCORES, jnp.float32(0.9))
    assert [int(leaf) for leaf in jax.tree.leaves(counts)] == [600, 0, 0, 0]


def test_allocations_of_an_empty_tree_are_empty():
    for make in ALLOCATIONS.values():
        assert jax.tree.leaves(make()({"a": None}, jnp.float32(0.5))) == []


def test_a_negative_power_is_refused():
    with pytest.raises(ValueError, match=r"power must be finite and not negative, got -1"):
        allocation.erk(power=-1)


KERNELS = [(5, 5, 1, 6), (5, 5, 6, 16), (400, 120), (120, 84), (84, 10)]  # of LeNet-5


def kept(make, sparsity, tree=KERNELS):
    scores = [jnp.zeros(shape, jnp.float32) for shape in tree]
    with jax.enable_x64(True):
        counts = make(scores, jnp.float64(sparsity))
    return [int(count) for count in counts]


@pytest.mark.parametrize(
    ("sparsity", "er", "erk"),
    [
        (0.5, [150, 2400, 19640, 7704, 840], [150, 1259, 20459, 8026, 840]),
        (0.9, [150, 2400, 2286, 897, 413], [120, 226, 3686, 1446, 666]),
        (0.95, [150, 1175, 1111, 435, 200], [60, 113, 1843, 723, 333]),
        (0.99, [69, 219, 207, 81, 37], [12, 22, 368, 144, 66]),
    ],
)
def test_er_ignores_the_size_of_convolutions(sparsity, er, erk):
    assert kept(allocation.er(), sparsity) == er
    assert kept(allocation.erk(), sparsity) == erk


def test_the_guard_takes_from_the_largest_leaf():
    uniform = allocation.uniform()
    assert kept(uniform, 0.9) == [15, 240, 4800, 1008, 84]
    assert kept(uniform, 0.99) == [2, 24, 480, 101, 8]
    assert kept(uniform, 0.999) == [0, 2, 48, 10, 1]
    assert kept(allocation.at_least(uniform), 0.99) == [2, 24, 480, 101, 8]
    guarded = kept(allocation.at_least(uniform), 0.999)
    assert guarded == [1, 2, 47, 10, 1]
    assert sum(guarded) == 61470 - round(0.999 * 61470) == 61
    assert kept(allocation.at_least(uniform, least=3), 0.9999) == [3] * 5  # more than is asked for
    assert kept(allocation.at_least(uniform, least=9), 0.5, [(2, 2), (4, 4)]) == [4, 9]
    with pytest.raises(ValueError, match="least must not be negative, got -1"):
        allocation.at_least(uniform, least=-1)
