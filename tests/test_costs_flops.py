"""Multiply-adds: closed forms, published counts, any model, any mask, and XLA's own opinion."""

import math
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.experimental import pallas as pl

from benchmarks import executed
from fedjaxprune import masks, models, trees
from fedjaxprune.costs import flops
from fedjaxprune.models import adapters, gated, lstm, vgg
from fedjaxprune.structure import jaxprs
from fedjaxprune.types import Batch
from tests import published_flops as formulas

KEY = jax.random.key(0)
IMAGE = ("NHWC", "HWIO", "NHWC")


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def mask(*sizes, kept, seed=0):
    """Keep a given number of entries, anywhere."""
    flat = np.arange(math.prod(sizes)) < kept
    return np.random.default_rng(seed).permutation(flat).reshape(sizes)


def network(name, side=32, num_classes=10):
    channels = 1 if name in ("lenet5", "cnn") else 3
    options = {} if channels == 1 else {"norm": "batch"}
    make = getattr(models, name)
    return (
        make(input_shape=(side, side, channels), num_classes=num_classes, **options),
        (side, side, channels),
    )


def batch_of(size, image):
    return Batch(
        inputs=shape(size, *image),
        labels=shape(size, dtype=jnp.int32),
        weights=shape(size),  # pyright: ignore[reportArgumentType]
    )


# The layers' closed forms; the ResNets' are the papers' 555.42, 68.86 and 40.55 million in full.
COUNTS = {
    "lenet5": (28, 28**2 * 25 * 6 + 10**2 * 25 * 6 * 16 + 400 * 120 + 120 * 84 + 84 * 10),
    "cnn": (28, 28**2 * 25 * 32 + 14**2 * 25 * 32 * 64 + 3_136 * 512 + 512 * 10),
    "resnet20": (32, 40_551_040),
    "resnet32": (32, 68_862_592),
    "resnet18": (32, 555_422_720),
}


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_dense_networks_have_the_published_counts(name):
    side, count = COUNTS[name]
    model, image = network(name, side)
    layers = flops.of_model(model, None, shape(1, *image))
    assert flops.dense(layers).forward == flops.sparse(layers).forward == count
    # Every kernel is a layer, and the first alone passes no gradient on.
    params, _ = jax.eval_shape(model.init, KEY)
    kernels = [
        p
        for p, leaf in zip(trees.paths(params), jax.tree.leaves(params), strict=True)
        if leaf.ndim > 1
    ]
    assert sorted(layer.path for layer in layers) == sorted(kernels)
    assert flops.dense(layers).weight_gradient == count
    assert flops.dense(layers).input_gradient == count - layers[0].dense.forward


def images(plan, kernel=3):
    """Count convolutions given as (side of the output, channels in, channels out)."""
    return sum(side**2 * kernel**2 * before * after for side, before, after in plan)


def stack(sides, widths, channels=3):
    return images(zip(sides, [channels, *widths[:-1]], widths, strict=True))


