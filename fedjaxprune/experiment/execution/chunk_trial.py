"""Time local training with several clients side by side: the measured part of `chunk_size`.

A trial runs what a round runs, `cohort.run` of `local_training.local_sgd` on the run's own
examples, on all its devices; only the number of steps is small, and plain SGD stands for every
method.
"""

import json
import math
import os
import statistics
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fedjaxprune import __version__, trees
from fedjaxprune import masks as masks_lib
from fedjaxprune.costs import flops
from fedjaxprune.experiment.config.sections import RunConfig, plain
from fedjaxprune.experiment.execution import chunk_size, devices, memory
from fedjaxprune.experiment.run import composing
from fedjaxprune.federated import aggregators, cohort, local_training
from fedjaxprune.kernels import chosen, side_by_side
from fedjaxprune.models import ways
from fedjaxprune.rounds import facts as facts_lib
from fedjaxprune.rounds.task import Task
from fedjaxprune.types import Batcher, Broadcast, Cohort, Model, Population

MAX_STEPS = 10  # of a client in a trial
_REPEATS, _MIN_S = 5, 0.05  # timings, and the time that one should take
_LONG_S = 1.0  # a call that takes longer is timed twice more only
_ROOM = 0.8  # of the memory that is free: what a trial may take, as a round needs more
# A second of a processor's core, and of any other device; what a step takes besides.
_CPU_FLOPS, _OTHER_FLOPS, _STEP_S = 2e10, 5e12, 2e-4
_TRACE_S, _COMPILE_S = 1.0, 0.004  # of a trial, and of each line of a training step's program


class DoesNotFit(Exception):
    """A chunk needs more memory than there is."""


def choose(
    config: RunConfig,
    task: Task,
    population: Population,
    *,
    sizes: np.ndarray,
    warn: chunk_size.WarnFn,
) -> chunk_size.Choice:
    """Choose a run's chunk size by what was measured before, and a trial of the rest.

    The population holds at least the examples of a cohort of clients that have most of them; sizes
    ``[N]`` are those of all clients.
    """
    model, batcher, mesh = task.model, task.protocol.batcher, task.protocol.mesh
    work = chunk_size.Work(
        steps=chunk_size.local_steps(sizes, config),
        batch_size=config.client.batch_size,
        cohort_size=config.federation.cohort_size or 1,
        devices=1 if mesh is None else mesh.shape[cohort.AXIS],
        num_rounds=config.federation.num_rounds,
    )
    tried = ways_to_try(config, task, work)
    mine = devices.of_this_process(mesh)
    share = work._replace(devices=1 if mine is None else mine.shape[cohort.AXIS])

    def choose_with(way: side_by_side.Way | None) -> chunk_size.Choice:
        own = model if way is None else ways.convolve(model, way)
        measure_fn = measure(own, batcher, population, work=share, mesh=mine)

        def measure_all(size: int) -> float | None:
            """Measure on the devices of this process, which are alike those of the others."""
            rate = measure_fn(size)
            return None if rate is None else rate * work.devices / share.devices

        return chunk_size.auto(
            work,
            measure_all,
            key=key(config, task, work, way=way),
            estimate=lambda: estimate(model, batcher, population, work=work),
            warn=warn,
            share=chunk_size.SHARE / max(1, len(tried)),
        )

    if not tried:
        return choose_with(None)
    return chunk_size.fastest({way: choose_with(way) for way in tried})


def ways_to_try(
    config: RunConfig, task: Task, work: chunk_size.Work
) -> tuple[side_by_side.Way, ...]:
    """List the ways of convolving clients at once that a trial compares; none if it is one."""
    if (
        jax.default_backend() == "cpu"
        or config.execution.convolutions != "auto"
        or work.largest == 1
        or not facts_lib.has_convolutions(task.facts)
    ):
        return ()
    first = side_by_side.DEFAULT
    return (first, *(way for way in side_by_side.WAYS if way != first))


def estimate(
    model: Model, batcher: Batcher, population: Population, *, work: chunk_size.Work
) -> chunk_size.Estimate:
    """Estimate by arithmetic how long a run trains, and what the first size of a trial costs.

    The estimate of training is on the low side, so that a trial is begun only where it is worth its
    price. A network that cannot be counted may take any time.
    """
    batch = composing.batch_of(batcher, population)
    key = jax.random.key(0)
    params, state = jax.eval_shape(model.init, key)
    step = jax.make_jaxpr(jax.value_and_grad(model.loss, has_aux=True))(params, state, batch, key)
    step = chosen.opened(step, on_cpu=jax.default_backend() == "cpu")
    trial_s = _TRACE_S + _COMPILE_S * len(str(step).splitlines())
    try:
        count = flops.dense(flops.of_model(model, None, composing.rows(batch.inputs, 1)))
    except ValueError:
        return chunk_size.Estimate(math.inf, trial_s)
    speed = _CPU_FLOPS if jax.default_backend() == "cpu" else _OTHER_FLOPS
    arithmetic = flops.FLOPS_PER_MULTIPLY_ADD * sum(count) * work.num_examples / speed
    dispatch = _STEP_S * work.num_examples / work.batch_size
    return chunk_size.Estimate((arithmetic + dispatch) / work.devices, trial_s)


