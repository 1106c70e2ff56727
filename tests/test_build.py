"""From a config to a run: every part builds, and what does not fit is one sentence."""

import functools
import json

import jax
import numpy as np
import optax
import pytest

from fedjaxprune import masks as masks_lib
from fedjaxprune import registry, trees
from fedjaxprune.errors import ConfigError
from fedjaxprune.experiment.config import files, resolve
from fedjaxprune.experiment.execution import chunk_trial
from fedjaxprune.experiment.run import build, examples, launch
from fedjaxprune.experiment.run.listener import Listener
from fedjaxprune.federated import aggregators
from fedjaxprune.method import needs_of
from fedjaxprune.rounds.protocol import Protocol
from tests import quadratic, stub
from tests.folders import changed, line

SMALL = {
    "method": "fedavg",
    "federation": {"num_rounds": 2, "cohort_size": 2},
    "data.num_clients": 4,
    "client.steps": 1,
    "execution": {"devices": 1, "chunk_size": 1},
}


def made(**changes):
    given = resolve.merge(resolve.read(SMALL), resolve.read(changes))
    return build.build(resolve.resolve(given))


PARTS = {
    "sampling": "federation.sampling",
    "correction": "client.correction",
    "server_optimizer": "server.optimizer",
    "aggregator": "server.aggregator",
    "uplink": "uplink",
    "downlink": "downlink",
    "optimizer": "client.optimizer",
}
OTHERS = {"server_trust": {"server.data_fraction": 0.1}}
CHOICES = [(path, name) for kind, path in PARTS.items() for name in registry.names(kind)]


@pytest.mark.usual(
    "federation.sampling-weighted",
    "client.correction-fednova",
    "client.correction-scaffold",
    "server.optimizer-fedyogi",
    "server.aggregator-geometric_median",
    "server.aggregator-krum",
    "server.aggregator-trimmed_mean",
    "server.aggregator-server_trust",
    "uplink-top_k",
    "uplink-quantize",
)
@pytest.mark.parametrize(("path", "name"), CHOICES)
def test_every_choice_makes_a_round(path, name):
    needed = {"server_learning_rate": 0.1} if name in ("fedadam", "fedyogi") else {}
    small = {"model": {"name": "mlp", "hidden_sizes": [4]}}
    made(**{path: {"name": name, **needed}}, **OTHERS.get(name, {}), **small)


# Other depths of a network that is built by default; `test_models_papers` counts their weights.
DEPTHS = ("gated_resnet32", "resnet32", "resnet34")
NETWORKS = [
    pytest.param(name, marks=pytest.mark.slow if name in DEPTHS else ())
    for name in registry.names("model")
]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_built_from_a_config_of_its_name(name):
    config = resolve.resolve({"model": name})
    tokens = ((12,), 90)
    sizes = {"char_lstm": tokens, "gpt": tokens}.get(name, ((32, 32, 3), 10))
    input_shape, num_classes = sizes
    model = config.parts.model.part.build(
        config.model, input_shape=input_shape, num_classes=num_classes
    )
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.leaves(params)


METHODS = [
    "/".join(filter(None, (name, variant)))
    for name, listed in registry.names("method").items()
    for variant in ("", *listed.variants)
]


@functools.cache
def data_of(needs):
    """Read the data once for all methods that need the same of it."""
    return examples.read(resolve.resolve({**SMALL, "method": "snip" if needs else "fedavg"}))


@functools.cache
def model_of(model, needs):
    """Build a network once for all methods that train it."""
    config = resolve.resolve({**SMALL, "model": json.loads(model)})
    found = data_of(needs)
    return build.make_model(config, found.dataset, found.test)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_built_from_a_config_of_its_name(name):
    config = resolve.resolve({**SMALL, "method": name})
    needs = needs_of(config.parts.method.part, config.method).server_examples
    found, model = data_of(needs), model_of(config.model.model_dump_json(), needs)
    task = build.make_task(config, model, found, chunk=1)
    build.check_needs(config, task)
    assert build.make_algorithm(config, task).stages[-1].num_rounds == 2


@pytest.mark.parametrize(
    "given",
    [{"method": "fedtiny"}, {"method": {"name": "autoflip", "channel_threshold": 0.3}}],
    ids=["first convolution", "biases of channels"],
)
def test_the_sparsity_on_record_is_that_of_all_kernels(given):
    config = resolve.resolve({**SMALL, "model": "resnet8", **given})
    found = examples.read(config)
    task = build.make_task(
        config, build.make_model(config, found.dataset, found.test), found, chunk=1
    )
    algorithm = build.make_algorithm(config, task)
    network = build.describe_network(config, task, algorithm, found)
    params = task.facts.params
    flags = masks_lib.prunable_leaves(params, masks_lib.is_kernel)
    kernels = [path for path, flag in zip(trees.paths(params), flags, strict=True) if flag]
    assert list(network.prunable) == kernels
    assert flags != masks_lib.prunable_leaves(params, algorithm.prunable)


