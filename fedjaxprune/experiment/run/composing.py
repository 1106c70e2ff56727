"""What runs are composed of: batches, tasks, cohorts, and networks that fit their data."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import registry, trees
from fedjaxprune.data import batching, stores, transforms
from fedjaxprune.data.datasets import Dataset
from fedjaxprune.errors import ConfigError, first_line
from fedjaxprune.experiment.config.sections import RunConfig
from fedjaxprune.federated import populations, sampling
from fedjaxprune.federated.sampling import SamplingFn
from fedjaxprune.models import heads, outside, parameters
from fedjaxprune.rounds import facts
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.rounds.task import BatchesFn, Task
from fedjaxprune.types import Batcher, Model, Population, Stage, client_data

# What a key is for: numbers folded into the seed's key, so that none is used twice.
INIT, ROUNDS, COHORT, VALIDATION = range(4)


def rows(tree: Any, number: int) -> Any:
    """Give the shapes of that many rows of a tree of arrays."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((number, *leaf.shape[1:]), leaf.dtype)

    return jax.tree.map(shape, tree)


def batch_of(batcher: Batcher, population: Population) -> Any:
    """Give the shapes of a client's batch."""

    def batch(key, population):
        return batcher.batch(key, client_data(population, jnp.int32(0)), jnp.int32(0))

    return jax.eval_shape(batch, jax.random.key(0), population)


def batches_of(
    *, batch_size: int, train: transforms.Preprocess, test: transforms.Preprocess, seed: int
) -> BatchesFn:
    """Make local steps beside those of the protocol, as `Task.batches`."""

    def batches(*, epochs=1, examples="all", share=0.1, augment=True) -> Batcher:
        preprocess = train if augment else test
        common: dict[str, Any] = {"batch_size": batch_size, "preprocess": preprocess}
        if examples == "all":
            return batching.epochs(num_epochs=epochs, **common)
        make = {"validation": batching.development, "training": batching.undeveloped}[examples]
        key = jax.random.fold_in(jax.random.key(seed), VALIDATION)
        return make(key, share=share, **common)

    return batches


def task(
    model: Model,
    population: Population,
    protocol: Protocol,
    *,
    batch_size: int = 16,
    preprocess: transforms.Preprocess | None = None,
    num_epochs: int = 1,
) -> Task:
    """Make a method's `Task` of a network, clients' examples and a protocol of one's own.

    Args:
      model: a `Model`.
      population: a `Population`.
      protocol: a `Protocol`.
      batch_size: of the local steps that a method makes beside those of the protocol.
      preprocess: ``(key, inputs) -> inputs`` of these; None takes them as stored.
      num_epochs: passes over its examples that a client makes in a round.

    Raises:
      ValueError: the protocol's batcher gives weights, or a number of steps, below 0.
    """
    prepare = preprocess or transforms.chain()
    sizes = np.diff(np.asarray(population.offsets))
    two = rows(batch_of(protocol.batcher, population).inputs, 2)
    _check_batcher(protocol.batcher, population, client=int(sizes.argmax()))
    return Task(
        model=model,
        protocol=protocol,
        facts=facts.of_model(model, inputs=two),
        batches=batches_of(batch_size=batch_size, train=prepare, test=prepare, seed=0),
        num_clients=len(sizes),
        largest_client=int(sizes.max()),
        num_server_examples=populations.num_held(population),
        num_epochs=num_epochs,
    )


def _check_batcher(batcher: Batcher, population: Population, *, client: int) -> None:
    """Look at the number of steps of one client, and at the weights of its first and last batch."""

    @jax.jit
    def look(key, population):
        data = client_data(population, jnp.int32(client))
        num_steps = batcher.num_steps(data)
        last = jnp.maximum(num_steps - 1, 0)
        return num_steps, [batcher.batch(key, data, step).weights for step in (jnp.int32(0), last)]

    num_steps, weights = look(jax.random.key(0), population)
    if num_steps < 0:
        raise ValueError(
            f"the batcher must take no fewer than 0 local steps, got {num_steps} for client "
            f"{client}."
        )
    for which, found in zip(("first", "last"), weights, strict=True):
        if not np.all(np.asarray(found) >= 0):
            raise ValueError(
                "the batcher must give each example of a batch a weight of at least 0, which marks "
                f"filling, got {np.min(np.asarray(found))} in the {which} batch of client {client}."
            )


def make_model(
    build: Callable[..., Any], dataset: Dataset, *, preprocess: Callable[[Any, Any], Any], what: str
) -> Model:
    """Call a model's `build` for a data set, and give the model the loss of the data's task."""
    try:
        return _make(build, dataset, preprocess)
    except (ValueError, TypeError) as error:
        names = _fitting(dataset, preprocess)
        others = f"; built-in models that fit: {', '.join(names)}." if names else ""
        said = first_line(error).rstrip("." if names else "")
        raise ConfigError(
            f"{what} does not fit the data set {dataset.name!r} ({_in_words(dataset)}): "
            f"{said}{others}"
        ) from None


