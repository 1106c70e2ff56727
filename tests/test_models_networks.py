"""Networks are models: pure, of known size, indifferent to filling, and early to refuse."""

import functools

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import masks, models, trees
from fedjaxprune.models import adapters, gated, layers, resnet, vgg
from fedjaxprune.types import Batch
from tests import draws
from tests import test_models_field as field

KEY = jax.random.key(0)
SMALL = {
    "mlp": lambda: models.mlp(input_shape=(4, 4, 1), num_classes=3, hidden_sizes=(8,)),
    "lenet5": lambda: models.lenet5(input_shape=(13, 12, 2), num_classes=3),
    "cnn": lambda: models.cnn(input_shape=(8, 9, 1), num_classes=3),
    "resnet_batch": lambda: tiny_resnet("batch", "projection"),
    "resnet_group": lambda: tiny_resnet("group", "plain"),
    "resnet_bottleneck": lambda: tiny_resnet("batch", "bottleneck"),
    "vgg": lambda: tiny_vgg(),
    "two_cnn": lambda: models.two_cnn(input_shape=(6, 9, 1), num_classes=3, width=2),
    "pooled_cnn": lambda: models.pooled_cnn(
        input_shape=(4, 5, 3), num_classes=3, channels=(4, 8), hidden_size=6
    ),
    "gated_vgg": lambda: tiny_gated_vgg(),
    **{name: functools.partial(field.tiny, name) for name in field.TINY},
}
SHAPES = {
    "mlp": (4, 4, 1),
    "lenet5": (13, 12, 2),
    "cnn": (8, 9, 1),
    "resnet_batch": (5, 6, 2),
    "resnet_group": (5, 6, 2),
    "resnet_bottleneck": (9, 11, 2),
    "vgg": (4, 5, 2),
    "two_cnn": (6, 9, 1),
    "pooled_cnn": (4, 5, 3),
    "gated_vgg": (4, 5, 2),
    **{name: make()[1] for name, make in field.TINY.items()},
}
# One of each family; the others are slow.
USUAL = ("gated_vgg", "lenet5", "mlp", "resnet_batch", "vgg")
CASES = [
    pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in sorted(SMALL)
]
TINY_HEAD = vgg.Head(pool=2, hidden_sizes=(5,), num_classes=3, dropout=0.5)


def tiny_resnet(norm, block):
    stem = "imagenet" if block == "bottleneck" else "cifar"
    widths = (4,) if block == "bottleneck" else (4, 8)
    module = resnet.ResNet(
        widths=widths,
        depths=(1,) * len(widths),
        num_classes=3,
        norm=norm,
        block=block,
        stem=stem,
    )
    return adapters.from_linen(module, input_shape=(5, 6, 2))


def tiny_vgg():
    module = vgg.Vgg(plan=((4,), (8,)), head=TINY_HEAD, norm="none")
    return adapters.from_linen(module, input_shape=(4, 5, 2))


def tiny_gated_vgg():
    module = gated.GatedVgg(
        plan=((4,), (8,)),
        head=TINY_HEAD,
        norm="batch",
        density=0.5,
        choice="random",
        gate_scale=1.0,
    )
    return adapters.from_linen(module, input_shape=(4, 5, 2))


@functools.cache
def compiled(name):
    """Compile once for all laws: initial parameters and state, and the step of training."""
    model = SMALL[name]()
    params, state = jax.jit(model.init)(KEY)
    return params, state, jax.jit(jax.value_and_grad(model.loss, has_aux=True))


def batch_for(shape, size=4, filling=1):
    inputs = draws.normal(1, size, *shape)
    labels = jnp.arange(size, dtype=jnp.int32) % 3
    weights = (jnp.arange(size) < size - filling).astype(jnp.float32)
    return Batch(inputs=inputs, labels=labels, weights=weights)


def count(model, prunable=None):
    params, _ = jax.eval_shape(model.init, KEY)
    if prunable is None:
        return sum(trees.sizes(params))
    flags = masks.prunable_leaves(params, prunable)
    return sum(n for n, flag in zip(trees.sizes(params), flags, strict=True) if flag)


