"""Gates keep exactly what they are told to, say what they kept, and can be steered."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import metrics, trees
from fedjaxprune.kernels import pooling
from fedjaxprune.models import adapters, gated, gated_layers, gates, layers, vgg
from fedjaxprune.types import Batch
from tests import draws

KEY = jax.random.key(0)
SHAPE = (4, 4, 3)
WIDTHS = (6, 10)  # of two gated layers
SIZE = 32  # examples of a batch


@functools.cache
def compiled(choice):
    """Make one network and its step for all laws; the density is an argument of the step."""
    head = vgg.Head(pool=1, hidden_sizes=(), num_classes=3, dropout=0.0)
    module = gated.GatedVgg(
        plan=(WIDTHS[:1], WIDTHS[1:]),
        head=head,
        norm="batch",
        density=0.5,
        choice=choice,
        gate_scale=1.0,
    )
    model = adapters.from_linen(module, input_shape=SHAPE)
    params, state = jax.jit(model.init)(KEY)
    step = jax.jit(jax.value_and_grad(model.loss, has_aux=True))
    return params, state, step, jax.jit(model.predict)


def init(module, *arguments) -> Any:
    return jax.jit(lambda: module.init(KEY, *arguments)["params"])()


def apply(module, params, *arguments) -> Any:
    return jax.jit(lambda params: module.apply({"params": params}, *arguments))(params)


def batch_of(weights):
    return Batch(
        inputs=draws.normal(0, SIZE, *SHAPE),
        labels=jnp.arange(SIZE, dtype=jnp.int32) % 3,
        weights=jnp.asarray(weights, jnp.float32),
    )


def steer(params, biases):
    """Make a gate look at nothing but its bias."""

    def leaf_of(path, leaf):
        if path.endswith("gate_kernel"):
            return jnp.zeros_like(leaf)
        return biases(leaf.size) if path.endswith("gate_bias") else leaf

    return trees.map_with_path(leaf_of, params)


@pytest.mark.usual("0.01-counts1-salient", "0.5-counts0-random")
@pytest.mark.parametrize("choice", ["salient", "random"])
@pytest.mark.parametrize(("density", "counts"), [(0.5, (3, 5)), (0.01, (1, 1)), (1.0, WIDTHS)])
def test_exactly_the_asked_number_of_channels_is_kept_for_every_example(choice, density, counts):
    params, state, step, _ = compiled(choice)
    state = gates.with_density(state, jnp.float32(density))
    for example in range(4):  # the others are filling, so that the metric is the example's own mask
        batch = batch_of(np.arange(SIZE) == example)
        (_, (_, report)), _ = step(params, state, batch, KEY)
        kept = gates.kept(report)
        assert list(kept) == ["conv_1", "conv_2"]
        for value, count in zip(kept.values(), counts, strict=True):
            assert set(np.unique(value.total)) <= {0.0, 1.0}
            assert jnp.sum(value.total) == count
            assert value.weight == 1.0


@pytest.mark.slow
def test_the_most_salient_channels_are_kept_and_the_others_are_zero():
    module = gated_layers.GatedConv(features=4, norm="group")
    x = draws.normal(0, 2, 3, 3, 2)
    params = init(module, x, jnp.float32(0.5), False, None)
    params = {**params, "gate_kernel": jnp.zeros((2, 4)), "gate_bias": jnp.array([1.0, -1, 3, 2])}
    outputs = apply(module, params, x, jnp.float32(0.5), False, None)
    alive = jnp.any(outputs != 0, axis=(0, 1, 2))
    np.testing.assert_array_equal(alive, [False, False, True, True])
    # All open: the saliency, after ReLU, scales the normalized channels.
    full = apply(module, params, x, jnp.float32(1.0), False, None)
    plain = apply(layers.Conv(4), params["conv"], x)
    plain = apply(layers.GroupNorm(num_groups=1), params["norm"]["group"], plain)
    scale = jnp.array([1.0, 0.0, 3.0, 2.0])[None, None, None]
    np.testing.assert_allclose(full, plain * scale, rtol=1e-5, atol=1e-6)


class SqueezeExcitation(nn.Module):
    """The gated layer's formula without a choice, for comparison."""

    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("gate_kernel", nn.initializers.zeros, (x.shape[-1], self.features))
        bias = self.param("gate_bias", nn.initializers.zeros, (self.features,))
        saliency = nn.relu(pooling.global_average_pool(x) @ kernel + bias[None])
        y = layers.Conv(self.features, name="conv")(x)
        y = layers.GroupNorm(num_groups=1, name="norm")(y)
        return y * saliency[:, None, None]


