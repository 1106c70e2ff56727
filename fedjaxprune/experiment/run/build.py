"""From names to functions: the one place where the config's words become components."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjaxprune.data import batching, datasets, partitions, splits, transforms
from fedjaxprune.errors import ConfigError, DataError
from fedjaxprune.experiment import (
    cohorts,
    explore_recipes,
    filter_recipes,
    gated_recipes,
    methods,
    recipes,
)
from fedjaxprune.experiment.config.flat.sections import INT_MAX, RunConfig, UserError
from fedjaxprune.experiment.execution import chunk_size, chunk_trial
from fedjaxprune.experiment.run import fitting, loop
from fedjaxprune.experiment.run.evaluation import TestSet
from fedjaxprune.experiment.task_of import task_of
from fedjaxprune.federated import aggregators, cohort, server_optimizers, uplinks
from fedjaxprune.methods import fedavg, feddip, fednova, fedtiny, fixed_masks, scaffold
from fedjaxprune.models import cnns, lstm, precision, vgg, zoo
from fedjaxprune.rounds import server_work, simulation
from fedjaxprune.rounds.protocol import Correction, Protocol
from fedjaxprune.types import (
    Aggregator,
    Algorithm,
    Batcher,
    CohortAggregator,
    Model,
    Schedule,
    Uplink,
)

MODELS: Mapping[str, Callable[..., Model]] = {
    "mlp": lambda config, **sizes: zoo.mlp(**sizes),
    "lenet5": lambda config, **sizes: zoo.lenet5(**sizes),
    "cnn": lambda config, **sizes: zoo.cnn(**sizes),
    "two_cnn": lambda config, **sizes: cnns.two_cnn(**sizes),
    "femnist_cnn": lambda config, **sizes: cnns.femnist_cnn(**sizes),
    "pooled_cnn": lambda config, **sizes: cnns.pooled_cnn(**sizes),
    "alexnet": lambda config, **sizes: cnns.alexnet(**sizes),
    "vgg11": lambda config, **sizes: vgg.vgg11(norm="none", **sizes),
    "vgg11_bn": lambda config, **sizes: vgg.vgg11(norm=config.norm, **sizes),
    "vgg16_bn": lambda config, **sizes: vgg.vgg16(norm=config.norm, **sizes),
    "resnet8": lambda config, **sizes: zoo.resnet8(norm=config.norm, **sizes),
    "resnet18": lambda config, **sizes: zoo.resnet18(norm=config.norm, **sizes),
    "resnet20": lambda config, **sizes: zoo.resnet20(norm=config.norm, **sizes),
    "resnet32": lambda config, **sizes: zoo.resnet32(norm=config.norm, **sizes),
    "resnet34": lambda config, **sizes: zoo.resnet34(norm=config.norm, **sizes),
    "resnet50": lambda config, **sizes: zoo.resnet50(norm=config.norm, **sizes),
    **gated_recipes.MODELS,
    "char_lstm": lambda config, **sizes: lstm.char_lstm(**sizes),
}


ALGORITHMS: Mapping[str, Callable[[RunConfig, Model, Protocol, recipes.Given], Algorithm]] = {
    "fedavg": lambda config, model, setup, given: fedavg.fedavg(model, setup),
    "fedprox": lambda config, model, setup, given: fedavg.fedprox(
        model, setup, mu=config.proximal_mu
    ),
    "scaffold": lambda config, model, setup, given: scaffold.scaffold(model, setup),
    "fednova": lambda config, model, setup, given: fednova.fednova(
        model, setup, momentum=config.momentum
    ),
    "feddip": lambda config, model, setup, given: recipes.dip(config, model, setup),
    "feddip_without_penalty": lambda config, model, setup, given: recipes.dip(
        config.model_copy(update={"max_penalty": 0.0}), model, setup
    ),
    "feddip_without_pruning": lambda config, model, setup, given: feddip.feddip_without_pruning(
        model, setup, max_penalty=config.max_penalty
    ),
    "fedtiny": lambda config, *run: fedtiny.build(recipes.tiny(config), task_of(config, *run)),
    "random_masks": lambda config, model, setup, given: fixed_masks.random_masks(
        model, setup, sparsity=config.sparsity, allocation=recipes.shares(config, model, given)
    ),
    "magnitude_masks": lambda config, model, setup, given: recipes.magnitude(
        config, model, setup, given, server_work.server_examples(given.held)
    ),
    "one_client_masks": lambda config, model, setup, given: recipes.magnitude(
        config, model, setup, given, server_work.examples_of(config.mask_client)
    ),
    "pooled_masks": lambda config, model, setup, given: recipes.magnitude(
        config, model, setup, given, server_work.all_examples()
    ),
    "snip_masks": recipes.snip,
    "snip_masks_of_clients": recipes.snip_of_clients,
    "gradual_magnitude": recipes.gradual,
    **explore_recipes.ALGORITHMS,
    **filter_recipes.ALGORITHMS,
    **gated_recipes.ALGORITHMS,
}

PARTITIONS: Mapping[str, Callable[[RunConfig, np.random.Generator, Any], list[Any]]] = {
    "iid": lambda config, rng, labels: partitions.iid(rng, labels, num_clients=config.num_clients),
    "stratified": lambda config, rng, labels: partitions.stratified(
        rng, labels, num_clients=config.num_clients
    ),
    "shards": lambda config, rng, labels: partitions.shards(
        rng,
        labels,
        num_clients=config.num_clients,
        classes_per_client=config.classes_per_client,
    ),
    "dirichlet": lambda config, rng, labels: partitions.dirichlet(
        rng,
        labels,
        num_clients=config.num_clients,
        alpha=config.alpha,
        min_size=config.min_client_size,
    ),
}

UPLINKS: Mapping[str, Callable[[RunConfig], Uplink]] = {
    "identity": lambda config: uplinks.identity(),
    "top_k": lambda config: uplinks.top_k(fraction=config.uplink_fraction),
    "random_k": lambda config: uplinks.random_k(fraction=config.uplink_fraction),
    "sign": lambda config: uplinks.sign(),
    "quantize": lambda config: uplinks.quantize(bits=config.uplink_bits_per_value),
}

AGGREGATORS: Mapping[str, Callable[[RunConfig], Aggregator | CohortAggregator]] = {
    "weighted_mean": lambda config: aggregators.weighted_mean(),
    "median": lambda config: aggregators.median(),
    "trimmed_mean": lambda config: aggregators.trimmed_mean(fraction=config.trim_fraction),
}

DRIFTS: Mapping[str, Callable[[RunConfig, Batcher], Correction | None]] = {
    "none": lambda config, batcher: None,
    "scaffold": lambda config, batcher: scaffold.control_variates(),
    "fednova": lambda config, batcher: fednova.normalized_averaging(
        batcher=batcher, momentum=config.momentum
    ),
}

SERVERS: Mapping[str, Callable[[RunConfig, float], optax.GradientTransformation]] = {
    "fedavg": lambda config, rate: server_optimizers.fedavg(learning_rate=rate),
    "fedavgm": lambda config, rate: server_optimizers.fedavgm(
        learning_rate=rate, momentum=config.server_momentum
    ),
    "fedadam": lambda config, rate: server_optimizers.fedadam(learning_rate=rate),
    "fedyogi": lambda config, rate: server_optimizers.fedyogi(learning_rate=rate),
}


def resolve(config: RunConfig) -> RunConfig:
    """Fill in what the machine decides, the devices; a chunk is at most the cohort.

    Raises:
      UserError: there are not so many devices.
    """
    devices = config.devices or (num_cores() if jax.default_backend() == "cpu" else INT_MAX)
    if min(config.devices, config.cohort_size) > jax.device_count():
        raise UserError(
            f"devices must be at most {jax.device_count()}, the number of "
            f"{jax.default_backend()} devices here, got {config.devices}."
        )
    devices = min(devices, config.cohort_size, jax.device_count())
    size = config.chunk_size
    size = size if size == "auto" else min(size, config.cohort_size)
    return config.model_copy(update={"chunk_size": size, "devices": devices})


def num_cores() -> int:
    """Count the cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def build(config: RunConfig, *, warn: chunk_size.WarnFn | None = None) -> loop.RunParts:
    """Put a run together: load the data, deal it out, make model and algorithm.

    No run folder is made, so that whatever is wrong is said before there is one.

    Args:
      config: of the run.
      warn: takes a sentence of the trial that chooses a chunk size ``"auto"``. Without it there is
        no trial, and clients train one by one.

    Raises:
      UserError: the data set is unknown or not prepared, the partition is impossible, the model
        does not fit the data, or the settings do not make a round.
    """
    config = resolve(config)
    try:
        dataset = datasets.load(config.dataset, data_dir=config.data_dir)
    except DataError as error:
        raise UserError(f"dataset: {error}") from None
    labels = np.asarray(dataset.train["labels"])
    held, rest = _hold_out(config, labels)
    rng = np.random.default_rng(config.seed)
    try:
        parts = PARTITIONS[config.partition](config, rng, labels[rest])
    except ValueError as error:
        raise UserError(
            f"partition {config.partition!r} of {config.dataset!r} over {config.num_clients} "
            f"clients is impossible: {error}"
        ) from None
    parts = [rest[part] for part in parts]
    sizes = np.array([len(part) for part in parts])
    _check_sizes(config, sizes)
    train_fn, test_fn = _preprocess(dataset, config)
    model = _model(config, dataset, test_fn)
    if complaint := recipes.emptied(config, model):
        raise UserError(complaint)
    given = recipes.Given(held=held, input_shape=dataset.input_shape, train=train_fn, test=test_fn)
    population = partitions.population(dataset.train, parts)
    test = TestSet(
        inputs=jnp.asarray(dataset.test["inputs"]), labels=jnp.asarray(dataset.test["labels"])
    )

    def assemble(config: RunConfig, chunk: chunk_size.Choice | None) -> loop.RunParts:
        algorithm = _algorithm(config, model, given)
        return loop.RunParts(
            model=model,
            algorithm=algorithm,
            population=population,
            test=test,
            preprocess=test_fn,
            advance=tuple(
                simulation.advance(stage, cohorts.draw(config, sizes, stage=stage.name))
                for stage in algorithm.stages
            ),
            prunable=recipes.reported(config),
            mesh=_mesh(config),
            chunk=chunk,
            task=dataset.task,
        )

    built = assemble(config, None)
    if config.chunk_size == "auto" and warn is not None:
        with _refusals(config):  # before the trial compiles anything
            loop.check_start(built)
        batcher, mesh = _batcher(config, train_fn), _mesh(config)
        chunk = chunk_trial.choose(config, model, batcher, population, mesh=mesh, warn=warn)
        built = assemble(config.model_copy(update={"chunk_size": chunk.size}), chunk)
    with _refusals(config):
        loop.check(built)
    return built


