"""Networks of the field's tables: their sizes to the unit, and what makes each of them itself."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjaxprune import masks, models, registry, trees
from fedjaxprune.costs import flops
from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.config import resolve
from fedjaxprune.models import (
    adapters,
    heads,
    mobilenet,
    precision,
    shufflenet,
    transformers,
    wide,
)
from fedjaxprune.structure.channels import groups
from fedjaxprune.types import Batch
from tests import draws

KEY = jax.random.key(0)
CIFAR, GRAY = (32, 32, 3), (28, 28, 1)


def made(name, classes=10, shape=CIFAR, **settings):
    part = registry.find("model", name).part
    return part.build(part.settings(**settings), input_shape=shape, num_classes=classes)


def vit(patch_size, width, num_layers, num_heads):
    return "vit", {
        "patch_size": patch_size,
        "width": width,
        "num_layers": num_layers,
        "num_heads": num_heads,
    }


# Part, settings: all parameters for 10 and 100 classes, kernels without the head, multiply-adds.
IMAGES = [
    ("shufflenet_v2", {}, 352_042, 444_292, 333_840, 10_902_016),
    ("shufflenet_v2", {"width": 1}, 1_263_854, 1_356_104, 1_237_424, 45_002_112),
    ("shufflenet_v2", {"width": 1.5}, 2_488_874, 2_581_124, 2_455_184, None),
    ("shufflenet_v2", {"width": 2}, 5_365_486, 5_549_896, 5_311_280, None),
    ("shufflenet_v2", {"stem": "imagenet"}, 352_042, 444_292, 333_840, 815_392),
    ("shufflenet_v2", {"stem": "imagenet", "width": 1}, 1_263_854, None, 1_237_424, 2_946_648),
    ("mobilenet_v2", {}, 2_296_922, 2_412_212, 2_249_024, 91_154_944),
    ("mobilenet_v2", {"blocks": "paper"}, 2_236_682, None, None, None),
    ("vgg9", {}, 3_491_530, 3_537_700, None, 135_369_728),
    ("wide_resnet", {"depth": 16, "width": 4}, 2_748_890, 2_772_020, 2_742_704, 392_612_352),
    ("wide_resnet", {"depth": 16, "width": 8}, 10_961_370, 11_007_540, 10_949_040, 1_548_145_664),
    ("wide_resnet", {}, 1_467_610, 1_479_220, 1_462_704, 214_353_152),
    ("wide_resnet", {"width": 10}, 36_479_194, 36_536_884, 36_454_832, 5_243_328_768),
    (*vit(2, 192, 6, 4), 2_723_530, None, 2_656_512, 834_900_096),
    (*vit(2, 96, 4, 2), 474_538, None, 443_520, 164_710_080),
    (*vit(2, 128, 6, 2), 1_225_866, None, 1_181_184, None),
    (*vit(2, 192, 12, 3), 5_392_714, None, 5_310_720, None),
    (*vit(4, 192, 6, 4), 2_693_578, None, 2_663_424, 182_849_664),
    ("vit", {}, 459_562, None, 446_976, 32_294_592),
]
# Part, settings, classes, example: all parameters, kernels.
OTHERS = [
    ("cnn", {}, 10, GRAY, 1_663_370, None),
    ("cnn", {"hidden_size": 2048}, 62, GRAY, 6_603_710, None),
    ("emnist_cnn", {}, 62, GRAY, 1_206_590, None),
    ("emnist_cnn", {}, 10, GRAY, 1_199_882, None),
    ("gpt", {"width": 32}, 80, (80,), 30_592, 24_576),
    ("gpt", {}, 256, (64,), 120_576, 98_304),
    ("gpt", {"width": 128, "num_layers": 4}, 256, (128,), 842_496, 786_432),
    ("shufflenet_v2", {}, 1000, CIFAR, 1_366_792, None),  # torchvision's
    ("shufflenet_v2", {"width": 1}, 1000, CIFAR, 2_278_604, None),
    ("mobilenet_v2", {"blocks": "paper"}, 1000, CIFAR, 3_504_872, None),
]
SLOW = pytest.mark.slow
FAST = ("vgg9", "cnn", "emnist_cnn", "gpt")


def case(name, settings, *rest):
    """Mark slow what takes seconds to trace, but for one of each network."""
    is_fast = (name in FAST or not settings) and rest[0] != 1000
    label = "-".join([name, *map(str, settings.values()), str(rest[0])])
    return pytest.param(name, settings, *rest, id=label, marks=() if is_fast else SLOW)


@functools.cache
def shapes_of(name, classes, shape, settings):
    model = made(name, classes, shape, **dict(settings))
    return model, jax.eval_shape(model.init, KEY)


def sizes_of(name, classes, shape, settings):
    """Count all parameters and the kernels that are not the head's."""
    _, (params, _) = shapes_of(name, classes, shape, tuple(settings.items()))
    items = list(trees.items(params))
    kernels = [leaf.size for path, leaf in items if masks.is_kernel(path, leaf)]
    head = [leaf.size for path, leaf in items if path == "dense_1/kernel"]
    return sum(trees.sizes(params)), sum(kernels) - (sum(head) if name != "cnn" else 0)


