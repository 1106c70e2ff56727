"""From a config to a run: data, clients, network, protocol and method, put together once.

Every component is built by the part that the config names; no part is known here by its name.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fedjaxprune import live_weights, trees
from fedjaxprune import masks as masks_lib
from fedjaxprune.costs import hardware as hardware_lib
from fedjaxprune.data import batching, transforms
from fedjaxprune.data.datasets import Dataset
from fedjaxprune.errors import ConfigError, first_line
from fedjaxprune.experiment.config import resolve as resolve_lib
from fedjaxprune.experiment.config.sections import RunConfig
from fedjaxprune.experiment.execution import chunk_size, chunk_trial, devices, last_words
from fedjaxprune.experiment.execution import processes as processes_lib
from fedjaxprune.experiment.execution.processes import ALONE, Processes
from fedjaxprune.experiment.feeding import feed as feed_lib
from fedjaxprune.experiment.feeding.places import Places
from fedjaxprune.experiment.folder import network as network_lib
from fedjaxprune.experiment.folder.network import Network
from fedjaxprune.experiment.run import composing, fed, loop
from fedjaxprune.experiment.run import examples as examples_lib
from fedjaxprune.experiment.run.evaluation import TestSet
from fedjaxprune.experiment.run.examples import Examples
from fedjaxprune.federated import aggregators, attacks, cohort, penalties, uplinks
from fedjaxprune.method import needs_of
from fedjaxprune.models import precision, ways
from fedjaxprune.rounds import controls, simulation
from fedjaxprune.rounds import facts as facts_lib
from fedjaxprune.rounds import stages as stages_lib
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.rounds.task import Task
from fedjaxprune.settings import INT_MAX
from fedjaxprune.types import Algorithm, CohortAggregator, Model

_NEEDS = {
    "batch_norm": (facts_lib.has_batch_norm, "BatchNorm statistics"),
    "convolutions": (facts_lib.has_convolutions, "convolutions"),
    "gates": (facts_lib.has_gates, "gates"),
    "products": (facts_lib.has_kernels, "kernels"),
}
_HOSTILE, _HARDWARE = 2, 3  # beside a seed: draws of their own
_SECTIONS = tuple(f"{name}." for name in RunConfig.model_fields)


def build(
    config: RunConfig,
    *,
    warn: chunk_size.WarnFn | None = None,
    processes: Processes = ALONE,
) -> loop.RunParts:
    """Put a run together.

    No run folder is made, so that whatever is wrong is said before there is one. Without `warn`
    there is no trial of a chunk size ``"auto"``, and clients train one by one. Of several processes
    the first makes the trial, on its own devices.
    """
    config = devices.resolve(config)
    examples = examples_lib.read(config)
    config = resolve_lib.replace(config, {"data.num_clients": len(examples.sizes)})
    _check_sizes(config, examples.sizes)
    model = make_model(config, examples.dataset, examples.test)
    known = composing.with_known_tokens(examples.dataset, model)
    examples = examples._replace(dataset=known)
    size = config.execution.chunk_size
    task = make_task(config, model, examples, chunk=1 if size == "auto" else size)
    check_needs(config, task)
    algorithm = make_algorithm(config, task)
    with _refusals(_no_round(config)):
        places = fed.place(config, model, algorithm, examples)
    # Of several processes the first decides, by the memory that is free there.
    places = Places(*processes_lib.decided(processes, lambda: places))
    config = resolve_lib.replace(
        config, {"execution.examples": places.examples, "execution.client_rows": places.rows}
    )
    if places.examples == "device":
        examples = examples._replace(population=jax.tree.map(jnp.asarray, examples.population))
    chunk = None
    if size == "auto" and warn is not None:
        with _refusals(_no_round(config)):  # before the trial compiles anything
            loop.check_start(_parts(config, task, algorithm, examples))
        if processes.is_first:
            alone = processes.number == 1
            people = fed.for_trial(config, examples)
            with contextlib.nullcontext() if alone else last_words.without_stdout():  # gloo writes
                chunk = chunk_trial.choose(config, task, people, sizes=examples.sizes, warn=warn)
        size, way = processes_lib.decided(processes, lambda: chunk and (chunk.size, chunk.way))
        config = resolve_lib.replace(config, {"execution.chunk_size": size})
        if way is not None:
            config = resolve_lib.replace(config, {"execution.convolutions": way})
            task = task._replace(model=ways.convolve(task.model, way))
        if size > 1:
            protocol = task.protocol._replace(chunk_size=size)
            task = task._replace(protocol=protocol)
            algorithm = make_algorithm(config, task)
    parts = _parts(config, task, algorithm, examples)
    parts = parts._replace(chunk=chunk, places=places.sentence)
    with _refusals(_no_round(config)):
        loop.check(parts)
    return parts


def _parts(
    config: RunConfig, task: Task, algorithm: Algorithm, examples: Examples
) -> loop.RunParts:
    dataset, stages = examples.dataset, algorithm.stages
    with _refusals(_no_round(config)):
        draws = tuple(composing.cohorts_of(stage, config, examples.sizes) for stage in stages)
        feed = fed.feed(config, algorithm, examples, draws, task.protocol.mesh)
        if feed is None:
            advance = tuple(map(simulation.advance, stages, draws))
        else:
            mesh = task.protocol.mesh
            advance = tuple(feed_lib.advance(one, rows=feed.rows, mesh=mesh) for one in stages)
    return loop.RunParts(
        config=config,
        model=task.model,
        algorithm=algorithm,
        population=examples.population,
        test=TestSet(
            inputs=jnp.asarray(dataset.test["inputs"]), labels=jnp.asarray(dataset.test["labels"])
        ),
        preprocess=examples.test,
        advance=advance,
        network=describe_network(config, task, algorithm, examples),
        task=dataset.task,
        mesh=task.protocol.mesh,
        hardware=_hardware(config, len(examples.sizes)),
        feed=feed,
    )


def _check_sizes(config: RunConfig, sizes: np.ndarray) -> None:
    """Refuse batches that nobody could fill, and more local steps than an int32 counts."""
    num_examples, largest = int(sizes.sum()), int(sizes.max())
    section = config.client
    if section.batch_size > num_examples:
        raise ConfigError(
            f"client.batch_size must be at most the number of training examples ({num_examples}), "
            f"got {section.batch_size}."
        )
    if section.steps is None and section.epochs > INT_MAX // largest:
        raise ConfigError(
            f"client.epochs must be at most {INT_MAX // largest} for clients of up to {largest} "
            f"examples, got {section.epochs}."
        )


def make_model(config: RunConfig, dataset: Dataset, preprocess: transforms.Preprocess) -> Model:
    """Build the network, and see by shapes alone that it reads the data."""
    make = functools.partial(config.parts.model.part.build, config.model)
    what = f"model {config.model.name!r}"
    model = composing.make_model(make, dataset, preprocess=preprocess, what=what)
    model = precision.compute_in(model, config.execution.compute_dtype)
    way = config.execution.convolutions
    return model if way == "auto" else ways.convolve(model, way)


def make_task(config: RunConfig, model: Model, given: Examples, *, chunk: int) -> Task:
    """Make what the method's `build` is given."""
    two = composing.rows(given.dataset.train["inputs"], 2)
    section = config.client
    return Task(
        model=model,
        protocol=make_protocol(config, given, chunk=chunk),
        facts=facts_lib.of_model(model, inputs=jax.eval_shape(given.test, jax.random.key(0), two)),
        batches=composing.batches_of(
            batch_size=section.batch_size, train=given.train, test=given.test, seed=config.seed
        ),
        num_clients=len(given.sizes),
        largest_client=int(given.sizes.max()),
        num_server_examples=len(given.held),
        num_epochs=1 if section.steps is not None else section.epochs,
        penalties=(penalties.proximal(mu=section.proximal_mu),) if section.proximal_mu else (),
        cohort_size=config.federation.cohort_size or 0,
        examples_per_round=(section.steps or 0) * section.batch_size,
    )


