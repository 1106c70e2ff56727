"""A compacted network says what the masked one says, and what it could not lose it names."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from fedjaxprune import masks as masks_lib
from fedjaxprune import models, trees
from fedjaxprune.data import datasets, transforms
from fedjaxprune.models import adapters, gated, layers, vgg
from fedjaxprune.structure.channels import groups
from fedjaxprune.structure.compaction import arithmetic, compact, execute, program
from tests import draws, test_channels
from tests.test_channels import KEY, network

TOLERANCE = 1e-5  # of the largest output
QUICK = ("mlp", "pooled_cnn", "resnet_plain", "own", "gated_vgg")
# Where a filter of zeros can always go: statistics over channels, gates, loops keep theirs.
FREE = ("mlp", "lenet5", "cnn", "pooled_cnn", "two_cnn", "vgg", "vgg_batch", "resnet_plain",
        "resnet_projection", "resnet_bottleneck", "squashed", "nnx")  # fmt: skip
SLOW = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in sorted(test_channels.NETWORKS)
]


def drawn(name, seed, *, prunable):
    """Prune a random part of every group's channels, some of the readers, and single weights."""
    model, params, state, inputs, analysis = network(name)
    rng = np.random.default_rng(seed)
    keep = [rng.random(group.size) < rng.random() for group in analysis.groups]
    keep = [bits if bits.any() else np.arange(bits.size) == 0 for bits in keep]
    masks = channel_masks(analysis, keep, params, drop_inputs=bool(seed % 2))
    masks = jax.tree.map(lambda mask: mask & (rng.random(mask.shape) < 0.8), masks)
    return model, params, state, inputs, restrict(masks, prunable)


def channel_masks(analysis, keep, params, *, drop_inputs=False):
    """Make masks on the host, where nothing is compiled."""
    make = jax.jit(functools.partial(groups.to_masks, analysis.groups, drop_inputs=drop_inputs))
    return jax.device_get(make([jnp.asarray(bits) for bits in keep], params))


def restrict(masks, prunable):
    return trees.map_with_path(
        lambda path, mask: mask if prunable(path, mask) else np.ones_like(mask), masks
    )


def full(params):
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)


def apply(masks, params):
    return jax.tree.map(lambda mask, leaf: np.where(mask, leaf, np.float32(0)), masks, params)


def check_same(model, params, masks, state, small, inputs):
    expected = np.asarray(jax.jit(model.predict)(apply(masks, params), state, inputs))
    found = np.asarray(jax.jit(small.predict)(small.params, small.state, inputs))
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    largest = np.abs(expected).max()
    assert np.abs(found - expected).max() <= TOLERANCE * largest


@pytest.mark.usual("mlp-kernels", "own-kernels", "resnet_plain-all", "pooled_cnn-kernels")
@pytest.mark.parametrize(
    ("seed", "prunable"),
    [(0, masks_lib.is_kernel), (1, lambda path, leaf: True)],
    ids=["kernels", "all"],
)
@pytest.mark.parametrize("name", SLOW)
def test_a_compacted_network_says_what_the_masked_one_says(name, seed, prunable):
    model, params, state, inputs, masks = drawn(name, seed, prunable=prunable)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs)
    small = compact.compact(model, params, masks, state=state, inputs=shapes)
    check_same(model, params, masks, state, small, inputs)
    live = sum(int(leaf.sum()) for leaf in jax.tree.leaves(masks))
    assert sum(trees.sizes(small.params)) <= sum(trees.sizes(params))
    assert sum(int(np.sum(leaf)) for leaf in jax.tree.leaves(small.masks)) <= live
    changed = {change.path for change in small.changes}
    for path, old, new in zip(
        trees.paths(params), jax.tree.leaves(params), jax.tree.leaves(small.params), strict=True
    ):
        assert (path in changed) == (old.shape != new.shape)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