@pytest.mark.parametrize(
    ("name", "settings", "ten", "hundred", "kernels", "multiply_adds"),
    [case(*row) for row in IMAGES],
)
def test_a_network_of_images_has_its_sizes(name, settings, ten, hundred, kernels, multiply_adds):
    total, without_head = sizes_of(name, 10, CIFAR, settings)
    assert total == ten
    assert kernels in (None, without_head)
    if hundred is not None and name in ("vgg9", "wide_resnet"):
        assert sizes_of(name, 100, CIFAR, settings)[0] == hundred
    elif hundred is not None:
        _, (params, _) = shapes_of(name, 10, CIFAR, tuple(settings.items()))
        assert hundred - ten == 90 * (params["dense_1"]["kernel"].shape[0] + 1)


@pytest.mark.parametrize(
    ("name", "settings", "multiply_adds"),
    [
        pytest.param(*row[:2], row[-1], marks=() if row[:2] == ("vit", {}) else SLOW)
        for row in IMAGES
        if row[-1] is not None
    ],
)
def test_a_network_of_images_multiplies_as_often_as_it_should(name, settings, multiply_adds):
    model, _ = shapes_of(name, 10, CIFAR, tuple(settings.items()))
    image = jax.ShapeDtypeStruct((1, *CIFAR), jnp.float32)
    assert flops.dense(flops.of_model(model, None, image)).forward == multiply_adds


@pytest.mark.parametrize(
    ("name", "settings", "classes", "shape", "total", "kernels"), [case(*row) for row in OTHERS]
)
def test_a_network_has_its_sizes(name, settings, classes, shape, total, kernels):
    found = sizes_of(name, classes, shape, settings)
    assert found[0] == total
    assert kernels in (None, found[1])


def test_the_model_of_32_million_has_19():
    settings = {"width": 256, "num_layers": 8, "num_positions": 2048, "labels": "every"}
    total, kernels = sizes_of("gpt", 50_257, (256,), settings)
    assert (total, kernels) == (19_708_672, 6_291_456)
    whole, prunable = sizes_of("gpt", 50_257, (256,), {**settings, "embedding": "prunable"})
    assert (whole, prunable - kernels) == (total, 50_257 * 256)
    biases_and_shifts = 8 * (9 * 256 + 2 * 256) + 256
    assert total + 12_865_792 - biases_and_shifts == 32_551_680  # what is published, in entries


@SLOW
def test_a_story_takes_five_billion_multiply_adds():
    model = made("gpt", 50_257, (256,), width=256, num_layers=8, num_positions=2048, labels="every")
    story = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    total = flops.dense(flops.of_model(model, None, story)).forward
    assert round(total / 1e9, 2) == 5.17
    assert round(256 * 256 * 50_257 / total, 2) == 0.64


@SLOW
def test_the_sizes_of_shufflenet_and_mobilenet_by_stage():
    def by_stage(name, count):
        _, (params, _) = shapes_of(name, 10, CIFAR, ())
        return [
            tuple(
                sum(leaf.size for path, leaf in trees.items(part) if path.endswith(ends))
                for ends in ("kernel", ("batch/scale", "batch/bias"))
            )
            for part in [
                params["stem"],
                *({k: v for k, v in params.items() if k.startswith(f"stage_{i}_")} for i in count),
                params["last"],
            ]
        ]

    assert by_stage("shufflenet_v2", range(1, 4)) == [
        (648, 48), (6_264, 672), (43_056, 2_496), (87_264, 2_688), (196_608, 2_048),
    ]  # fmt: skip
    assert by_stage("mobilenet_v2", range(1, 8)) == [
        (864, 64), (2_336, 192), (13_296, 1_104), (37_392, 2_304), (177_984, 5_888),
        (302_592, 6_912), (784_320, 10_944), (520_640, 5_120), (409_600, 2_560),
    ]  # fmt: skip


