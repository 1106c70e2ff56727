"""Every name that the config offers becomes a run whose round can be traced."""

import jax
import numpy as np
import pytest
from fedjaxprune.experiment.config.flat import files
from fedjaxprune.experiment.config.flat.sections import RunConfig, UserError
from fedjaxprune.experiment.config.flat.validation import alternatives, validate

from fedjaxprune import trees
from fedjaxprune.experiment import cohorts, methods
from fedjaxprune.experiment.execution import chunk_trial
from fedjaxprune.experiment.run import build, loop

SMALL = {"rounds": 3, "num_clients": 6, "cohort_size": 2, "local_steps": 1, "algorithm": "fedavg"}

# One case for every algorithm, and among them every name of every other setting at least once.
ROTATING = ("partition", "uplink", "aggregator", "server", "participation")
CASES = [
    {
        "algorithm": algorithm,
        "error_feedback": True,
        "server_learning_rate": 0.1,
        **{name: alternatives(name)[n % len(alternatives(name))] for name in ROTATING},
        **({"model": "pooled_cnn"} if algorithm in methods.BY_FILTER else {}),
        **({"gate_upload": "dense"} if algorithm in methods.STEERED else {}),  # any aggregator
    }
    for n, algorithm in enumerate(alternatives("algorithm"))
]
CASES += [
    {"algorithm": "feddip", "feddip_mode": "regrow", "rounds": 1},
    {"algorithm": "feddip", "feddip_mode": "dense", "max_penalty": 0.0},
    {"augment": True, "normalize": False, "dropout_probability": 0.5, "chunk_size": 100},
    {"algorithm": "feddip", "drift": "scaffold"},
    {"algorithm": "fedtiny", "drift": "fednova", "local_steps": None, "compute_dtype": "bfloat16"},
    {"algorithm": "random_channels", "gates": "personal", "gate_warm_up": 0.1},
    {"local_steps": None, "momentum": 0.5, "weight_decay": 1e-3, "chunk_size": 2},
]


def test_the_cases_have_every_name():
    for name in ROTATING:
        assert {case.get(name) for case in CASES} >= set(alternatives(name))


@pytest.mark.parametrize("changes", CASES, ids=lambda changes: "-".join(map(str, changes.values())))
def test_every_choice_makes_a_round(changes):
    parts = build.build(RunConfig(**{**SMALL, **changes}))
    assert len(parts.population.offsets) == 7

    key = jax.random.key(0)
    before = jax.eval_shape(lambda key: loop.start(key, parts), key)
    for stage, advance in zip(parts.algorithm.stages, parts.advance, strict=True):
        after, metrics = jax.eval_shape(advance, key, before, parts.population)
        assert jax.tree.structure(after) == jax.tree.structure(before)
        shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(before)]
        assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] == shapes
        assert metrics.participated.shape == ((6,) if stage.name in cohorts.EVERYBODY else (2,))


def test_the_seed_decides_the_partition():
    first, same, other = (
        np.asarray(build.build(RunConfig(**SMALL, seed=seed)).population.order)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    "model",
    ["cnn", "pooled_cnn", "two_cnn", "resnet18", "resnet20", "resnet32", "gated_resnet32"],
)
def test_a_model_that_fits_the_data_is_built(model):
    build.build(RunConfig(**SMALL, model=model))