def make_protocol(config: RunConfig, given: Examples, *, chunk: int) -> Protocol:
    """Build the protocol that every method shares."""
    parts, section = config.parts, config.client
    common: dict[str, Any] = {"batch_size": section.batch_size, "preprocess": given.train}
    if section.steps is None:
        batcher = batching.epochs(num_epochs=section.epochs, **common)
    else:
        batcher = batching.steps(num_steps=section.steps, **common)
    with _refusals(""):
        uplink = parts.uplink.part.build(config.uplink)
        if size := config.uplink.whole_below:
            uplink = uplinks.except_small(uplink, fewer_than=size)
        decay = optax.exponential_decay(1.0, 1, section.learning_rate_decay)
        number = int(config.execution.devices)  # resolved: "auto" became a number
        return Protocol(
            num_rounds=config.federation.num_rounds,
            batcher=batcher,
            optimizer=parts.optimizer.part.build(section.optimizer),
            learning_rate_scale=lambda index: jnp.asarray(decay(index), jnp.float32),
            uplink=uplinks.error_feedback(uplink) if config.uplink.error_feedback else uplink,
            aggregator=_aggregator(config, given),
            server=parts.server_optimizer.part.build(config.server.optimizer),
            chunk_size=chunk,
            mesh=_mesh(number, model_devices=config.execution.model_devices),
            correction=parts.correction.part.build(
                section.correction, batcher=batcher, optimizer_settings=section.optimizer
            ),
            attackers=_attackers(config, given),
            clip=config.server.clip,
            max_weight=config.server.max_weight,
            downlink=parts.downlink.part.build(config.downlink),
        )


def _mesh(number: int, *, model_devices: int) -> Mesh | None:
    """Make the mesh of so many devices; None for one, where XLA needs none."""
    if number == 1:
        return None
    return cohort.make_mesh(devices=devices.chosen(number), model_devices=model_devices)