def test_the_checksum_of_all_examples_sees_each_of_them_and_who_holds_it():
    found = examples.read(resolve.resolve(SMALL))
    long = np.tile(np.asarray(found.dataset.train["inputs"]), (3, 1, 1, 1))
    sampled = found.dataset._replace(train={**found.dataset.train, "inputs": long})
    changed = long.copy()
    changed[1, 0, 0] += 1  # between two examples of the sample
    other = found.dataset._replace(train={**found.dataset.train, "inputs": changed})
    assert examples.checksum(sampled) == examples.checksum(other)
    people = found.population
    dealt = people._replace(order=people.order[::-1])
    sums = [
        examples.checksum_of_all(one)
        for one in (
            found,
            found._replace(dataset=sampled),
            found._replace(dataset=other),
            found._replace(population=dealt),
            found._replace(held=np.arange(3, dtype=np.int32)),
        )
    ]
    assert len(set(sums)) == len(sums)


@pytest.mark.parametrize(
    ("size", "advice"), [(2, "it needs three"), (3, "a fraction of 0.334 drops one"), (10, "")]
)
def test_a_trimmed_mean_that_drops_nobody_says_so(size, advice):
    protocol = Protocol(
        num_rounds=2,
        batcher=quadratic.full_batches(2),
        optimizer=optax.sgd(0.1),
        aggregator=aggregators.trimmed_mean(fraction=0.1),
    )
    task = quadratic.task(protocol, cohort_size=size)
    notes = build.make_algorithm(resolve.resolve(SMALL), task).notes
    start = f"the trimmed mean of fraction 0.1 drops nobody of a cohort of {size}, "
    assert [note.startswith(start) and advice in note for note in notes] == [True] * bool(advice)


CLIENTS = {"data.num_clients": 20}


@pytest.mark.parametrize("name", [n for n in registry.names("partition") if n != "by_key"])
def test_the_seed_decides_the_partition(name):
    first, again, other = (
        examples.read(resolve.resolve({**SMALL, **CLIENTS, "data.partition": name, "seed": seed}))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.population.order, again.population.order)
    assert not np.array_equal(first.population.order, other.population.order)


MISFITS = {
    "a network": ({"model": "lenet5"}, "model 'lenet5' does not fit the data set 'digits'"),
    "batches": ({"client.batch_size": 5000}, "client.batch_size must be at most the number of"),
    "clients": ({"data.num_clients": 5000}, "data.partition 'iid' of 'digits' over 5000 clients"),
    "statistics": (
        {"method": "fedtiny", "model": "mlp"},
        "method 'fedtiny' needs BatchNorm statistics, and the network 'mlp' has none.",
    ),
    "convolutions": (
        {"method": "mpfl", "model": "mlp"},
        "method 'mpfl' needs convolutions, and the network 'mlp' has none.",
    ),
    "a share": ({"server.data_fraction": 0.001}, "server.data_fraction: a held-out share of 0.001"),
    "rounds": (
        {"method": "autoflip", "federation.num_rounds": 2**31 - 1},
        "all stages together must have at most 2147483647 rounds",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_one_sentence(name):
    changes, sentence = MISFITS[name]
    with pytest.raises(ConfigError) as caught:
        made(**changes)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_run_is_said_before_the_trial_of_chunk_sizes_compiles(monkeypatch):
    monkeypatch.setattr(chunk_trial, "choose", pytest.fail)
    changes = {"method": "fedtiny", "model": "mlp", "execution.chunk_size": "auto"}
    config = resolve.resolve(resolve.merge(resolve.read(SMALL), resolve.read(changes)))
    with pytest.raises(ConfigError, match="needs BatchNorm"):
        build.build(config, warn=pytest.fail)


def test_what_the_server_holds_no_client_has():
    given = {**SMALL, "method": "snip", "server.data_fraction": 0.1}
    found = examples.read(resolve.resolve(given))
    order = np.asarray(found.population.order)
    assert not set(found.held.tolist()) & set(order.tolist())
    assert len(found.held) + len(order) == len(found.dataset.train["labels"])


def test_a_client_of_a_key_is_counted():
    from tests import stub

    given = {**stub.settings(), "data.partition": "by_key"}
    del given["data.num_clients"]
    parts = build.build(resolve.resolve(given))
    assert parts.config.data.num_clients == 6
    assert parts.config.federation.cohort_size == 6


@pytest.mark.parametrize("name", files.preset_texts())
def test_a_preset_is_valid_and_says_what_it_is(name):
    first, *_ = files.preset_texts()[name].splitlines()
    assert first.startswith("# ")
    resolve.resolve(files.read_source(name))


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize("name", files.preset_texts())
def test_every_round_of_a_preset_can_be_traced(name, tfds_data_dir):
    given = files.read_source(name)
    if not str(given.values.get("data.dataset.name", "digits")).startswith("digits"):
        place = {"data.dataset.data_dir": str(tfds_data_dir)}
        given = resolve.merge(given, resolve.read(place))
    build.build(resolve.resolve(given))
    jax.clear_caches()


def test_an_own_method_that_never_prunes_is_warned_of():
    said = []
    listener = Listener(warn=said.append)
    lines = [changed(line(n), {"mask.sparsity": 0.0}) for n in (1, 2)]
    for method in (f"{stub.FILE}:METHOD", "feddip/without_pruning"):
        config = resolve.resolve({"method": method})
        launch._check_pruned(config, lines, listener)
        launch._check_pruned(config, [*lines, line(3)], listener)
    (sentence,) = said
    assert "but no weight was pruned in any of 2 rounds" in sentence