def test_mobilenets_forms_differ_by_four_shortcuts_and_an_expansion():
    def items(**settings):
        _, (params, _) = shapes_of("mobilenet_v2", 10, CIFAR, tuple(settings.items()))
        return {path: leaf.size for path, leaf in trees.items(params)}

    wide_form, published = items(), items(blocks="paper")
    shortcuts = {path: size for path, size in wide_form.items() if path.endswith("shortcut/kernel")}
    blocks = [
        sum(size for path, size in wide_form.items() if path.startswith(kernel[: -len("/kernel")]))
        for kernel in shortcuts
    ]
    assert sorted(blocks) == [432, 544, 6_336, 51_840]  # with their normalization
    assert not any("shortcut" in path for path in published)
    assert sum(wide_form.values()) - sum(published.values()) == 60_240
    first = sum(v for p, v in wide_form.items() if p.startswith("stage_1_block_1/pointwise_1"))
    assert sum(blocks) + first == 60_240
    assert first == 1_088


def test_the_shuffle_takes_turns_between_the_halves():
    x = jnp.arange(8.0).reshape(1, 1, 1, 8)
    np.testing.assert_array_equal(shufflenet.shuffle(x).ravel(), [0, 4, 1, 5, 2, 6, 3, 7])


def test_a_block_whose_last_scale_is_zero_lets_half_of_its_channels_by():
    block = shufflenet.Block(8, 1, "batch")
    x = draws.normal(0, 2, 4, 4, 8)
    variables: Any = jax.jit(lambda: block.init(KEY, x, False, None))()
    norm = variables["params"]["pointwise_2"]["norm"]["batch"]
    norm["scale"] = jnp.zeros_like(norm["scale"])
    out = np.asarray(jax.jit(lambda v: block.apply(v, x, False, None))(variables))
    np.testing.assert_array_equal(out[..., ::2], np.asarray(x)[..., :4])
    np.testing.assert_array_equal(out[..., 1::2], 0.0)


TINY = {
    "shufflenet_v2": lambda: (
        shufflenet.ShuffleNetV2((8, 12, 16, 20), (1, 0, 0), 3, "batch", "cifar"), (8, 9, 2)
    ),
    "mobilenet_v2": lambda: (
        mobilenet.MobileNetV2(4, ROWS, 10, 3, "batch", "cifar", "cifar"), (6, 7, 2)
    ),
    "wide_resnet": lambda: (wide.WideResNet((4, 8), 1, 3, "batch", 0.1), (6, 7, 2)),
    "vit": lambda: (transformers.Vit(2, 8, 1, 2, 3, 0.1), (4, 6, 2)),
}  # fmt: skip
ROWS = (mobilenet.Row(1, 6, 1, 1), mobilenet.Row(2, 6, 2, 2))


def tiny(name):
    module, shape = TINY[name]()
    return adapters.from_linen(module, input_shape=shape)


def test_a_shuffle_ties_no_channels():
    name = "shufflenet_v2"
    model = tiny(name)
    params, state = jax.eval_shape(model.init, KEY)
    inputs = jax.ShapeDtypeStruct((2, *TINY[name]()[1]), jnp.float32)
    analysis = groups.analyze(model.predict, params, state, inputs)
    assert not any(group.leaks or group.mixes for group in analysis.groups)
    made_by = [
        (leaf.shape[-1])
        for path, leaf in trees.items(params)
        if path.endswith("conv/kernel") and leaf.shape[2] > 1
    ]
    # Each kernel that mixes channels makes as many of its own; a depthwise one goes with them.
    assert sum(group.size for group in analysis.groups) == sum(made_by)


@SLOW
def test_group_normalization_takes_any_number_of_channels():
    model = made("shufflenet_v2", norm="group", width=1)  # 58 channels a half
    image = jax.ShapeDtypeStruct((1, *CIFAR), jnp.float32)
    assert jax.eval_shape(model.predict, *jax.eval_shape(model.init, KEY), image).shape == (1, 10)


@SLOW
@pytest.mark.parametrize("name", ["mobilenet_v2", "wide_resnet"])
def test_channels_are_found_and_only_residual_sums_tie_them(name):
    model = tiny(name)
    params, state = jax.eval_shape(model.init, KEY)
    inputs = jax.ShapeDtypeStruct((2, *TINY[name]()[1]), jnp.float32)
    analysis = groups.analyze(model.predict, params, state, inputs)
    assert not any(group.leaks or group.mixes for group in analysis.groups)
    assert [fixed[0] for fixed in analysis.fixed] == ["dense_1/kernel"]