GRAY, COLOUR = (28, 28, 1), (32, 32, 3)
VGG11 = stack([32, 16, 8, 8, 4, 4, 2, 2], [64, 128, 256, 256, 512, 512, 512, 512])
VGG16 = stack(
    [32] * 2 + [16] * 2 + [8] * 3 + [4] * 3 + [2] * 3, [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
)
# Networks of which the papers give the layers, but no count.
LAYERS = {
    "alexnet": (
        lambda: models.alexnet(input_shape=COLOUR, num_classes=10),
        COLOUR,
        stack([16, 8, 4, 4, 4], [64, 192, 384, 256, 256]) + 1024 * 4096 + 4096**2 + 4096 * 10,
    ),
    "two_cnn": (
        lambda: models.two_cnn(input_shape=GRAY, num_classes=10),
        GRAY,
        images([(26, 1, 32), (12, 32, 64)], kernel=5) + 64 * 7**2 * 512 + 512 * 10,
    ),
    "two_cnn, colour": (
        lambda: models.two_cnn(input_shape=COLOUR, num_classes=100, width=128),
        COLOUR,
        images([(30, 3, 128), (14, 128, 256)], kernel=5) + 256 * 7**2 * 512 + 512 * 100,
    ),
    "femnist_cnn": (
        lambda: models.femnist_cnn(input_shape=GRAY, num_classes=62),
        GRAY,
        images([(26, 1, 64), (12, 64, 128)], kernel=5) + 128 * 7**2 * 2048 + 2048 * 62,
    ),
    "pooled_cnn": (
        lambda: models.pooled_cnn(
            input_shape=COLOUR, num_classes=10, channels=(32, 64, 32), hidden_size=128
        ),
        COLOUR,
        stack([32, 16, 8], [32, 64, 32]) + 4**2 * 32 * 128 + 128 * 10,
    ),
    "vgg11": (
        lambda: vgg.vgg11(input_shape=COLOUR, num_classes=10, norm="none"),
        COLOUR,
        VGG11 + 512 * 10,
    ),
    "vgg11, torchvision's head": (
        lambda: vgg.vgg11(
            input_shape=COLOUR, num_classes=10, norm="batch", hidden_sizes=(4096, 4096), pool=7
        ),
        COLOUR,
        VGG11 + 512 * 7**2 * 4096 + 4096**2 + 4096 * 10,
    ),
    "vgg16": (
        lambda: vgg.vgg16(input_shape=COLOUR, num_classes=10, norm="batch"),
        COLOUR,
        VGG16 + 512 * 10,
    ),
    "mlp": (
        lambda: models.mlp(input_shape=(8, 8, 1), num_classes=10, hidden_sizes=(64, 32)),
        (8, 8, 1),
        64 * 64 + 64 * 32 + 32 * 10,
    ),
    "char_lstm": (
        lambda: lstm.char_lstm(input_shape=(80,), num_classes=80),
        (80,),
        80 * 4 * 256 * (8 + 256 + 256 + 256) + 256 * 80,
    ),
}


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_networks_of_the_papers_have_the_counts_of_their_layers(name):
    make, example, count = LAYERS[name]
    dtype = jnp.int32 if name == "char_lstm" else jnp.float32
    layers = flops.of_model(make(), None, shape(1, *example, dtype=dtype))
    assert flops.dense(layers).forward == count
    assert flops.BETWEEN not in [layer.path for layer in layers]


@pytest.mark.slow
def test_resnet18_has_fedtinys_counts_by_stage_and_gated_resnet32_its_own():
    model, image = network("resnet18")
    stages: dict[str, int] = dict.fromkeys(
        ("conv_1", "stage_1", "stage_2", "stage_3", "stage_4", "dense_1"), 0
    )
    for layer in flops.of_model(model, None, shape(1, *image)):
        (stage,) = (name for name in stages if layer.path.startswith(name))
        stages[stage] += layer.dense.forward
    millions = [round(count / 1e6, 2) for count in stages.values()]
    assert millions == [1.77, 150.99, 134.22, 134.22, 134.22, 0.01]

    model = gated.gated_resnet32(input_shape=COLOUR, num_classes=10, norm="batch", density=0.7)
    counts = {
        layer.path: layer.dense.forward for layer in flops.of_model(model, None, shape(1, *COLOUR))
    }
    of_gates = sum(count for path, count in counts.items() if path.endswith("gate_kernel"))
    assert of_gates == 52_320 - 10 * (16 + 32 + 64)  # their parameters, less the biases
    assert sum(counts.values()) - of_gates == COUNTS["resnet32"][1]
    assert round(counts["conv_1/kernel"] / 1e6, 2) == 0.44


@pytest.mark.usual("lenet5")
@pytest.mark.parametrize("name", ["lenet5", "cnn", "resnet20"])
def test_counts_do_not_depend_on_the_back_end(name, monkeypatch):
    model, image = network(name, 28)
    here = flops.of_model(model, None, batch_of(2, image))
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert flops.of_model(model, None, batch_of(2, image)) == here


def test_resnets_agree_with_the_papers_to_the_digits_they_give():
    for name, millions in (("resnet18", 555.42), ("resnet32", 68.86), ("resnet20", 40.55)):
        assert round(COUNTS[name][1] / 1e6, 2) == millions


def test_fedtinys_ratios_come_out():
    model, image = network("resnet18")
    params, _ = jax.eval_shape(model.init, KEY)
    # The first convolution is dense, every other kernel at a density of 0.01.
    kept = trees.map_with_path(
        lambda path, leaf: (
            Fraction(1, 100) if masks.is_kernel(path, leaf) and path != "conv_1/kernel" else 1
        ),
        params,
    )
    layers = flops.of_model(model, kept, shape(1, *image))
    sparse, dense = flops.sparse(layers).forward, flops.dense(layers).forward
    step = formulas.dense_round(dense, 1)
    assert round(formulas.sparse_round(sparse, 1) / step, 4) == 0.0132
    assert round(formulas.prunefl_round(sparse, dense, 1) / step, 3) == 0.342
    # The step that is counted has the ratio of the formula, but for the first layer's input.
    counted = sum(formulas.step(layers, dense_gradient=lambda path: True))
    assert counted / sum(flops.dense(layers)) == pytest.approx(0.342, rel=5e-3)


@pytest.mark.usual("lenet5")
@pytest.mark.parametrize("name", ["lenet5", "cnn", "resnet20"])
def test_the_gradient_that_jax_makes_takes_what_is_counted(name):
    model, image = network(name, 16)
    params, state = jax.eval_shape(model.init, KEY)
    batch = batch_of(2, image)
    layers = flops.of_model(model, None, batch)

    def loss(params, state, batch):
        return model.loss(params, state, batch, KEY)[0]

    # Without padding the three directions of a product take exactly the same.
    passes = [(layer, 1 + (layer.dense.input_gradient > 0) + 1) for layer in layers]
    inside = sum(layer.inside * count for layer, count in passes)
    _, of_step = executed.executed(jax.grad(jaxprs.plain(loss)), params, state, batch)
    assert of_step == inside
    # Forms that are made for speed do no less.
    total, _ = executed.executed(jax.grad(loss), params, state, batch)
    assert total >= inside


@pytest.mark.usual("lenet5", "cnn")
@pytest.mark.parametrize("name", ["lenet5", "cnn", "resnet20"])
def test_xla_agrees_on_dense_graphs(name):
    model, image = network(name, 28 if name == "lenet5" else 16)
    params, state = jax.eval_shape(model.init, KEY)
    batch = batch_of(8, image)
    layers = flops.of_model(model, None, batch)

    def loss(params, state, batch):
        return model.loss(params, state, batch, KEY)[0]

    plain = jaxprs.plain(loss)
    inside = sum(layer.inside for layer in layers)
    assert executed.by_xla(plain, params, state, batch) == pytest.approx(2 * inside, rel=0.05)
    _, step = executed.executed(jax.grad(plain), params, state, batch)
    assert executed.by_xla(jax.grad(plain), params, state, batch) == pytest.approx(
        2 * step, rel=0.05
    )


@pytest.mark.parametrize("kept", [0, 1, 7, 24])
def test_a_masked_layer_costs_its_live_weights(kept):
    masked = {"w": mask(4, 6, kept=kept)}
    layers = flops.of_function(
        lambda p, x: x @ p["w"], {"w": shape(4, 6)}, shape(5, 4), masks=masked
    )
    assert flops.sparse(layers) == flops.Cost(5 * kept, 0, 5 * kept)
    assert flops.dense(layers) == flops.Cost(5 * 24, 0, 5 * 24)


KEPT = mask(4, 6, kept=9)


@jax.custom_vjp
def straight_through(w):
    return jnp.round(w)


straight_through.defvjp(lambda w: (jnp.round(w), ()), lambda _, g: (g,))

# A weight of 4 × 6 with 9 live entries on its way into a product, and how many stay live.
WAYS = {
    "as it is": (lambda w: w, 9),
    "transposed": (lambda w: w.T, 9),
    "reshaped": (lambda w: w.reshape(3, 8), 9),
    "cast": (lambda w: w.astype(jnp.bfloat16), 9),
    "scaled": (lambda w: 0.5 * w, 9),
    "flipped": (lambda w: w[::-1, ::-1], 9),
    "rolled": (lambda w: jnp.roll(w, 2, axis=1), 9),
    "padded": (lambda w: jnp.pad(w, ((1, 0), (2, 1))), 9),
    "padded with ones": (lambda w: jnp.pad(w, ((0, 1), (0, 0)), constant_values=1.0), 9 + 6),
    "sliced": (lambda w: w[:2], int(KEPT[:2].sum())),
    "strided": (lambda w: w[:, ::2], int(KEPT[:, ::2].sum())),
    "split": (lambda w: jnp.split(w, 3, axis=1)[1], int(KEPT[:, 2:4].sum())),
    "repeated": (lambda w: jnp.concatenate([w, w], axis=1), 18),
    "tiled": (lambda w: jnp.tile(w, (1, 3)), 27),
    "broadcast": (lambda w: jnp.broadcast_to(w[:, None], (4, 2, 6)).reshape(4, 12), 18),
    "beside zeros": (lambda w: jnp.concatenate([w, jnp.zeros((4, 2))], axis=1), 9),
    "relu": (lambda w: jax.nn.relu(w), 9),
    "jit": (jax.jit(lambda w: -w), 9),
    "checkpoint": (jax.checkpoint(lambda w: jnp.tanh(w)), 9),
    "clipped to what is not zero": (lambda w: jnp.maximum(w, 0.1), 24),
    "standardised": (lambda w: w - jnp.mean(w), 24),
    "plus itself, flipped": (lambda w: w + w[::-1], int((KEPT | KEPT[::-1]).sum())),
    "times itself, flipped": (lambda w: w * w[::-1], int((KEPT & KEPT[::-1]).sum())),
    "custom derivative": (lambda w: straight_through(w), 9),
    "a condition that keeps zeros": (
        lambda w: lax.cond(jnp.sum(w) > 0, lambda w: w, lambda w: -w, w),
        9,
    ),
}


@pytest.mark.parametrize("way", sorted(WAYS))
def test_a_mask_is_followed(way):
    function, kept = WAYS[way]

    def model(params, x):
        weight = function(params["w"])
        return jnp.broadcast_to(x, (5, weight.shape[0])).astype(weight.dtype) @ weight

    (layer,) = flops.of_function(model, {"w": shape(4, 6)}, shape(), masks={"w": KEPT})
    size = jax.eval_shape(function, shape(4, 6)).size
    assert (layer.path, layer.dense.forward, layer.sparse.forward) == ("w", size * 5, kept * 5)


def test_a_mask_of_shapes_alone_is_a_share():
    def model(params, x):
        return x @ jnp.pad(params["w"].reshape(8, 3), ((0, 0), (0, 1)))

    (layer,) = flops.of_function(
        model, {"w": shape(4, 6)}, shape(5, 8), masks={"w": Fraction(1, 3)}
    )
    assert layer.dense.forward == 5 * 32
    assert layer.sparse.forward == 5 * 8


def count_taps(image, kernel, options):
    """Count outputs times taps by running the convolution on ones: inside the image, and all."""
    numbers = lax.conv_dimension_numbers(image, kernel, IMAGE)
    ones = lax.conv_general_dilated(
        jnp.ones(image), jnp.ones(kernel), dimension_numbers=numbers, **options
    )
    return int(jnp.sum(ones)), ones.size * math.prod(kernel[:3])


CONVOLUTIONS = {
    "plain": ((1, 7, 6, 4), (3, 3, 4, 8), {"window_strides": (1, 1), "padding": "VALID"}),
    "padded": ((2, 7, 6, 4), (3, 2, 4, 8), {"window_strides": (1, 1), "padding": "SAME"}),
    "strided": ((1, 9, 6, 4), (3, 3, 4, 8), {"window_strides": (2, 3), "padding": "SAME"}),
    "grouped": (
        (1, 7, 6, 4),
        (3, 3, 1, 8),
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4},
    ),
    "batch groups": (
        (4, 7, 6, 4),
        (3, 3, 4, 8),
        {"window_strides": (1, 1), "padding": "SAME", "batch_group_count": 2},
    ),
    "dilated": (
        (1, 9, 9, 2),
        (3, 3, 2, 3),
        {"window_strides": (1, 1), "padding": ((2, 2), (0, 1)), "rhs_dilation": (2, 3)},
    ),
    "transposed": (
        (1, 4, 5, 2),
        (3, 3, 2, 3),
        {"window_strides": (1, 1), "padding": ((1, 2), (2, 1)), "lhs_dilation": (2, 2)},
    ),
    "cropped": (
        (1, 9, 9, 2),
        (3, 3, 2, 3),
        {"window_strides": (1, 1), "padding": ((-2, 0), (0, -1))},
    ),
}