@pytest.mark.parametrize("name", sorted(test_channels.NETWORKS))
def test_whatever_the_masks_the_outputs_stay(name, seed):
    prunable = masks_lib.is_kernel if seed % 3 else lambda path, leaf: True
    model, params, state, inputs, masks = drawn(name, seed, prunable=prunable)
    small = compact.compact(model, params, masks, state=state, inputs=inputs)
    more = jnp.concatenate([inputs, inputs[::-1], inputs[:1]])
    if name != "functions":  # a branch on the sum over the batch; the same in both all the same
        more = more[:3]
    check_same(model, params, masks, state, small, more)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FREE],
)
def test_every_dead_channel_goes_where_nothing_holds_it(name):
    model, params, state, inputs, analysis = network(name)
    keep = [np.arange(group.size) % 3 != 1 for group in analysis.groups]
    masks = channel_masks(analysis, keep, params)
    masks = restrict(masks, masks_lib.is_kernel)  # biases and normalization live on
    small = compact.compact(model, params, masks, state=state, inputs=inputs)
    assert small.remainders == ()
    leaves = dict(zip(trees.paths(small.params), jax.tree.leaves(small.params), strict=True))
    whole = dict(zip(trees.paths(params), jax.tree.leaves(params), strict=True))
    gone: dict[tuple[str, int], int] = {}
    for group, bits in zip(analysis.groups, keep, strict=True):
        for member in group.members:
            lost = int(np.sum(~bits)) * member.indices.shape[1]
            gone[member.path, member.axis] = gone.get((member.path, member.axis), 0) + lost
    for (path, axis), lost in gone.items():
        assert leaves[path].shape[axis] == whole[path].shape[axis] - lost, path


def test_a_network_without_a_dead_channel_is_left_as_it_is():
    model, params, state, inputs, _ = network("pooled_cnn")
    rng = np.random.default_rng(0)
    masks = jax.tree.map(lambda leaf: rng.random(leaf.shape) < 0.1, params)
    masks = restrict(masks, masks_lib.is_kernel)
    for axis in (-1, -2):  # one live weight in and out of every channel
        masks = jax.tree.map(lambda m, axis=axis: _wake(m, axis) if m.ndim > 1 else m, masks)
    small = compact.compact(model, params, masks, state=state, inputs=inputs)
    assert small.changes == ()
    assert small.remainders == ()
    assert jax.tree.map(jnp.shape, small.params) == jax.tree.map(jnp.shape, params)
    np.testing.assert_array_equal(
        jax.jit(small.predict)(small.params, small.state, inputs),
        jax.jit(model.predict)(apply(masks, params), state, inputs),
    )


def _wake(mask, axis):
    others = tuple(i for i in range(mask.ndim) if i != mask.ndim + axis)
    dead = ~np.any(mask, axis=others, keepdims=True)
    first = np.zeros(mask.shape, bool)
    first[tuple(0 if i in others else slice(None) for i in range(mask.ndim))] = True
    return mask | (dead & first)