@pytest.mark.usual("mlp", "lenet5", "gated_vgg")
@pytest.mark.parametrize("name", CASES)
def test_loss_is_the_weighted_mean_and_metrics_agree(name):
    params, state, step = compiled(name)
    (loss, (_, report)), _ = step(params, state, batch_for(SHAPES[name]), KEY)
    assert report["loss"].weight == 3.0
    np.testing.assert_allclose(loss, report["loss"].total / report["loss"].weight, rtol=1e-6)
    assert 0.0 <= report["accuracy"].total <= 3.0


@pytest.mark.usual("mlp", "lenet5", "resnet_batch")
@pytest.mark.parametrize("name", CASES)
def test_filling_changes_neither_loss_nor_gradient_nor_state(name):
    params, state, step = compiled(name)
    batch = batch_for(SHAPES[name])
    other = batch._replace(inputs=batch.inputs.at[-1].set(7.0), labels=batch.labels.at[-1].set(0))
    first, second = step(params, state, batch, KEY), step(params, state, other, KEY)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_that_is_all_filling_has_zero_loss_and_gradient_and_leaves_the_state(name):
    params, state, step = compiled(name)
    batch = batch_for(SHAPES[name], filling=4)
    (loss, (after, _)), grads = step(params, state, batch, KEY)
    assert loss == 0.0
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(grads))
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usual("mlp", "resnet_batch")
@pytest.mark.parametrize("name", CASES)
def test_clients_under_vmap_are_clients_one_by_one(name):
    params, state, step = compiled(name)
    other = jax.tree.map(lambda leaf: leaf * 1.5, params)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), params, other)
    batch = batch_for(SHAPES[name])
    _, together = jax.jit(jax.vmap(step, (0, None, None, None)))(both, state, batch, KEY)
    _, alone = step(other, state, batch, KEY)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_predictions_are_logits_and_parameters_plain_dicts(name):
    params, state, _ = compiled(name)
    assert type(params) is dict
    assert type(state) is dict
    logits = jax.jit(SMALL[name]().predict)(params, state, batch_for(SHAPES[name]).inputs)
    assert logits.shape == (4, 3)


def test_lenet5_has_the_sizes_of_the_paper():
    model = models.lenet5(input_shape=(28, 28, 1), num_classes=10)
    assert count(model) == 61_706  # 156 + 2,416 + 48,120 + 10,164 + 850
    assert count(model, masks.is_kernel) == 61_470  # without 6 + 16 + 120 + 84 + 10 biases


def test_cnn_and_mlp_have_the_sizes_that_their_layers_add_up_to():
    cnn = models.cnn(input_shape=(28, 28, 1), num_classes=10)
    assert count(cnn) == 832 + 51_264 + (3_136 * 512 + 512) + 5_130
    mlp = models.mlp(input_shape=(28, 28), num_classes=10, hidden_sizes=(200, 100))
    assert count(mlp) == 784 * 200 + 200 + 200 * 100 + 100 + 1_010