@pytest.mark.parametrize("name", sorted(CONVOLUTIONS))
def test_convolutions_count_taps(name):
    image, kernel, options = CONVOLUTIONS[name]

    def model(params, x):
        return lax.conv_general_dilated(x, params["w"], dimension_numbers=IMAGE, **options)

    (layer,) = flops.of_function(model, {"w": shape(*kernel)}, shape(*image))
    inside, everything = count_taps(image, kernel, options)
    assert layer.inside == inside
    if "lhs_dilation" not in options:  # holes never count, padding does
        assert layer.dense.forward == everything
    _, of_gradient = executed.executed(
        jax.grad(lambda w, x: jnp.sum(model({"w": w}, x)), argnums=(0, 1)),
        shape(*kernel),
        shape(*image),
    )
    assert of_gradient == 2 * inside  # nobody needs the forward pass of a sum


def test_loops_count_by_their_trips():
    stacked = {"w": mask(3, 4, 4, kept=10)}

    def scanned(params, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    def indexed(params, x):
        return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ params["w"][i]), x)

    for model in (scanned, indexed):
        (layer,) = flops.of_function(model, {"w": shape(3, 4, 4)}, shape(2, 4), masks=stacked)
        # The first step's input needs no gradient, but all steps are one body.
        assert layer.dense == flops.Cost(96, 96, 96)
        assert layer.sparse == flops.Cost(20, 20, 20)

    def nested(params, x):
        def outer(h, _):
            return lax.fori_loop(0, 5, lambda i, h: h @ params["w"], h), h

        return lax.scan(outer, x, None, length=7)[0]

    (layer,) = flops.of_function(nested, {"w": shape(4, 4)}, shape(2, 4))
    assert layer.dense.forward == 7 * 5 * 32