def test_a_density_of_one_is_squeeze_and_excitation_gradients_included():
    x = draws.normal(0, 3, 4, 4, 2)
    module = gated_layers.GatedConv(features=5, norm="group")
    params = init(module, x, jnp.float32(1.0), False, None)
    plain = {**params, "norm": params["norm"]["group"]}

    def gated_loss(params):
        return jnp.sum(jnp.sin(apply(module, params, x, jnp.float32(1.0), True, None)))

    def plain_loss(params):
        return jnp.sum(jnp.sin(apply(SqueezeExcitation(5), params, x)))

    value, grads = jax.jit(jax.value_and_grad(gated_loss))(params)
    expected, expected_grads = jax.jit(jax.value_and_grad(plain_loss))(plain)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    grads = {**grads, "norm": grads["norm"]["group"]}
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_what_the_whole_batch_dropped_has_a_gradient_of_exactly_zero():
    params, state, step, _ = compiled("salient")
    params = steer(params, lambda size: jnp.arange(1, size + 1, dtype=jnp.float32))
    (_, (_, report)), grads = step(params, state, batch_of(np.ones(SIZE)), KEY)
    leaves = dict(zip(trees.paths(grads), jax.tree.leaves(grads), strict=True))
    for (layer, value), width in zip(gates.kept(report).items(), WIDTHS, strict=True):
        dropped = value.total == 0
        np.testing.assert_array_equal(dropped, np.arange(width) < width // 2)
        own = {path: leaf for path, leaf in leaves.items() if path.startswith(f"{layer}/")}
        assert len(own) == 5  # kernel, scale and bias, gate's kernel and bias
        for path, leaf in own.items():
            assert not jnp.any(leaf[..., dropped]), path
            assert jnp.any(leaf[..., ~dropped]), path


def test_filling_is_not_counted_among_those_who_kept_a_channel():
    params, state, step, _ = compiled("salient")
    (_, (_, report)), _ = step(params, state, batch_of(np.arange(SIZE) < 3), KEY)
    for value, width in zip(gates.kept(report).values(), WIDTHS, strict=True):
        assert value.weight == 3.0
        assert jnp.sum(value.total) == 3.0 * (width // 2)
    merged = metrics.merge(report, report)
    assert all(value.weight == 6.0 for value in gates.kept(merged).values())


def test_the_density_is_state_that_training_leaves_alone_and_a_method_may_set():
    params, state, step, predict = compiled("salient")
    assert gates.has_gates(state)
    assert gates.density(state) == 0.5
    batch = batch_of(np.ones(SIZE))
    opened = gates.with_density(state, jnp.float32(1.0))
    assert jax.tree.map(jnp.shape, opened) == jax.tree.map(jnp.shape, state)
    for begin, density, num_kept in ((state, 0.5, SIZE / 2), (opened, 1.0, SIZE)):
        (_, (after, report)), _ = step(params, begin, batch, KEY)
        assert gates.density(after) == density
        for value in gates.kept(report).values():
            assert jnp.mean(value.total) == num_kept
    first, second = (predict(params, each, batch.inputs) for each in (state, opened))
    assert jnp.any(first != second)


def test_networks_without_gates_say_so():
    assert not gates.has_gates({})
    assert gates.kept({"loss": metrics.zero()}) == {}
    with pytest.raises(ValueError, match="the network has no gates"):
        gates.density({"batch_stats": {}})
    with pytest.raises(ValueError, match="the network has no gates"):
        gates.with_density({}, jnp.float32(0.5))


@pytest.mark.parametrize("choice", ["salient", "random"])
def test_a_prediction_does_not_depend_on_its_neighbours(choice):
    params, state, _, predict = compiled(choice)
    inputs = batch_of(np.ones(SIZE)).inputs
    together = predict(params, state, inputs)
    turned = predict(params, state, inputs[::-1])
    np.testing.assert_allclose(turned[::-1], together, rtol=1e-5, atol=1e-6)


def test_the_random_choice_is_another_for_every_example_and_step():
    params, state, step, _ = compiled("random")
    batch = batch_of(np.ones(SIZE))
    first, second = (
        gates.kept(step(params, state, batch, jax.random.fold_in(KEY, i))[0][1][1])
        for i in range(2)
    )
    for path, value in first.items():  # a fair coin for each channel: 32 throws, 5 deviations
        assert jnp.all(jnp.abs(value.total - 16.0) < 14.2)
        assert jnp.any(value.total != second[path].total)


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_an_impossible_density_is_refused(density):
    with pytest.raises(ValueError, match="density must lie in"):
        gated.gated_resnet32(input_shape=(8, 8, 1), num_classes=2, norm="batch", density=density)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match=r"choice must be .*'best'"):
        gated.gated_vgg16(
            input_shape=(32, 32, 1),
            num_classes=2,
            norm="batch",
            density=0.5,
            choice="best",  # pyright: ignore[reportArgumentType]
        )


@pytest.mark.slow
def test_a_gated_resnet_starts_where_it_can_learn():
    model = gated.gated_resnet32(input_shape=SHAPE, num_classes=3, norm="batch", density=0.7)
    params, state = jax.jit(model.init)(KEY)
    loss, _ = jax.jit(model.loss)(params, state, batch_of(np.ones(SIZE)), KEY)
    assert loss < 10.0  # log 3 and what a network of random weights adds


def test_an_impossible_scale_is_refused():
    with pytest.raises(ValueError, match="gate_scale must be positive and finite, got 0"):
        gated.gated_resnet32(
            input_shape=SHAPE, num_classes=3, norm="batch", density=0.7, gate_scale=0.0
        )


@pytest.mark.slow
def test_gated_networks_gate_what_the_paper_gates():
    sizes = {"input_shape": (32, 32, 3), "num_classes": 10}
    residual = gated.gated_resnet32(norm="batch", density=0.7, **sizes)
    chain = gated.gated_vgg16(norm="batch", density=0.7, **sizes)
    blocks = [f"stage_{i}_block_{j}" for i in (1, 2, 3) for j in range(1, 6)]
    inputs = jnp.zeros((2, 32, 32, 3))
    batch = Batch(inputs=inputs, labels=jnp.zeros(2, jnp.int32), weights=jnp.ones(2))
    for model, expected in (
        (residual, {f"{block}/conv_{k}" for block in blocks for k in (1, 2)}),
        (chain, {f"conv_{i}" for i in range(1, 14)}),
    ):
        params, state = jax.eval_shape(model.init, KEY)
        _, (_, report) = jax.eval_shape(model.loss, params, state, batch, KEY)
        assert set(gates.kept(report)) == expected


def convolved(x, kernel, stride):
    """Convolve ``[B, H, W, C]`` with ``[3, 3, C, F]`` by hand, under a border of one zero."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = (1 + (size - 1) // stride for size in x.shape[1:3])
    out = np.zeros((x.shape[0], height, width, kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            patch = padded[:, stride * i : stride * i + 3, stride * j : stride * j + 3]
            out[:, i, j] = np.tensordot(patch, kernel, 3)
    return out


def group_normalized(x, scale, bias, num_groups):
    grouped = x.reshape(*x.shape[:3], num_groups, -1)
    mean = grouped.mean(axis=(1, 2, 4), keepdims=True)
    deviation = np.sqrt(grouped.var(axis=(1, 2, 4), keepdims=True) + 1e-5)
    return ((grouped - mean) / deviation).reshape(x.shape) * scale + bias


def gated_by_hand(x, params, num_kept, stride):
    """Compute norm(conv(x)) times the saliency on the channels that an example keeps."""
    saliency = np.maximum(x.mean(axis=(1, 2)) @ params["gate_kernel"] + params["gate_bias"], 0.0)
    factor = np.zeros_like(saliency)
    for example, row in enumerate(saliency):
        kept = np.argsort(-row, kind="stable")[:num_kept]
        factor[example, kept] = row[kept]
    norm = params["norm"]["group"]
    y = convolved(x, params["conv"]["kernel"], stride)
    return group_normalized(y, norm["scale"], norm["bias"], 2) * factor[:, None, None]


@pytest.mark.usual("2-4")
@pytest.mark.parametrize(("stride", "channels"), [(1, 8), (2, 4)])
def test_a_block_is_two_gated_convolutions_and_the_shortcut_before_the_last_relu(stride, channels):
    block = gated.GatedBlock(8, stride, "group", "salient", 1.0)
    density = jnp.float32(0.6)  # of eight channels five
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4, 4, channels)).astype(np.float32)  # of either sign, as sums are not
    drawn = jax.eval_shape(lambda x: init(block, x, density, False, None), x)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), drawn)
    y = np.maximum(gated_by_hand(x, params["conv_1"], 5, stride), 0.0)
    missing = 8 - channels
    shortcut = np.pad(
        x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (missing // 2, missing // 2))
    )
    wanted = np.maximum(gated_by_hand(y, params["conv_2"], 5, 1) + shortcut, 0.0)
    outputs = apply(block, params, jnp.asarray(x), density, False, None)
    np.testing.assert_allclose(outputs, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("biases", "alive"), [([1.0] * 4, [1, 1, 0, 0]), ([1.0, 2.0, 1.0, 1.0], [1, 1, 0, 0])]
)
def test_of_equally_salient_channels_the_former_stay(biases, alive):
    module = gated_layers.GatedConv(features=4, norm="group")
    x = draws.normal(0, 2, 3, 3, 2)
    params = init(module, x, jnp.float32(0.5), False, None)
    params = {**params, "gate_kernel": jnp.zeros((2, 4)), "gate_bias": jnp.array(biases)}
    outputs = apply(module, params, x, jnp.float32(0.5), False, None)
    np.testing.assert_array_equal(jnp.any(outputs != 0, axis=(0, 1, 2)), np.array(alive, bool))