def test_resnets_have_the_sizes_of_the_papers():
    wide = models.resnet18(input_shape=(32, 32, 3), num_classes=100, norm="batch")
    assert count(wide) == 11_220_132
    # Without biases, normalization and the three 1x1 shortcuts (8,192 + 32,768 + 131,072).
    assert (
        count(wide, lambda p, x: masks.is_kernel(p, x) and not p.endswith("shortcut/kernel"))
        == 11_038_400
    )
    small = models.resnet20(input_shape=(32, 32, 3), num_classes=10, norm="group")
    three = [2 * 9 * w * w * 3 - (9 * w * w // 2 if w > 16 else 0) for w in (16, 32, 64)]
    norms = 2 * (16 + 6 * (16 + 32 + 64))
    assert count(small) == 9 * 3 * 16 + sum(three) + norms + 650


def test_batch_statistics_move_by_a_tenth_and_only_in_training():
    model = SMALL["resnet_batch"]()
    params, state = jax.jit(model.init)(KEY)
    batch = batch_for(SHAPES["resnet_batch"])
    _, (after, _) = jax.jit(model.loss)(params, state, batch, KEY)
    outputs = jax.lax.conv_general_dilated(
        batch.inputs[:3],
        params["conv_1"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ).reshape(-1, 4)
    statistics = after["batch_stats"]["norm_1"]["batch"]
    np.testing.assert_allclose(
        statistics["mean"], 0.1 * jnp.mean(outputs, axis=0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        statistics["var"], 0.9 + 0.1 * jnp.var(outputs, axis=0, ddof=1), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.lenet5(input_shape=(8, 8, 1), num_classes=10), "at least 12x12.*got 8x8"),
        (
            lambda: models.lenet5(input_shape=(28, 28), num_classes=10),
            r"got examples of .*\(28, 28\)",
        ),
        (lambda: models.cnn(input_shape=(3, 8, 1), num_classes=10), "at least 4x4.*got 3x8"),
        (
            lambda: models.resnet20(input_shape=(3, 32, 32), num_classes=2, norm="group"),
            "at least 4x4.*got 3x32",
        ),
        (
            lambda: models.resnet18(input_shape=(32, 32, 3), num_classes=2, norm="layer"),  # pyright: ignore[reportArgumentType]
            "norm must be .*'layer'",
        ),
        (
            lambda: models.resnet34(
                input_shape=(32, 32, 3),
                num_classes=2,
                norm="batch",
                stem="7x7",  # pyright: ignore[reportArgumentType]
            ),
            "stem must be .*'7x7'",
        ),
        (
            lambda: vgg.vgg11(input_shape=(28, 28, 1), num_classes=10, norm="none"),
            "vgg11 takes .* at least 32x32.*got 28x28",
        ),
        (
            lambda: vgg.vgg16(
                input_shape=(32, 32, 3),
                num_classes=10,
                norm="layer",  # pyright: ignore[reportArgumentType]
            ),
            "norm must be .*'layer'",
        ),
        (
            lambda: vgg.vgg11(input_shape=(32, 32, 3), num_classes=10, norm="none", dropout=1.0),
            r"dropout must lie in \[0, 1\), got 1.0",
        ),
        (
            lambda: models.alexnet(input_shape=(14, 15, 3), num_classes=10),
            "at least 15x15.*got 14x15",
        ),
        (lambda: models.two_cnn(input_shape=(5, 9, 1), num_classes=10), "at least 6x6.*got 5x9"),
        (lambda: models.pooled_cnn(input_shape=(7, 9, 1), num_classes=10), "at least 8x8.*got 7x9"),
        (lambda: models.mlp(input_shape=(4,), num_classes=0), "num_classes must be .*got 0"),
        (lambda: models.mlp(input_shape=(4,), num_classes=2, hidden_sizes=(0,)), "hidden_sizes"),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_computed_once_is_passed_on_with_all_derivatives_of_its_gradient():
    x = jnp.array([-2.0, 0.5, 3.0])

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(layers.computed_once(x) ** 3))(x)

    np.testing.assert_array_equal(layers.computed_once(x), x)
    np.testing.assert_allclose(gradient(x), 3 * x**2)
    np.testing.assert_allclose(jax.jvp(gradient, (x,), (jnp.ones(3),))[1], 6 * x)
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(gradient(x)))(x), 6 * x)


def test_parameters_of_another_shape_are_refused_where_they_are_read():
    params, state = jax.eval_shape(SMALL["mlp"]().init, KEY)
    other = models.mlp(input_shape=(4, 4, 1), num_classes=3, hidden_sizes=(9,))
    with pytest.raises(
        flax.errors.ScopeParamShapeError, match=r"in \"dense_1\".*\(16, 9\).*\(16, 8\)"
    ):
        jax.eval_shape(other.predict, params, state, jnp.zeros((2, 4, 4, 1)))