def test_a_weight_that_a_loop_carries_is_followed():
    def model(params, x):
        def body(carry, _):
            weight, h = carry
            return (-weight, h @ weight), None

        return lax.scan(body, (params["w"], x), None, length=3)[0][1]

    (layer,) = flops.of_function(
        model, {"w": shape(4, 4)}, shape(2, 4), masks={"w": mask(4, 4, kept=5)}
    )
    assert (layer.path, layer.sparse.forward) == ("w", 3 * 2 * 5)


def test_a_loop_of_unknown_length_must_be_told():
    def model(params, x):
        return lax.while_loop(lambda h: jnp.sum(h) > 0, lambda h: h @ params["w"], x)

    with pytest.raises(ValueError, match="while_trips="):
        flops.of_function(model, {"w": shape(4, 4)}, shape(2, 4))
    (layer,) = flops.of_function(model, {"w": shape(4, 4)}, shape(2, 4), while_trips=3)
    assert layer.dense.forward == 3 * 32


def test_a_condition_costs_its_dearest_branch():
    def model(params, x):
        return lax.cond(x[0, 0] > 0, lambda: x @ params["a"] @ params["b"], lambda: x @ params["a"])

    weights = {"a": shape(4, 4), "b": shape(4, 4)}
    assert flops.dense(flops.of_function(model, weights, shape(2, 4))).forward == 64