def _aggregator(config: RunConfig, given: Examples) -> Any:
    """Build the aggregator, and see that the server holds examples if it asks for any."""
    made = config.parts.aggregator.part.build(config.server.aggregator)
    if isinstance(made, aggregators.ServerAggregator) and len(given.held) == 0:
        raise ConfigError(
            f"server.aggregator {config.server.aggregator.name!r} compares messages with what the "
            "server computes on examples of its own: set server.data_fraction."
        )
    return made


def _attackers(config: RunConfig, given: Examples) -> attacks.Attackers | None:
    """Build the attack, and draw the hostile clients."""
    section = config.federation
    attack = config.parts.attack.part.build(section.attack, num_classes=given.dataset.num_classes)
    if attack is None:
        return None
    rng = np.random.default_rng([config.seed, _HOSTILE])
    fraction = 0.2 if section.hostile_fraction is None else section.hostile_fraction
    chosen = attacks.choose(rng, num_clients=len(given.sizes), fraction=fraction)
    return attacks.Attackers(attack=attack, client_ids=chosen)


def _hardware(config: RunConfig, num_clients: int) -> hardware_lib.Hardware | None:
    """Draw the clients' devices."""
    section = config.client.hardware
    rng = np.random.default_rng([config.seed, _HARDWARE])
    with _refusals(f"client.hardware {section.name!r}: "):
        made = config.parts.hardware.part.build(section, num_clients=num_clients, rng=rng)
        return None if made is None else hardware_lib.check(made, num_clients)


def check_needs(config: RunConfig, task: Task) -> None:
    """See that the network has what the method needs."""
    needs = needs_of(config.parts.method.part, config.method)
    for name, (has, words) in _NEEDS.items():
        if getattr(needs, name) and not has(task.facts):
            raise ConfigError(
                f"method {config.method.name!r} needs {words}, and the network "
                f"{config.model.name!r} has none."
            )


def make_algorithm(config: RunConfig, task: Task) -> Algorithm:
    """Build the method."""
    with _refusals(f"method {config.method.name!r}: "):
        algorithm = config.parts.method.part.build(config.method, task)
    if not isinstance(algorithm, Algorithm):
        raise ConfigError(
            f"method {config.method.name!r} must build an Algorithm, got "
            f"{type(algorithm).__name__}."
        )
    rule = task.protocol.aggregator
    said = rule.note(task.cohort_size) if isinstance(rule, CohortAggregator) else ""
    if said:
        algorithm = algorithm._replace(notes=(*algorithm.notes, said))
    algorithm = _control(config, task, algorithm)
    has_masks = live_weights.are_in(task.facts.state)
    return stages_lib.telling_masks(algorithm) if has_masks else algorithm


def _control(config: RunConfig, task: Task, algorithm: Algorithm) -> Algorithm:
    """Put the control that is asked for around a method."""
    if config.federation.control == "none":
        return algorithm
    if config.federation.control == "reinitialize":
        return controls.reinitialized(algorithm, task)
    key = jax.random.fold_in(jax.random.key(config.seed), composing.INIT)
    return controls.shuffled(algorithm, task, initial=lambda: task.model.init(key))


def describe_network(
    config: RunConfig, task: Task, algorithm: Algorithm, examples: Examples
) -> Network:
    """Write down what a run folder keeps of its network and data."""
    dataset = examples.dataset
    facts, inputs = task.facts, dataset.train["inputs"]
    paths = trees.paths(facts.params)
    flags = masks_lib.prunable_leaves(facts.params, algorithm.counted or algorithm.prunable)
    normalizes = dataset.mean is not None and dataset.std is not None
    return Network(
        task=dataset.task,
        input_shape=tuple(inputs.shape[1:]),
        input_dtype=str(inputs.dtype),
        num_outputs=dataset.num_outputs,
        num_classes=dataset.num_classes,
        positions=composing.positions(dataset),
        max_value=dataset.max_value,
        mean=tuple(map(float, dataset.mean or ())) if normalizes else None,
        std=tuple(map(float, dataset.std or ())) if normalizes else None,
        params=network_lib.shapes(facts.params),
        state=network_lib.shapes(facts.state),
        prunable=tuple(path for path, flag in zip(paths, flags, strict=True) if flag),
        data_checksum=examples_lib.checksum(dataset),
        population_checksum=examples_lib.checksum_of_all(examples),
        class_names=tuple(map(str, dataset.class_names)),
    )


@contextlib.contextmanager
def _refusals(start: str) -> Iterator[None]:
    """Turn what components say of settings that do not fit into one sentence."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        said = first_line(error)
        raise ConfigError(said if said.startswith(_SECTIONS) else start + said) from None


def _no_round(config: RunConfig) -> str:
    return (
        f"the settings do not make a round of {config.method.name!r} with {config.model.name!r} on "
        f"{config.data.dataset.name!r}: "
    )
