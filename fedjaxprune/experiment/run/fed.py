"""What a run's rounds are fed, and where its examples and rows are."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedjaxprune.data import stores
from fedjaxprune.experiment.config import resolve
from fedjaxprune.experiment.config.sections import RunConfig
from fedjaxprune.experiment.execution import placing as placing_lib
from fedjaxprune.experiment.feeding import places, rows
from fedjaxprune.experiment.feeding.feed import Feed
from fedjaxprune.experiment.run.examples import Examples
from fedjaxprune.federated import cohort, sampling
from fedjaxprune.federated.sampling import SamplingFn
from fedjaxprune.rounds import feeding, simulation
from fedjaxprune.types import Algorithm, Model, Population


def place(
    config: RunConfig, model: Model, algorithm: Algorithm, examples: Examples
) -> places.Places:
    """Choose where examples and rows are, by their sizes."""
    number = stores.num_bytes(_store(examples), int(examples.sizes.sum()))
    if examples.dataset.clients is not None:
        config = resolve.replace(config, {"execution.examples": "host"})
    sizes = places.Sizes(number, len(examples.sizes) * rows.num_bytes(_row(model, algorithm)))
    return places.choose(config, sizes)


def for_trial(config: RunConfig, examples: Examples) -> Population:
    """Put examples on the device: all, or those of a cohort of clients that have most of them."""
    people = examples.population
    if config.execution.examples == "host":
        size = config.federation.cohort_size or 1
        pantry = feeding.stock(_store(examples), cohort_size=size)
        most = np.argsort(-examples.sizes, kind="stable")[:size]
        people = feeding.population(pantry, most)
    return jax.tree.map(jnp.asarray, people)


def feed(
    config: RunConfig,
    algorithm: Algorithm,
    examples: Examples,
    draws: Sequence[SamplingFn],
    mesh: Mesh | None,
) -> Feed | None:
    """Say what the rounds of a run are fed; None where all is on the device.

    Each device is given the examples of the clients that it trains, and each process fetches those
    for its own devices.
    """
    section = config.execution
    if section.examples == section.client_rows == "device":
        return None
    number = len(examples.sizes)
    key = jax.random.key(0)
    drawn = [simulation.drawing(draw, num_clients=number) for draw in draws]
    sizes = [jax.eval_shape(draw, key, jnp.int32(0))[0].shape[0] for draw in drawn]
    pantries = None
    if section.examples == "host":
        store = _store(examples)
        own = [0] if mesh is None else placing_lib.own_parts(mesh)
        here = len(own) if jax.default_backend() == "cpu" else 1  # devices that share its memory
        pantries = tuple(
            feeding.stock(
                store,
                cohort_size=size,
                reads=stage.reads,
                held=examples.population.held,
                num_parts=_num_parts(mesh, draw),
            )
            for stage, draw, size in zip(algorithm.stages, draws, sizes, strict=True)
        )
        for stage, pantry in zip(algorithm.stages, pantries, strict=True):
            needed = here * stores.num_bytes(store, pantry.part_capacity)
            places.check_round(config, stage.name, needed)
    slots = sum(
        stage.num_rounds * size for stage, size in zip(algorithm.stages, sizes, strict=True)
    )
    return Feed(tuple(drawn), tuple(sizes), pantries, section.client_rows, min(number, slots))


def _num_parts(mesh: Mesh | None, draw: SamplingFn) -> int:
    """Count the parts that examples are in: one for each device, if no client is drawn twice."""
    if mesh is None or cohort.MODEL_AXIS in mesh.axis_names:
        return 1
    # A function of one's own may draw a client twice; several processes have no other way.
    if sampling.num_clients_of(draw) is None and not placing_lib.is_shared(mesh):
        return 1
    return mesh.shape[cohort.AXIS]


def _store(examples: Examples) -> stores.ClientStore:
    if examples.dataset.clients is not None:
        return examples.dataset.clients
    people = examples.population
    return stores.of_arrays(people.examples, np.asarray(people.order), np.asarray(people.offsets))


def _row(model: Model, algorithm: Algorithm):
    """Give the shapes of a client's row."""
    params, _ = jax.eval_shape(model.init, jax.random.key(0))  # which has been traced
    return jax.eval_shape(algorithm.init_client, params)