def test_what_no_output_needs_is_not_counted():
    def model(params, x):
        aside = x @ params["b"]
        both = jax.jit(lambda x: (x @ params["a"], aside @ params["b"]))(x)
        return both[0]

    layers = flops.of_function(model, {"a": shape(4, 4), "b": shape(4, 4)}, shape(2, 4))
    assert [layer.path for layer in layers] == ["a"]


def test_gradients_flow_where_something_trained_lies():
    def model(params, x):
        h = lax.stop_gradient(x @ params["frozen"]) @ params["first"]
        return jnp.tanh(h) @ params["last"]

    weights = {name: shape(4, 4) for name in ("frozen", "first", "last")}
    layers = {layer.path: layer.dense for layer in flops.of_function(model, weights, shape(2, 4))}
    assert layers["first"] == flops.Cost(32, 0, 32)
    assert layers["last"] == flops.Cost(32, 32, 32)
    # A parameter behind a stop is a weight all the same: whether it trains is not told apart.
    assert layers["frozen"].forward == 32


def test_attention_counts_between_activations():
    def model(params, x):
        q, k, v = jnp.split(x @ params["qkv"], 3, axis=-1)
        return jax.nn.softmax(q @ k.T) @ v @ params["out"]

    weights = {"qkv": shape(8, 24), "out": shape(8, 8)}
    layers = flops.of_function(model, weights, shape(5, 8), masks={"qkv": mask(8, 24, kept=48)})
    by_path = {layer.path: layer for layer in layers}
    between = by_path[flops.BETWEEN]
    assert between.dense == between.sparse == flops.Cost(2 * 5 * 5 * 8, 4 * 5 * 5 * 8, 0)
    assert by_path["qkv"].sparse == flops.Cost(5 * 48, 0, 5 * 48)