class Padded(nn.Module):
    """Two padded convolutions, so that a constant channel shows the border."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(layers.Conv(4, 3, bias="channel", name="conv_1")(x))
        x = layers.Conv(3, 3, 2, bias="none", name="conv_2")(x)
        return layers.Dense(2, name="dense_1")(x.reshape(x.shape[0], -1))


@functools.cache
def padded():
    model = adapters.from_linen(Padded(), input_shape=(7, 6, 2))
    params, state = jax.jit(model.init)(KEY)
    params["conv_1"]["bias"] = jnp.array([0.5, 0.25, -1.0, 2.0])
    return model, params, state, draws.normal(0, 2, 7, 6, 2)


def test_what_a_dead_channel_sends_is_less_at_a_padded_border():
    model, params, state, inputs = padded()
    masks = full(params)
    masks["conv_1"]["kernel"] = np.broadcast_to(np.arange(4) == 0, (3, 3, 2, 4))
    small = compact.compact(model, params, masks, state=state, inputs=inputs)
    assert small.params["conv_1"]["kernel"].shape == (3, 3, 2, 1)
    assert not small.is_constant
    check_same(model, params, masks, state, small, inputs)
    (constant,) = small.state[compact.CONSTANTS].values()
    # ReLU: 0.25, 0 and 2; at stride 2 the first row and column see fewer taps than the others.
    kernel = np.asarray(params["conv_2"]["kernel"])
    inside = np.einsum("ijco,c->o", kernel, [0, 0.25, 0, 2])
    corner = np.einsum("ijco,c->o", kernel[1:, 1:], [0, 0.25, 0, 2])
    np.testing.assert_allclose(constant[0, 1, -1], inside, rtol=1e-5, atol=1e-6)
    assert any(
        np.allclose(constant[0, i, j], corner, rtol=1e-5, atol=1e-6)
        for i in range(constant.shape[1])
        for j in range(constant.shape[2])
    )


def test_a_network_that_nothing_reaches_becomes_a_constant():
    model, params, state, inputs = padded()
    masks = full(params)
    masks["conv_1"]["kernel"] = np.zeros((3, 3, 2, 4), bool)
    small = compact.compact(model, params, masks, state=state, inputs=inputs)
    check_same(model, params, masks, state, small, inputs)
    assert small.is_constant
    assert small.remainders == ()
    assert sum(trees.sizes(small.params)) < sum(trees.sizes(params)) / 4


def test_channels_that_nobody_reads_are_not_made():
    model, params, state, inputs = padded()
    masks = full(params)
    unread = np.arange(4)[:, None] % 2 == 0
    masks["conv_2"]["kernel"] = np.broadcast_to(unread, (3, 3, 4, 3))
    small = compact.compact(model, params, masks, state=state, inputs=inputs)
    assert small.params["conv_1"]["kernel"].shape == (3, 3, 2, 2)
    assert small.params["conv_1"]["bias"].shape == (2,)
    assert small.state[compact.CONSTANTS] == {}
    check_same(model, params, masks, state, small, inputs)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in ("mlp", "own") else pytest.mark.slow)
     for n in sorted(test_channels.NETWORKS)],
)  # fmt: skip
def test_any_number_of_examples_will_do_and_one_program_serves_them_all(name):
    model, params, state, inputs, masks = drawn(name, 0, prunable=masks_lib.is_kernel)
    small = compact.compact(model, params, masks, state=state, inputs=inputs)
    (batch,) = export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *inputs.shape[1:]), inputs.dtype)
    run = export.export(jax.jit(lambda x: small.predict(small.params, small.state, x)))(shape)
    for count in (1, 5):
        some = np.concatenate([inputs, inputs[::-1], inputs])[:count]
        check_same(model, params, masks, state, small, some)
        expected = np.asarray(jax.jit(model.predict)(apply(masks, params), state, some))
        bound = TOLERANCE * np.abs(expected).max()
        assert np.abs(np.asarray(run.call(some)) - expected).max() <= bound


def test_what_has_to_stay_is_named_with_the_reason():
    def reasons(name, keep_bias):
        model, params, state, inputs, analysis = network(name)
        keep = [np.arange(group.size) % 2 == 1 for group in analysis.groups]
        masks = channel_masks(analysis, keep, params)
        if keep_bias:
            masks = restrict(masks, masks_lib.is_kernel)
        small = compact.compact(model, params, masks, state=state, inputs=inputs)
        return {each.path: each for each in small.remainders}

    grouped = reasons("resnet_group", False)
    assert "reduce_sum mixes channels" in grouped["conv_1/kernel"].why
    assert grouped["conv_1/kernel"].indices == (0, 2)
    sorted_ = reasons("attentive", True)
    assert sorted_["Dense_2/kernel"].why.startswith("sort is left as it is")
    looped = reasons("char_lstm", True)
    assert "scan is left as it is" in looped["lstm_1/recurrent/kernel"].why


def test_a_filter_whose_channel_lives_elsewhere_stays():
    model, params, state, inputs, _ = network("resnet_plain")
    masks = full(params)
    block = masks["stage_1_block_1"]["conv_2"]
    block["kernel"][..., 1] = False
    small = compact.compact(model, params, masks, state=state, inputs=inputs)
    (left,) = small.remainders
    assert (left.path, left.indices) == ("stage_1_block_1/conv_2/kernel", (1,))
    assert "its channel lives in another layer" in left.why
    assert left.others[0] == "conv_1/kernel"
    assert small.changes == ()


def test_bad_input_is_refused():
    model, params, state, inputs, _ = network("mlp")
    masks = full(params)
    wrong = {**masks, "dense_1": {**masks["dense_1"], "bias": np.ones(3, bool)}}
    with pytest.raises(ValueError, match="masks do not have the structure"):
        compact.compact(model, params, wrong, state=state, inputs=inputs)
    crowd = model._replace(
        predict=lambda params, state, x: model.predict(params, state, x) / x.shape[0]
    )
    with pytest.raises(ValueError, match="something else for 3 examples than for 2"):
        compact.compact(crowd, params, masks, state=state, inputs=inputs)


def test_sums_on_the_host_are_those_of_jax():
    rng = np.random.default_rng(0)
    for strides, pads, spread, stretch in (
        ((1, 1), ((1, 1), (0, 2)), (1, 1), (1, 1)),
        ((2, 3), ((2, 0), (-1, 1)), (2, 1), (1, 1)),
        ((1, 2), ((1, 1), (1, 0)), (1, 2), (2, 3)),
    ):
        x, kernel = rng.normal(size=(2, 7, 8, 3)), rng.normal(size=(3, 2, 3, 4))
        x, kernel = x.astype(np.float32), kernel.astype(np.float32)

        def convolve(x, kernel, strides=strides, pads=pads, spread=spread, stretch=stretch):
            return jax.lax.conv_general_dilated(
                x, kernel, strides, pads, stretch, spread, ("NHWC", "HWIO", "NHWC")
            )

        (equation,) = jax.make_jaxpr(convolve)(x, kernel).eqns
        found = arithmetic.conv(x, kernel, equation.params)
        np.testing.assert_allclose(found, convolve(x, kernel), rtol=1e-4, atol=1e-5)
    first, second = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(5, 2, 4, 6))
    numbers = (((2, 3), (2, 0)), ((0,), (1,)))
    np.testing.assert_allclose(
        arithmetic.dot(first, second, numbers),
        jax.lax.dot_general(first.astype(np.float32), second.astype(np.float32), numbers),
        rtol=1e-4,
        atol=1e-5,
    )


def test_constants_are_stored_without_repetitions():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1, 3, 3, 4))
    values = rows[:, [0, 1, 1, 1, 1, 2]][:, :, [0, 1, 1, 1, 1, 1, 2]]
    folded = execute.fold(np.concatenate([values, values]), [True, False, False, False])
    assert folded.values.shape == (1, 3, 3, 4)
    np.testing.assert_array_equal(
        execute.unfold(jnp.asarray(folded.values), folded.places), values.astype(np.float32)
    )


def test_a_program_knows_which_sizes_are_the_batch():
    def predict(params, state, x):
        return jnp.tile(x @ params["w"], (2, 1)).reshape(-1, 2)

    shapes = {"w": jax.ShapeDtypeStruct((3, 4), jnp.float32)}
    written = program.trace(predict, shapes, {}, jax.ShapeDtypeStruct((7, 3), jnp.float32))
    (output,) = written.outputs
    assert written.shapes[output] == (program.Linear(scale=4, offset=0), 2)
    assert program.at(written.shapes[output], 5) == (20, 2)


REAL = {
    "lenet5": ("fashion_mnist", lambda **sizes: models.lenet5(**sizes)),
    "cnn": ("fashion_mnist", lambda **sizes: models.cnn(**sizes)),
    "two_cnn": ("fashion_mnist", lambda **sizes: models.two_cnn(**sizes)),
    "mlp": ("fashion_mnist", lambda **sizes: models.mlp(**sizes)),
    "pooled_cnn": ("cifar10", lambda **sizes: models.pooled_cnn(**sizes)),
    "alexnet": ("cifar10", lambda **sizes: models.alexnet(**sizes)),
    "vgg11": ("cifar10", lambda **sizes: vgg.vgg11(norm="none", **sizes)),
    "vgg16_bn": ("cifar10", lambda **sizes: vgg.vgg16(norm="batch", **sizes)),
    "resnet18": ("cifar10", lambda **sizes: models.resnet18(norm="batch", **sizes)),
    "resnet20": ("cifar10", lambda **sizes: models.resnet20(norm="batch", **sizes)),
    "resnet8_group": ("cifar10", lambda **sizes: models.resnet8(norm="group", **sizes)),
    "resnet50": ("cifar10", lambda **sizes: models.resnet50(norm="batch", **sizes)),
    "gated_resnet32": (
        "cifar10",
        lambda **sizes: gated.gated_resnet32(norm="batch", density=0.5, **sizes),
    ),
}


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("name", sorted(REAL))
def test_on_real_test_images_half_the_channels_say_the_same(name, tfds_data_dir):
    dataset_name, make = REAL[name]
    data = real_data(dataset_name, tfds_data_dir)
    model = make(input_shape=data.input_shape, num_classes=10)
    _, prepare = transforms.for_dataset(data, augment=False)
    images = prepare(KEY, jnp.asarray(data.test["inputs"][:32]))
    params, state = jax.jit(model.init)(KEY)
    rng = np.random.default_rng(0)

    def awake(leaf):  # biases, scales and statistics as after training: nothing is 0 or 1
        leaf = np.asarray(leaf)
        return (
            leaf + np.float32(0.1) * rng.random(leaf.shape, np.float32) if leaf.ndim == 1 else leaf
        )

    params, state = jax.tree.map(awake, (params, state))
    analysis = groups.analyze(model.predict, params, state, images)
    keep = []
    for group in analysis.groups:
        bits = np.ones(group.size, bool)
        bits[rng.permutation(group.size)[: group.size // 2]] = False
        keep.append(bits)
    masks = restrict(channel_masks(analysis, keep, params), masks_lib.is_kernel)
    small = compact.compact(model, params, masks, state=state, inputs=images)
    check_same(model, params, masks, state, small, images)
    if name not in ("resnet8_group", "gated_resnet32"):
        assert small.remainders == ()
        assert sum(trees.sizes(small.params)) < sum(trees.sizes(params)) / 1.9


@functools.cache
def real_data(name, folder):
    return datasets.load(name, data_dir=folder)