def test_a_model_that_does_not_fit_the_data_is_one_sentence():
    with pytest.raises(
        UserError, match="model 'lenet5' does not fit the data set 'digits'"
    ) as caught:
        build.build(RunConfig(**SMALL, model="lenet5"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="char_lstm takes sequences of tokens"):
        build.build(RunConfig(**SMALL, model="char_lstm"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "mlp"}, "the network has none: take one with BatchNorm"),
        ({"server_share": 0.001}, "a held-out share of 0.001 leaves class 0, .* at the server"),
        ({"server_share": 0.999}, "leaves class 0, .* without any among the clients"),
        ({"sparsity": 0.999}, "method.sparsity must be at most 0.99"),
    ],
)
def test_fedtiny_says_why_it_cannot_run(changes, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        build.build(RunConfig(**{**SMALL, "algorithm": "fedtiny", **changes}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"algorithm": "mpfl", "model": "mlp"}, "no filters to prune"),
        ({"algorithm": "fedtiny", "model": "mlp"}, "take one with BatchNorm"),
        ({"algorithm": "feddp_threshold", "model": "mlp"}, "the network has none"),
    ],
)
def test_what_cannot_run_is_said_before_the_trial_of_chunk_sizes_compiles(
    changes, sentence, monkeypatch
):
    def trial(*arguments, **options):
        pytest.fail("the trial came first")

    monkeypatch.setattr(chunk_trial, "choose", trial)
    config = RunConfig(**{**SMALL, "rounds": 2000, "chunk_size": "auto", **changes})
    with pytest.raises(UserError, match=sentence):
        build.build(config, warn=pytest.fail)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"algorithm": "feddip"}, "sparsity must leave at least one of the 33800 prunable weights"),
        ({"algorithm": "random_masks", "layer_sparsity": "whole_model"}, "at least one of the"),
        (
            {"algorithm": "random_masks", "sparsity": 0.9997},
            "at least one of the 1000 weights of .*, or nothing passes; got 0.9997 with",
        ),
    ],
)
def test_a_sparsity_that_leaves_nothing_is_one_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        build.build(RunConfig(**{**SMALL, "sparsity": 0.99999, **changes}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("algorithm", ["adaptive_dynamic_pruning", "random_channels"])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"norm": "group"}, "norm must be 'batch' for .*, as statistics of a group"),
        ({"aggregator": "median"}, "aggregator must be 'weighted_mean' for .* 'salient'"),
    ],
)
def test_gates_that_close_channels_refuse_what_would_open_them(algorithm, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        validate({**SMALL, "algorithm": algorithm, **changes})


def test_the_first_convolution_can_be_kept_whole_under_fixed_masks():
    """As FedTiny does, so that only whose data decide is different."""
    settings = {**SMALL, "model": "resnet8", "sparsity": 0.9, "pretrain_epochs": 1}
    settings |= {"algorithm": "one_client_masks", "mask_start": "trained"}
    parts = build.build(RunConfig(**settings, layer_sparsity="uniform_but_first"))
    state = loop.start(jax.random.key(0), parts)
    after, _ = jax.jit(parts.advance[0])(jax.random.key(0), state, parts.population)
    leaves = zip(trees.paths(after.state.masks), jax.tree.leaves(after.state.masks), strict=True)
    kept = {path: (int(leaf.sum()), leaf.size) for path, leaf in leaves if "kernel" in path}
    first = next(path for path in kept if kept[path][0] == kept[path][1])
    assert kept[first][1] == 3 * 3 * 16
    whole = sum(size for _, size in kept.values())
    assert round(0.1 * whole) - len(kept) <= sum(n for n, _ in kept.values()) <= round(0.1 * whole)
    shares = [n / size for path, (n, size) in kept.items() if path != first]
    assert max(shares) - min(shares) < 0.01  # a weight of the smallest layer, 160 of them
    moved = jax.tree.map(lambda a, b: np.any(a != b), state.state.params, after.state.params)
    assert all(jax.tree.leaves(moved))  # to what the client has trained


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "mlp"}, "keeps the first convolution dense, and the network has none"),
        ({"model": "resnet8", "sparsity": 0.9999}, "sparsity must be less than 0.99.* got 0.9999"),
    ],
)
def test_a_first_convolution_that_cannot_be_kept_whole_is_one_sentence(changes, sentence):
    settings = {**SMALL, "algorithm": "random_masks", "layer_sparsity": "uniform_but_first"}
    with pytest.raises(UserError, match=sentence) as caught:
        build.build(RunConfig(**{**settings, **changes}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("algorithm", methods.BY_FILTER)
def test_methods_by_filter_need_convolutions(algorithm):
    with pytest.raises(UserError, match=r"there are no filters to prune: .* no conv") as caught:
        build.build(RunConfig(**{**SMALL, "algorithm": algorithm, "model": "mlp"}))
    assert "\n" not in str(caught.value)


def test_a_threshold_for_convolutions_says_that_there_are_none():
    with pytest.raises(UserError, match="kernels of convolutions, and the network has none"):
        build.build(RunConfig(**{**SMALL, "algorithm": "feddp_threshold", "model": "mlp"}))


@pytest.mark.parametrize("share", [0.996, 0.99999])
def test_explorers_that_would_have_nothing_to_train_on_are_refused(share):
    """The largest of six clients holds 241 examples, of which at these shares it shows all."""
    settings = {**SMALL, "algorithm": "autoflip", "explore_watch": "validation"}
    with pytest.raises(UserError, match=f"of 241 examples, .* {share} is all") as caught:
        build.build(RunConfig(**settings, development_share=share))
    assert "\n" not in str(caught.value)


def test_more_rounds_than_can_be_counted_are_refused():
    most = 2**31 - 1
    with pytest.raises(UserError, match=f"at most {most} rounds, .*1 of explore, {most} of train"):
        build.build(RunConfig(**{**SMALL, "algorithm": "autoflip", "rounds": most}))


def test_the_control_differs_from_the_method_by_its_networks_choice():
    inputs = jax.ShapeDtypeStruct((2, 8, 8, 1), np.float32)
    draws = {}
    for name in ("adaptive_dynamic_pruning", "random_channels", "squeeze_excitation"):
        config = RunConfig(**{**SMALL, "algorithm": name})
        model = build.MODELS[config.model](config, input_shape=(8, 8, 1), num_classes=10)
        params, state = jax.eval_shape(model.init, jax.random.key(0))
        graph = jax.make_jaxpr(model.predict)(params, state, inputs)
        draws[name] = "random_bits" in str(graph)
    assert draws == {name: name == "random_channels" for name in draws}


def test_what_the_server_holds_no_client_has():
    parts = build.build(RunConfig(**SMALL, server_share=0.1))
    order = np.asarray(parts.population.order)
    assert len(order) == len(np.unique(order))
    labels = np.asarray(parts.population.examples["labels"])
    left = np.bincount(np.delete(labels, order))  # by class
    every = np.bincount(labels)
    assert left.tolist() == [round(0.1 * n) for n in every]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(files.preset_texts()))
def test_every_round_of_a_preset_can_be_traced(name, tfds_data_dir):
    values = files.read_source(name)
    parts = build.build(RunConfig(**values, data_dir=str(tfds_data_dir)))
    key = jax.random.key(0)
    before = jax.eval_shape(lambda key: loop.start(key, parts), key)
    for advance in parts.advance:
        after, _ = jax.eval_shape(advance, key, before, parts.population)
        assert jax.tree.structure(after) == jax.tree.structure(before)


def test_a_preset_builds_on_its_own_data(tfds_data_dir):
    values = files.read_source("feddip-fashion-mnist")
    parts = build.build(RunConfig(**values, data_dir=str(tfds_data_dir)))
    sizes = np.diff(np.asarray(parts.population.offsets))
    np.testing.assert_array_equal(sizes, [1200] * 50)