def test_two_weights_multiply_and_share_a_layer():
    def model(params, x):
        return x @ (params["a"] @ params["b"])

    layers = flops.of_function(
        model,
        {"a": shape(6, 2), "b": shape(2, 6)},
        shape(5, 6),
        masks={"a": Fraction(1, 2), "b": Fraction(1, 3)},
    )
    by_path = {layer.path: layer for layer in layers}
    assert by_path["a x b"].dense == flops.Cost(72, 0, 144)
    assert by_path["a x b"].sparse == flops.Cost(12, 0, 24)
    assert by_path["a + b"].sparse.forward == by_path["a + b"].dense.forward  # dense by then


def test_a_linen_and_an_nnx_module_are_counted_without_help():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), name="conv")(x))
            x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x.reshape(1, -1, 8))
            return nn.Dense(3, name="head")(x.reshape(1, -1))

    model = adapters.from_linen(Net(), input_shape=(6, 6, 1))
    layers = {
        layer.path: layer.dense.forward for layer in flops.of_model(model, None, shape(1, 6, 6, 1))
    }
    assert layers["conv/kernel"] == 36 * 9 * 8
    assert layers["attention/query/kernel"] == layers["attention/out/kernel"] == 36 * 8 * 8
    assert layers[flops.BETWEEN] == 2 * 36 * 36 * 8
    assert layers["head/kernel"] == 36 * 8 * 3

    def make(rngs):
        return nnx.Sequential(nnx.Linear(4, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 2, rngs=rngs))

    layers = flops.of_model(adapters.from_nnx(make), None, shape(5, 4))
    assert [layer.dense.forward for layer in layers] == [5 * 24, 5 * 12]


def test_an_equinox_module_is_counted_without_help():
    eqx = pytest.importorskip("equinox")
    with jax.numpy_dtype_promotion("standard"):
        model = eqx.nn.MLP(4, 2, 8, 1, key=KEY)
        kept = jax.tree.map(
            lambda leaf: mask(*leaf.shape, kept=3),
            eqx.filter(model, lambda x: eqx.is_array(x) and x.ndim > 1),
        )
        layers = flops.of_function(
            lambda model, x: jax.vmap(model)(x), model, shape(5, 4), masks=kept
        )
    assert [layer.path for layer in layers] == ["layers/0/weight", "layers/1/weight"]
    assert [layer.dense.forward for layer in layers] == [5 * 32, 5 * 16]
    assert [layer.sparse.forward for layer in layers] == [15, 15]