def _make(
    build: Callable[..., Any], dataset: Dataset, preprocess: Callable[[Any, Any], Any]
) -> Model:
    key = jax.random.key(0)
    inputs = jax.eval_shape(preprocess, key, rows(dataset.test["inputs"], 1))
    made = build(input_shape=dataset.input_shape, num_classes=dataset.num_outputs)
    model = outside.as_model(made, input_shape=dataset.input_shape, input_dtype=inputs.dtype)
    model = heads.for_task(model, dataset.task)
    params, state = jax.eval_shape(model.init, key)
    parameters.check(params, state)
    if dataset.task == "sequence":
        _check_vocabulary(params, dataset)
    output = jax.eval_shape(model.predict, params, state, inputs)
    wanted = (1, *positions(dataset), dataset.num_outputs)
    if not hasattr(output, "shape"):
        raise ValueError(f"its output is a {type(output).__name__}, and needed is one array.")
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise ValueError(f"its output is {output.dtype}, and needed are real numbers.")
    if output.shape != wanted:
        each = "position" if positions(dataset) else "example"
        raise ValueError(
            f"its output has the shape {output.shape}, and needed is {wanted}: "
            f"{dataset.num_outputs} for each {each}, which has one label."
        )
    return model


def _check_vocabulary(params: Any, dataset: Dataset) -> None:
    """Refuse tokens that no embedding has a row for, as JAX would read its last row for them."""
    size = _num_tokens(params)
    largest = max(int(split["inputs"].max(initial=0)) for split in (dataset.train, dataset.test))
    if size is not None and size <= largest:
        raise ValueError(
            f"its embedding has {size} rows, and the tokens reach {largest}: they must be "
            f"less than {size}."
        )


def _num_tokens(params: Any) -> int | None:
    """Count the rows of a network's largest embedding; None where it has none."""
    leaves = zip(trees.paths(params), jax.tree.leaves(params), strict=True)
    tables = ("embedding", "embedding/kernel")
    return max((leaf.shape[0] for path, leaf in leaves if path.endswith(tables)), default=None)


def with_known_tokens(dataset: Dataset, model: Model) -> Dataset:
    """Let a client store refuse tokens that the network has no row for when they are fetched."""
    size = _num_tokens(jax.eval_shape(model.init, jax.random.key(0))[0])
    if dataset.clients is None or dataset.task != "sequence" or size is None:
        return dataset
    return dataset._replace(clients=stores.of_tokens(dataset.clients, below=size))


def _fitting(dataset: Dataset, preprocess: Callable[[Any, Any], Any]) -> list[str]:
    """List the built-in models that read a data set, unless it is of images, which takes long."""
    names = []
    for name, listed in registry.names("model").items():
        if len(dataset.input_shape) == 1 and listed.origin.source == "built-in":
            part = registry.find("model", name).part
            with contextlib.suppress(ValueError, TypeError):
                _make(functools.partial(part.build, part.settings()), dataset, preprocess)
                names.append(name)
    return names


def _in_words(dataset: Dataset) -> str:
    """Say what a data set's examples are, such as ``"images (28, 28, 1), classification"``."""
    shape = tuple(dataset.input_shape)
    what = "images" if len(shape) == 3 else "examples"
    what = "tokens" if dataset.task == "sequence" else what
    return f"{what} {shape}, {dataset.task}"


def positions(dataset: Dataset) -> tuple[int, ...]:
    """Give the axis of positions of a sequence that has a label at each; else nothing."""
    return np.shape(dataset.test["labels"])[1:] if dataset.task == "sequence" else ()


def cohorts_of(stage: Stage, config: RunConfig, sizes: np.ndarray) -> SamplingFn:
    """Choose how the cohorts of a stage are drawn; whoever is drawn may drop out."""
    section, number = config.federation, len(sizes)
    if stage.cohort == "population":
        return sampling.all_clients(num_clients=number)
    if stage.cohort == "everyone":
        chosen = sampling.all_clients(num_clients=number)
    elif isinstance(stage.cohort, int):
        chosen = sampling.uniform(num_clients=number, cohort_size=stage.cohort)
    else:
        build = config.parts.sampling.part.build
        chosen = build(
            section.sampling, num_clients=number, cohort_size=section.cohort_size, sizes=sizes
        )
    if section.dropout_rate:
        chosen = sampling.with_dropout(chosen, probability=section.dropout_rate)
    if stage.cohort == "same":
        key = jax.random.fold_in(jax.random.key(config.seed), COHORT)
        chosen = sampling.same_every_round(key, chosen)
    return chosen