@contextlib.contextmanager
def _refusals(config: RunConfig) -> Iterator[None]:
    """Turn what components say of settings that do not fit into one sentence."""
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(
            f"the settings do not make a round of {config.algorithm!r} with {config.model!r} on "
            f"{config.dataset!r}: {_first_line(error)}"
        ) from None


def _hold_out(config: RunConfig, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Set the server's examples aside, where there are to be any: ``(held, rest)``."""
    if config.server_share is None and config.algorithm not in methods.AT_SERVER:
        return np.zeros(0, np.int32), np.arange(len(labels), dtype=np.int32)
    rng = np.random.default_rng([config.seed, 1])  # leaves the partition's draws as they were
    try:
        return splits.hold_out(rng, labels, share=config.server_share)
    except ValueError as error:
        raise UserError(f"server_share: {error}") from None


def _check_sizes(config: RunConfig, sizes: np.ndarray) -> None:
    """Refuse batches that nobody could fill, more local steps than an int32 counts, and none."""
    num_examples, largest = int(sizes.sum()), int(sizes.max())
    if config.batch_size > num_examples:
        raise UserError(
            f"batch_size must be at most the number of training examples ({num_examples}), "
            f"got {config.batch_size}."
        )
    if config.local_steps is None and config.local_epochs > INT_MAX // largest:
        raise UserError(
            f"local_epochs must be at most {INT_MAX // largest} for clients of up to {largest} "
            f"examples, got {config.local_epochs}."
        )
    if complaint := explore_recipes.complaint(config, largest):
        raise UserError(complaint)


def _first_line(error: Exception) -> str:
    """Shorten what an error says to one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _preprocess(dataset: datasets.Dataset, config: RunConfig) -> tuple[Any, Any]:
    """Choose what happens to images, in training and in tests."""
    if not config.normalize:
        dataset = dataset._replace(mean=None, std=None)
    return transforms.for_dataset(dataset, augment=config.augment)


def _model(config: RunConfig, dataset: datasets.Dataset, preprocess_fn: Any) -> Model:
    """Make the network, and see by shapes alone that it takes the data."""
    try:
        model = fitting.make_model(
            functools.partial(MODELS[config.model], config),
            dataset,
            preprocess=preprocess_fn,
            what=f"model {config.model!r}",
        )
    except ConfigError as error:
        raise UserError(str(error)) from None
    return precision.compute_in(model, config.compute_dtype)


def _algorithm(config: RunConfig, model: Model, given: recipes.Given) -> Algorithm:
    """Make the method and the protocol around it."""
    try:
        return ALGORITHMS[config.algorithm](config, model, _setup(config, given.train), given)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"algorithm {config.algorithm!r}: {_first_line(error)}") from None


def _setup(config: RunConfig, preprocess_fn: Any) -> Protocol:
    """Choose the protocol that every method shares."""
    uplink = UPLINKS[config.uplink](config)
    batcher = _batcher(config, preprocess_fn)
    return Protocol(
        num_rounds=config.rounds,
        batcher=batcher,
        optimizer=optax.chain(
            optax.add_decayed_weights(config.weight_decay)
            if config.weight_decay
            else optax.identity(),
            recipes.optimizer(config),
        ),
        learning_rate_scale=_learning_rate_scale(config),
        uplink=uplinks.error_feedback(uplink) if config.error_feedback else uplink,
        aggregator=AGGREGATORS[config.aggregator](config),
        server=SERVERS[config.server](config, config.server_learning_rate or 1.0),
        chunk_size=1 if config.chunk_size == "auto" else config.chunk_size,
        mesh=_mesh(config),
        correction=DRIFTS[config.drift](config, batcher),
    )


def _mesh(config: RunConfig) -> jax.sharding.Mesh | None:
    """Take the devices that the config wants; one device needs no mesh."""
    return cohort.make_mesh(devices=jax.devices()[: config.devices]) if config.devices > 1 else None


def _learning_rate_scale(config: RunConfig) -> Schedule:
    """Choose the factor on the learning rate, by round."""
    decay = optax.exponential_decay(1.0, 1, config.learning_rate_decay)
    return lambda round_index: jnp.asarray(decay(round_index), jnp.float32)


def _batcher(config: RunConfig, preprocess_fn: Any) -> Batcher:
    """Choose how much a client does in a round."""
    common = {"batch_size": config.batch_size, "preprocess": preprocess_fn}
    if config.local_steps is not None:
        return batching.steps(num_steps=config.local_steps, **common)
    return batching.epochs(num_epochs=config.local_epochs, **common)
