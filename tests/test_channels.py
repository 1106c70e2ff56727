"""Channels are found in networks of any make, and what is said of them holds in numbers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjaxprune import models, trees
from fedjaxprune.models import adapters, convolutional, gated, lstm, resnet, vgg
from fedjaxprune.structure.channels import groups
from tests import draws
from tests import test_models_field as field

KEY = jax.random.key(0)
HEAD = vgg.Head(pool=2, hidden_sizes=(5,), num_classes=3, dropout=0.5)


class Own(nn.Module):
    """A user's network: concatenation, depthwise convolution, pooling, LayerNorm, GELU."""

    @nn.compact
    def __call__(self, x, train):
        left = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)))
        right = nn.leaky_relu(nn.Conv(6, (1, 1))(x))
        x = jnp.concatenate([left, right], axis=-1)
        x = nn.gelu(nn.Conv(10, (3, 3), feature_group_count=10)(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x + nn.swish(nn.Conv(10, (3, 3), strides=1)(x))
        x = nn.max_pool(x, (2, 2), (1, 1))
        x = nn.relu(nn.LayerNorm()(nn.Dense(7)(x.reshape(x.shape[0], -1))))
        return nn.Dense(3)(x)


class Squashed(nn.Module):
    """A network whose pruned units still speak: sigmoid(0) is a half."""

    @nn.compact
    def __call__(self, x):
        x = nn.sigmoid(nn.Dense(6)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3)(nn.tanh(nn.Dense(5)(x)))


class Attentive(nn.Module):
    """A network with something that is not understood: channels in order of size."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x.reshape(x.shape[0], -1))
        return nn.Dense(3)(jnp.sort(nn.relu(nn.Dense(5)(x)), axis=-1))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.last = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.mean(nnx.relu(self.norm(self.conv(x))), axis=(1, 2)))


def init_plain(key):
    shapes = {"embed": (3, 8), "query": (8, 4), "key": (8, 4), "value": (8, 6), "last": (6, 3)}
    return {name: jnp.ones(shape) for name, shape in shapes.items()}


def apply_plain(params, x):
    """Attend to pixels; with a branch, bounds and a loop over rows."""
    is_bright = jnp.sum(x) > 0
    x = jnp.clip(x.reshape(x.shape[0], -1, 3) @ params["embed"], 0.0, 6.0)
    x = jax.lax.cond(is_bright, jnp.tanh, lambda x: x * 2.0, x)
    query, key = x @ params["query"], x @ params["key"]
    weights = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", query, key), axis=-1)
    value = jnp.einsum("bqk,bkc->bqc", weights, x @ params["value"])
    steps = jnp.swapaxes(value, 0, 1)
    total, _ = jax.lax.scan(lambda sum, row: (sum + row, None), jnp.zeros_like(steps[0]), steps)
    return total @ params["last"]


def linen(module, shape=(6, 7, 3)):
    return adapters.from_linen(module, input_shape=shape), shape


def tiny_resnet(norm, block, stem: resnet.Stem = "cifar"):
    widths = (4, 8, 16)
    return linen(
        resnet.ResNet(
            widths=widths, depths=(1, 2, 1), num_classes=3, norm=norm, block=block, stem=stem
        )
    )


NETWORKS = {
    "mlp": lambda: (models.mlp(input_shape=(9,), num_classes=3, hidden_sizes=(8, 6)), (9,)),
    "lenet5": lambda: (models.lenet5(input_shape=(16, 18, 1), num_classes=3), (16, 18, 1)),
    "cnn": lambda: (models.cnn(input_shape=(5, 6, 1), num_classes=3), (5, 6, 1)),
    "pooled_cnn": lambda: linen(convolutional.SmallCnn(3, (4, 6), (1, 1), (5,), 3)),
    "two_cnn": lambda: linen(convolutional.TwoCnn(2, 5, 3, 0.0)),
    "vgg": lambda: linen(vgg.Vgg(plan=((4,), (4, 8)), head=HEAD, norm="none")),
    "vgg_batch": lambda: linen(vgg.Vgg(plan=((4,), (4, 8)), head=HEAD, norm="batch")),
    "resnet_plain": lambda: tiny_resnet("batch", "plain"),
    "resnet_group": lambda: tiny_resnet("group", "plain"),
    "resnet_projection": lambda: tiny_resnet("batch", "projection"),
    "resnet_bottleneck": lambda: tiny_resnet("batch", "bottleneck", stem="imagenet"),
    "gated_resnet": lambda: linen(
        gated.GatedResNet(
            widths=(4, 8),
            depth=1,
            num_classes=3,
            norm="batch",
            density=0.5,
            choice="salient",
            gate_scale=1.0,
        )
    ),
    "gated_vgg": lambda: linen(
        gated.GatedVgg(
            plan=((4,), (6,)),
            head=HEAD,
            norm="batch",
            density=0.5,
            choice="salient",
            gate_scale=1.0,
        )
    ),
    "char_lstm": lambda: (
        lstm.char_lstm(
            input_shape=(4,), num_classes=5, embedding_size=3, hidden_sizes=(4, 6), labels="every"
        ),
        (4,),
    ),
    **{name: (lambda make=make: linen(*make())) for name, make in field.TINY.items()},
    "own": lambda: linen(Own()),
    "squashed": lambda: linen(Squashed()),
    "attentive": lambda: linen(Attentive()),
    "functions": lambda: (adapters.from_functions(init_plain, apply_plain), (6, 7, 3)),
    "nnx": lambda: (adapters.from_nnx(lambda rngs: Nnx(rngs)), (6, 7, 3)),
}

# One of each way to read channels; the others are slow.
USUAL = ("attentive", "char_lstm", "functions", "mlp", "resnet_projection", "vgg")
CASES = [
    pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in sorted(NETWORKS)
]


@functools.cache
def network(name):
    """Make a network with parameters and statistics that nothing is zero in, and analyze it."""
    model, shape = NETWORKS[name]()
    if name == "char_lstm":
        inputs = jax.random.randint(KEY, (2, *shape), 0, 5)
    else:
        inputs = draws.normal(0, 2, *shape)
    params, state = jax.eval_shape(model.init, KEY)
    rng = np.random.default_rng(0)

    def draw(leaf):
        return rng.uniform(0.2, 0.9, leaf.shape).astype(leaf.dtype)

    def draw_signed(leaf):
        return draw(leaf) * rng.choice([-1.0, 1.0], leaf.shape).astype(leaf.dtype)

    params, state = jax.tree.map(draw_signed, params), jax.tree.map(draw, state)
    analysis = groups.analyze(model.predict, params, state, inputs)
    return model, params, state, inputs, analysis


def halves(analysis, *, spare):
    """Prune the even channels of every group that has none of the notes in `spare`."""
    return [
        np.arange(group.size) % 2 == 1 if not getattr(group, spare) else np.ones(group.size, bool)
        for group in analysis.groups
    ]


def perturb(mask, params):
    """Put numbers of another size where a mask is False."""

    def leaf(bits, values):
        values = np.asarray(values)
        return np.where(bits, values, values * np.float32(3.0) + np.float32(7.0))

    return jax.tree.map(leaf, mask, params)


def inputs_only(analysis, keep, params):
    @jax.jit
    def both():
        given = analysis.groups, keep, params
        return [groups.to_masks(*given, drop_inputs=flag) for flag in (False, True)]

    makers, all_of_them = jax.device_get(both())
    return makers, jax.tree.map(lambda whole, own: whole | ~own, all_of_them, makers)


def applied(mask, params):
    """Prune, on the host."""
    return jax.tree.map(lambda bits, leaf: np.where(bits, leaf, np.zeros_like(leaf)), mask, params)


@pytest.mark.usual("attentive", "mlp", "char_lstm", "functions", "vgg")
@pytest.mark.parametrize("name", CASES)
def test_what_reads_a_pruned_channel_may_be_anything(name):
    model, params, state, inputs, analysis = network(name)
    makers, readers = inputs_only(analysis, halves(analysis, spare="leaks"), params)
    predict = jax.jit(model.predict)
    pruned = applied(makers, params)
    outputs = predict(pruned, state, inputs)
    # Where a leaf makes and reads (recurrence), what is pruned stays so.
    other = applied(makers, perturb(readers, pruned))
    np.testing.assert_allclose(predict(other, state, inputs), outputs, rtol=1e-5, atol=1e-5)
    unlike = predict(perturb(readers, params), state, inputs)
    if any(not group.leaks for group in analysis.groups):
        assert not np.allclose(unlike, predict(params, state, inputs), rtol=1e-3)


@pytest.mark.usual("attentive", "resnet_projection")
@pytest.mark.parametrize("name", CASES)
def test_a_channel_that_nothing_reads_may_be_anything(name):
    model, params, state, inputs, analysis = network(name)
    makers, readers = inputs_only(analysis, halves(analysis, spare="mixes"), params)
    predict = jax.jit(model.predict)
    unread = applied(readers, params)
    outputs = predict(unread, state, inputs)
    other = applied(readers, perturb(makers, unread))
    np.testing.assert_allclose(predict(other, state, inputs), outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_filter_is_in_one_group_or_fixed_and_no_entry_in_two(name):
    _, params, _, _, analysis = network(name)
    seen = set()
    for group in analysis.groups:
        for member in group.members:
            assert member.indices.shape[0] == group.size
            entries = {(member.path, member.axis, int(i)) for i in member.indices.ravel()}
            assert len(entries) == member.indices.size
            assert not entries & seen
            seen |= entries
    leaves = dict(zip(trees.paths(params), jax.tree.leaves(params), strict=True))
    fixed = {(path, axis) for path, axis, _ in analysis.fixed}
    for filters in analysis.filters:
        member = filters.members[0]
        assert member.role == "filter"
        assert filters.size == leaves[member.path].shape[member.axis]
        if (member.path, member.axis) not in fixed:
            assert {(member.path, member.axis, i) for i in range(filters.size)} <= seen


def leaves_of(group):
    return {(member.path, member.axis, member.role) for member in group.members}


def test_a_chain_has_a_group_a_layer_and_flattening_gives_a_channel_many_places():
    *_, analysis = network("lenet5")
    assert [group.size for group in analysis.groups] == [6, 16, 120, 84]
    assert leaves_of(analysis.groups[1]) == {
        ("conv_2/kernel", 3, "filter"),
        ("conv_2/bias", 0, "channel"),
        ("dense_1/kernel", 0, "input"),
    }
    (flat,) = [member for member in analysis.groups[1].members if member.role == "input"]
    # 16 × 18 pixels become 2 × 2, the channel last.
    np.testing.assert_array_equal(flat.indices, np.arange(16)[:, None] + 16 * np.arange(4))
    assert analysis.fixed == (("dense_3/kernel", 1, "is the network's output"),)


def test_shortcuts_tie_stages_together_and_padded_channels_stand_alone():
    *_, analysis = network("resnet_plain")
    tied = {
        frozenset(m.path.split("/")[0] for m in group.members if m.role == "filter"): group
        for group in analysis.groups
    }
    # Widths 4, 8, 16; each padded by half on both sides.
    stages = {f"stage_{i}_block_1" for i in (1, 2, 3)}
    first = tied[frozenset({"conv_1", "stage_2_block_2"} | stages)]
    assert first.size == 4
    conv = {member.path: member.indices.ravel() for member in first.members}
    np.testing.assert_array_equal(conv["stage_2_block_1/conv_2/kernel"], [2, 3, 4, 5])
    np.testing.assert_array_equal(conv["stage_3_block_1/conv_2/kernel"], [6, 7, 8, 9])
    second = tied[frozenset({"stage_2_block_1", "stage_2_block_2", "stage_3_block_1"})]
    assert second.size == 4
    # The last block's two convolutions: what the shortcut leaves alone, and what is inside.
    assert sum(group.size for group in analysis.groups) == 16 + 4 + 8 + 8 + 16


def test_a_filter_goes_with_the_bias_and_normalization_that_act_on_it_alone():
    *_, analysis = network("resnet_projection")
    own = {each.members[0].path: {m.path for m in each.members} for each in analysis.filters}
    for conv, norm in (("conv_2", "norm_2"), ("shortcut", "shortcut_norm")):
        block = "stage_2_block_1"
        assert own[f"{block}/{conv}/kernel"] == {
            f"{block}/{conv}/kernel",
            f"{block}/{norm}/batch/scale",
            f"{block}/{norm}/batch/bias",
        }
    *_, chain = network("vgg")
    assert [{m.path for m in each.members} for each in chain.filters[:3]] == [
        {f"conv_{i}/kernel", f"conv_{i}/bias"} for i in (1, 2, 3)
    ]


def test_a_recurrent_channel_has_four_gates_and_reads_itself():
    *_, analysis = network("char_lstm")
    (group,) = [each for each in analysis.groups if each.size == 6]
    assert leaves_of(group) == {
        ("lstm_2/input/kernel", 1, "filter"),
        ("lstm_2/recurrent/kernel", 1, "filter"),
        ("lstm_2/input/bias", 0, "channel"),
        ("lstm_2/recurrent/bias", 0, "channel"),
        ("lstm_2/recurrent/kernel", 0, "input"),
        ("dense_1/kernel", 0, "input"),
    }
    (kernel,) = [m for m in group.members if (m.path, m.axis) == ("lstm_2/input/kernel", 1)]
    np.testing.assert_array_equal(kernel.indices, np.arange(6)[:, None] + 6 * np.arange(4))


def test_what_cannot_be_said_or_removed_is_named():
    *_, squashed = network("squashed")
    assert [bool(group.leaks) for group in squashed.groups] == [True, False]
    *_, attentive = network("attentive")
    assert [group.leaks for group in attentive.groups] == [(), ("sort mixes channels",)]
    *_, grouped = network("resnet_group")
    assert all("reduce_sum mixes channels" in group.mixes for group in grouped.groups)
    assert not any(group.leaks for group in grouped.groups)
    *_, own = network("own")
    normalized = own.groups[-1]  # by flax, whose sums are of squares, not of deviations
    assert normalized.size == 7
    assert normalized.mixes == ("reduce_sum mixes channels, to which a pruned one adds zero",)
    *_, plain = network("functions")  # queries and keys multiply one another
    attention = ("dot_general mixes channels, to which a pruned one adds zero",)
    assert {group.size: group.mixes for group in plain.groups} == {8: (), 4: attention, 6: ()}
    for name in (
        "resnet_plain",
        "resnet_bottleneck",
        "vgg_batch",
        "cnn",
        "char_lstm",
        "nnx",
    ):
        *_, analysis = network(name)
        assert not any(group.leaks or group.mixes for group in analysis.groups), name


def test_what_is_not_understood_is_said_and_does_not_fail():
    def predict(params, state, inputs):
        start = inputs @ params["a"]
        hidden = jax.lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: x * 2.0, start)
        return jnp.abs(hidden) @ params["b"]

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    analysis = groups.analyze(predict, params, {}, jnp.ones((2, 3)))
    (first,) = analysis.groups
    assert first.leaks == first.mixes == ("while is not understood",)
    assert leaves_of(first) == {("a", 1, "filter")}


@pytest.mark.parametrize(
    ("function", "leaks"),
    [
        (lambda x: x**2, False),
        (lambda x: jnp.abs(x) ** 1.5, False),
        (lambda x: x**-2, True),
        (lambda x: jnp.abs(x) ** 0.0, True),
        (lambda x: jnp.abs(x) ** jnp.mean(x), True),
        (lambda x: jnp.arctan2(x, -1.0), True),
    ],
    ids=["square", "power", "inverse", "zeroth power", "unknown power", "arctan2"],
)
def test_what_is_not_zero_at_zero_leaks(function, leaks):
    def predict(params, state, inputs):
        return function(inputs @ params["a"]) @ params["b"]

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    (group,) = groups.analyze(predict, params, {}, jnp.ones((2, 3))).groups
    assert bool(group.leaks) == leaks


@pytest.mark.usual("<lambda>-2752_0", "<lambda>-2752_1")
@pytest.mark.parametrize(
    ("make", "bits"),
    [
        (lambda **sizes: vgg.vgg11(norm="none", **sizes), 2_752),
        (lambda **sizes: vgg.vgg11(norm="batch", **sizes), 2_752),
        (lambda **sizes: models.resnet18(norm="batch", stem="imagenet", **sizes), 4_800),
        (lambda **sizes: models.resnet34(norm="batch", stem="imagenet", **sizes), 8_512),
    ],
)
def test_a_bit_a_filter_makes_the_masks_of_mpfl_as_long_as_it_says(make, bits):
    model = make(input_shape=(32, 32, 3), num_classes=100)
    params, state = jax.eval_shape(model.init, KEY)
    inputs = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    analysis = groups.analyze(model.predict, params, state, inputs)
    leaves = dict(zip(trees.paths(params), jax.tree.leaves(params), strict=True))
    convs = [each for each in analysis.filters if leaves[each.members[0].path].ndim == 4]
    assert sum(each.size for each in convs) == bits


def test_norms_are_those_of_the_filters():
    _, params, _, _, analysis = network("lenet5")
    kernel = np.asarray(params["conv_1"]["kernel"]).reshape(-1, 6)
    for order in (1, 2):
        np.testing.assert_allclose(
            groups.norms(params, analysis.groups[0], order=order),
            np.linalg.norm(kernel, ord=order, axis=0),
            rtol=1e-5,
        )
    with pytest.raises(ValueError, match="order must be 1 or 2, got 3"):
        groups.norms(params, analysis.groups[0], order=3)


def test_bits_that_do_not_fit_are_refused():
    _, params, _, _, analysis = network("mlp")
    keep = [jnp.ones(group.size, bool) for group in analysis.groups]
    with pytest.raises(ValueError, match="there are 2 groups, got 1"):
        groups.to_masks(analysis.groups, keep[:1], params, drop_inputs=False)
    with pytest.raises(ValueError, match=r"a group of 8 channels got bits of shape \(6,\)"):
        groups.to_masks(analysis.groups, keep[::-1], params, drop_inputs=False)


def test_masks_may_be_made_inside_a_jit():
    _, params, _, _, analysis = network("mlp")
    keep = [jnp.arange(group.size) > 2 for group in analysis.groups]
    make = jax.jit(functools.partial(groups.to_masks, analysis.groups, drop_inputs=True))
    made = make(keep, params)
    np.testing.assert_array_equal(made["dense_1"]["bias"], np.arange(8) > 2)
    expected = (np.arange(8) > 2)[:, None] & (np.arange(6) > 2)[None]
    np.testing.assert_array_equal(made["dense_2"]["kernel"], expected)