def measure(
    model: Model,
    batcher: Batcher,
    population: Population,
    *,
    work: chunk_size.Work,
    mesh: Mesh | None,
) -> chunk_size.MeasureFn:
    """Make ``chunk size -> examples per second``, on all devices of the mesh."""
    # Clients that take most steps; of those that take as many, the ones whose examples are here.
    held = np.diff(np.asarray(population.offsets))
    most = np.lexsort((-held, -work.steps)).astype(np.int32)
    by_field = {
        "delta": aggregators.weighted_mean(),
        "model_state": aggregators.weighted_mean(),
        "metrics": aggregators.unweighted_sum(),
    }

    def measure_fn(size: int) -> float | None:
        ids = most[: min(size * work.devices, most.size)]

        def play(key, broadcast, population, client_ids, steps):
            def update(key, given, state, data):
                broadcast, steps = given
                # A number of each client's own, as in a round: loops differ by it under vmap.
                few = batcher._replace(
                    num_steps=lambda data: jnp.where(data.size > 0, steps, jnp.zeros_like(steps))
                )
                client = local_training.local_sgd(
                    model.loss, batcher=few, optimizer=optax.sgd(1e-3)
                )
                return client.update(key, broadcast, state, data)

            present = jnp.ones(client_ids.shape, jnp.bool_)
            outcome = cohort.run(
                key,
                update,
                by_field,
                (broadcast, steps),
                Cohort(client_ids=client_ids, participated=present, states=()),
                population,
                chunk_size=size,
                mesh=mesh,
            )
            return outcome.fields["delta"]

        key = jax.random.key(0)
        params, state = _some(jax.eval_shape(model.init, key))
        broadcast = Broadcast(
            params=params, masks=masks_lib.full(params), model_state=state, round=jnp.int32(0)
        )
        given = [key, broadcast, population, jnp.asarray(ids)]
        try:
            seconds = _time(play, given, num_steps(work), mesh)
        except DoesNotFit:
            return None
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None
        return ids.size * work.batch_size / seconds

    return measure_fn


def _time(play: Any, given: list[Any], most: int, mesh: Mesh | None) -> float:
    """Time one step of the clients of a chunk, all devices at work: the median, seconds."""
    one, many = jnp.int32(1), jnp.int32(most)
    if mesh is not None:
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        given, one, many = jax.device_put((given, one, many), everywhere)
    compiled = jax.jit(play).lower(*given, one).compile()
    needed = compiled.memory_analysis()
    room = memory.free_bytes()
    if needed is not None and room is not None:
        # By device; the devices of a CPU share its memory.
        shared = mesh.size if mesh is not None and jax.default_backend() == "cpu" else 1
        total = needed.temp_size_in_bytes + needed.output_size_in_bytes
        if total * shared > _ROOM * room:
            raise DoesNotFit

    def call(steps: jax.Array, times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            jax.block_until_ready(compiled(*given, steps))
        return (time.perf_counter() - begin) / times

    call(one, 1)  # warms up
    once = call(one, 1)
    if once * most > _LONG_S:
        steps, count, repeats = one, 1, 2 if once > _LONG_S else _REPEATS
    else:
        steps, count, repeats = many, most, _REPEATS
    times = max(1, min(100, round(_MIN_S / (once * count))))
    return statistics.median([call(steps, times) for _ in range(repeats)]) / count


def _some(shapes: Any) -> Any:
    """Fill shapes with ordinary numbers: what they are does not matter to the time."""
    rng = np.random.default_rng(0)

    def fill(path: str, leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        values = 0.05 * rng.standard_normal(leaf.shape) if path.startswith("0") else 1.0
        return jnp.asarray(np.broadcast_to(values, leaf.shape), leaf.dtype)

    return trees.map_with_path(fill, shapes)


def key(
    config: RunConfig,
    task: Task,
    work: chunk_size.Work,
    *,
    way: side_by_side.Way | None = None,
) -> str:
    """Name what the figures of a run's trial depend on: what a trained example costs, and where."""
    device, values = jax.devices()[0], plain(config)
    shapes = [(str(leaf.dtype), leaf.shape) for leaf in jax.tree.leaves(task.facts.params)]
    about = {
        "model": values["model"],
        "parameters": zlib.crc32(str(shapes).encode()),
        "inputs": str(task.facts.inputs),
        "augment": config.data.augment,
        "normalize": config.data.normalize,
        "batch_size": work.batch_size,
        "compute_dtype": config.execution.compute_dtype,
        "convolutions": way or config.execution.convolutions,
        "steps": num_steps(work),
        "devices": f"{work.devices} {device.platform} {device.device_kind}",
        "processor": f"{os.cpu_count()} {devices.processor()}",
        "jax": jax.__version__,
        "fedjaxprune": __version__,
    }
    return json.dumps(about, sort_keys=True)


def num_steps(work: chunk_size.Work) -> int:
    """Choose the steps of a client in a trial: as many as in a round, but few."""
    return min(MAX_STEPS, max(1, round(float(np.mean(work.steps)))))