LANGUAGE = {"input_shape": (6,), "num_classes": 11, "width": 8, "num_layers": 2, "dropout": 0.0}


@functools.cache
def language(**options):
    """Make a tiny language model with large embeddings, so that positions matter."""
    model = models.gpt(**{**LANGUAGE, **options})
    params, _ = jax.jit(model.init)(KEY)
    params = jax.tree.map(lambda leaf: leaf * 20 if leaf.ndim > 1 else leaf, params)
    return params, jax.jit(lambda tokens: model.predict(params, {}, tokens)), model


def explicit(params, tokens, *, scaled, num_heads=2):
    """Compute the logits of `language` position by position."""

    def norm(x, p):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p["scale"] + p["bias"]

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    length, width = len(tokens), params["embedding"].shape[1]
    x = params["embedding"][tokens] + params["positions"][:length]
    size = width // num_heads
    for number in (1, 2):
        p = params[f"block_{number}"]
        query, key, value = np.split(dense(norm(x, p["norm_1"]), p["attention"]["qkv"]), 3, axis=1)
        mixed = np.zeros_like(x)
        for head in range(num_heads):
            own = slice(head * size, (head + 1) * size)
            for t in range(length):
                scores = key[: t + 1, own] @ query[t, own] / (np.sqrt(size) if scaled else 1.0)
                weights = np.exp(scores - scores.max())
                mixed[t, own] = weights / weights.sum() @ value[: t + 1, own]
        x = x + dense(mixed, p["attention"]["out"])
        inner = dense(norm(x, p["norm_2"]), p["up"])
        gelu = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / np.sqrt(2)))
        x = x + dense(gelu, p["down"])
    return norm(x, params["norm"]) @ params["embedding"].T


@pytest.mark.parametrize("scaled", [True, False])
def test_the_language_model_is_its_formulas(scaled):
    params, predict, _ = language(labels="every", scores="scaled" if scaled else "plain")
    tokens = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    logits = predict(tokens)
    for row, expected in zip(logits, tokens, strict=True):
        np.testing.assert_allclose(
            row, explicit(params, np.asarray(expected), scaled=scaled), rtol=1e-4, atol=1e-4
        )
    other = predict(tokens.at[:, 3].set(0))
    np.testing.assert_array_equal(other[:, :3], logits[:, :3])
    assert (jnp.abs(other - logits).max(axis=(0, 2))[3:] > 1e-3).all()


@SLOW
def test_the_last_position_is_one_of_every_and_padding_does_not_count():
    params, predict, model = language(labels="every")
    _, last, _ = language(labels="last")
    tokens = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    np.testing.assert_allclose(last(tokens), predict(tokens)[:, -1], rtol=1e-5, atol=1e-5)
    assert bool(jnp.isnan(predict(tokens.at[0, 2].set(11))[0, 2:]).all())
    short = models.gpt(**{**LANGUAGE, "input_shape": (4,)}, num_positions=6, labels="every")
    labels = jnp.roll(tokens, -1, axis=1).at[:, 3:].set(-1)
    weights = jnp.ones(2)
    whole, _ = jax.jit(model.loss)(params, {}, Batch(tokens, labels, weights), KEY)
    cut, _ = short.loss(params, {}, Batch(tokens[:, :4], labels[:, :4], weights), KEY)
    np.testing.assert_allclose(whole, cut, rtol=1e-5)


@SLOW
def test_a_language_model_begins_at_the_entropy_of_its_tokens():
    model = models.gpt(input_shape=(16,), num_classes=256, labels="every")
    params, state = jax.jit(model.init)(KEY)
    tokens = jax.random.randint(KEY, (4, 16), 0, 256)
    batch = Batch(tokens, jnp.roll(tokens, -1, axis=1), jnp.ones(4))
    loss, _ = jax.jit(model.loss)(params, state, batch, KEY)
    assert abs(float(loss) - np.log(256)) < 0.1


@SLOW
def test_patches_and_their_positions_may_be_permuted_together():
    model = tiny("vit")
    params, _ = jax.jit(model.init)(KEY)
    image = draws.normal(0, 1, *TINY["vit"]()[1])
    patches = image.reshape(1, 2, 2, 3, 2, 2).swapaxes(2, 3).reshape(6, 2, 2, 2)
    order = jnp.array([4, 2, 0, 5, 1, 3])
    moved = patches[order].reshape(1, 2, 3, 2, 2, 2).swapaxes(2, 3).reshape(image.shape)
    positions = params["positions"] * 50
    first = jax.jit(model.predict)({**params, "positions": positions}, {}, image)
    rows = positions.at[1:].set(positions[1:][order])
    second = jax.jit(model.predict)({**params, "positions": rows}, {}, moved)
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)
    assert not np.allclose(first, model.predict({**params, "positions": positions}, {}, moved))