def test_gates_are_measured_and_weigh_all_three_passes():
    inputs = np.array([[1, 0, 1, 0], [1, 1, 1, 1]])
    outputs = np.array([[0.5, 0.0], [0.3, 0.2]])
    share = float(np.mean((inputs != 0).mean(axis=1) * (outputs != 0).mean(axis=1)))

    def model(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    weights = {"a": shape(4, 4), "b": shape(4, 2)}
    layers = flops.of_function(
        model, weights, shape(2, 4), masks={"b": Fraction(1, 2)}, gates={"b": share}
    )
    assert layers[0].sparse == layers[0].dense
    assert layers[1].sparse == flops.Cost(5, 5, 5)  # 16 · 1/2 · 0.625
    with pytest.raises(ValueError, match=r"gates for c, but the layers are a, b"):
        flops.of_function(model, weights, shape(2, 4), gates={"c": 0.5})
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got 2"):
        flops.of_function(model, weights, shape(2, 4), gates={"a": 2})


@pytest.mark.slow
def test_gated_resnet32_has_the_block_ratio():
    model, image = network("resnet32")
    layers = flops.of_model(model, None, shape(1, *image))
    rho = 0.7
    gates = {
        layer.path: rho if "/conv_1/" in layer.path else rho * rho
        for layer in layers
        if "block" in layer.path
    }
    gated = flops.of_model(model, None, shape(1, *image), gates=gates)
    blocks = [layer for layer in gated if "block" in layer.path]
    ratio = flops.sparse(blocks).forward / flops.dense(blocks).forward
    # (rho + rho^2) / 2 where both convolutions cost the same; two of the blocks halve the image.
    assert ratio == pytest.approx(0.595, abs=0.005)


def test_masks_by_counts_are_masks():
    model, image = network("lenet5", 28)
    params, _ = jax.eval_shape(model.init, KEY)
    sizes = dict(zip(trees.paths(params), trees.sizes(params), strict=True))
    kept = {path: size // 3 if path.endswith("kernel") else size for path, size in sizes.items()}
    full = trees.map_with_path(lambda path, leaf: mask(*leaf.shape, kept=kept[path]), params)
    dense = flops.of_model(model, None, shape(1, *image))
    assert flops.reweigh(dense, kept, sizes) == flops.of_model(model, full, shape(1, *image))


def test_what_does_not_fit_is_refused():
    weights = {"w": shape(4, 6)}
    with pytest.raises(ValueError, match=r"masks for v, but the parameters are w"):
        flops.of_function(lambda p, x: x @ p["w"], weights, shape(2, 4), masks={"v": 0.5})
    with pytest.raises(ValueError, match=r"'w' must be bool \(4, 6\).*got float32 \(6, 4\)"):
        flops.of_function(
            lambda p, x: x @ p["w"], weights, shape(2, 4), masks={"w": jnp.ones((6, 4))}
        )
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got 1.5"):
        flops.of_function(lambda p, x: x @ p["w"], weights, shape(2, 4), masks={"w": 1.5})


def test_what_cannot_be_looked_into_is_refused_unless_it_says_what_it_is():
    def kernel(x_ref, w_ref, o_ref):
        o_ref[...] = x_ref[...] @ w_ref[...]

    def fast(x, w):
        call = pl.pallas_call(kernel, out_shape=shape(2, 6), interpret=True)
        return call(x, w)

    weights = {"w": shape(4, 6)}
    with pytest.raises(ValueError, match=r"pallas_call.*jaxprs.equivalent_to"):
        flops.of_function(lambda p, x: fast(x, p["w"]), weights, shape(2, 4))
    (layer,) = flops.of_function(
        lambda p, x: jaxprs.equivalent_to(fast(x, p["w"]), jnp.matmul, x, p["w"]),
        weights,
        shape(2, 4),
        masks={"w": KEPT},
    )
    assert layer.sparse.forward == 2 * 9


def test_formulas_are_the_papers():
    sparse, dense, steps = 3, 10, 5
    assert formulas.dense_round(dense, steps) == 150
    assert formulas.sparse_round(sparse, steps) == 45
    assert formulas.prunefl_round(sparse, dense, steps) == 80
    assert formulas.prunefl_round_of_fedrts(sparse, dense, steps) == 115
    assert formulas.adjusting_round(sparse, dense, steps) == 36 + 3 + 20
    assert formulas.fedmef_round(sparse, dense, 1, steps) == 48 + 4 + 20


def test_fedtinys_block_alone_pays_a_dense_gradient():
    model, image = network("resnet18", 8)
    params, _ = jax.eval_shape(model.init, KEY)
    kept = jax.tree.map(lambda leaf: Fraction(1, 10), params)
    layers = flops.of_model(model, kept, shape(1, *image))
    block = formulas.step(layers, dense_gradient=lambda path: path.startswith("stage_2"))
    usual = formulas.step(layers)
    extra = [x for x in layers if x.path.startswith("stage_2")]
    assert block[:2] == usual[:2]
    assert block.weight_gradient - usual.weight_gradient == sum(
        x.dense.weight_gradient - x.sparse.weight_gradient for x in extra
    )


def test_the_table_has_a_line_for_every_layer():
    model, image = network("lenet5", 28)
    text = flops.table(flops.of_model(model, None, shape(1, *image)))
    assert "| all | 416,520 | 298,920 | 416,520 | 1.0000 | 416,520 |" in text
    assert len(text.splitlines()) == 2 + 5 + 1