@SLOW
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*TINY, "gpt"])
def test_ten_steps_lower_the_loss_and_every_leaf_has_a_gradient(name, dtype):
    if name == "gpt":
        model = models.gpt(**LANGUAGE, labels="every")
        inputs = jnp.arange(48).reshape(8, 6) % 11
        batch = Batch(inputs, (inputs + 1) % 11, jnp.ones(8))
    else:
        model = tiny(name)
        labels = jnp.arange(8, dtype=jnp.int32) % 3
        noise = draws.normal(0, 8, *TINY[name]()[1])
        shifts = labels.astype(jnp.float32)[:, None, None, None]
        batch = Batch(noise + shifts, labels, jnp.ones(8))
    model = precision.compute_in(model, dtype)
    params, state = jax.jit(model.init)(KEY)
    step = jax.jit(jax.value_and_grad(model.loss, has_aux=True))
    losses = []
    for number in range(10):
        key = jax.random.fold_in(KEY, number)
        (loss, (state, _)), grads = step(params, state, batch, key)
        if number == 1:
            assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(grads)), dtype
        params = jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, params, grads)
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_the_loss_of_many_tokens_holds_one_array_of_logits():
    num_rows, num_tokens, width = 64, 4096, 16

    def loss(kernel, inputs, labels):
        return jnp.mean(heads.cross_entropy(inputs @ kernel, labels))

    given = jnp.zeros((width, num_tokens)), jnp.zeros((num_rows, width))
    labels = jnp.zeros(num_rows, jnp.int32)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*given, labels).compile()
    memory: Any = compiled.memory_analysis()
    assert (
        memory.temp_size_in_bytes < 1.2 * 4 * num_rows * num_tokens
    )  # a gather of the label's logit needs two


REFUSED = [
    (models.vit, {"input_shape": (30, 32, 3)}, "patch_size must divide .*30x32"),
    (models.vit, {"num_heads": 5}, "num_heads must divide the width, 96, got 5"),
    (models.vit, {"input_shape": (32,)}, "vit takes images"),
    (models.gpt, {}, "gpt takes sequences of tokens"),
    (models.gpt, {"input_shape": (9,), "num_positions": 8}, "at least 9, an example's .* got 8"),
    (models.gpt, {"input_shape": (9,), "labels": "all"}, "labels must be one of last, every, got"),
    (models.gpt, {"input_shape": (9,), "scores": 3}, "scores must be one of scaled, plain, got 3"),
    (models.gpt, {"input_shape": (9,), "dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
    (models.wide_resnet, {"norm": "batch", "depth": 20}, "depth must be one of 10, 16, .* got 20"),
    (models.wide_resnet, {"norm": "none"}, "norm must be"),
    (models.shufflenet_v2, {"norm": "batch", "width": 3}, "one of 0.5, 1.0, 1.5, 2.0, got 3"),
    (models.shufflenet_v2, {"norm": "batch", "input_shape": (7, 8, 3)}, "8x8 pixels, got 7x8"),
    (
        models.mobilenet_v2,
        {"norm": "batch", "stem": "imagenet", "input_shape": (31, 32, 3)},
        "at least 32x32 pixels, got 31x32",
    ),
    (models.mobilenet_v2, {"norm": "batch", "blocks": 1}, "blocks must be .* got 1"),
    (models.vgg9, {"input_shape": (7, 8, 3)}, "vgg9 takes images of at least 8x8"),
    (models.emnist_cnn, {"input_shape": (5, 8, 1)}, "at least 6x6 pixels, got 5x8"),
    (models.cnn, {"hidden_size": 0}, "hidden_size must be positive"),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED)
def test_what_does_not_fit_is_refused_with_numbers(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**{"input_shape": CIFAR, "num_classes": 2, **options})


def test_widths_and_depths_that_there_are_not_are_refused_by_a_config():
    for model, message in (
        (
            {"name": "shufflenet_v2", "width": 0.7},
            r"width must be one of 0.5, 1.0, 1.5, 2.0, got 0.7",
        ),
        ({"name": "wide_resnet", "depth": 18}, "depth must be one of 10, 16, 22"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve.resolve({"model": model})
