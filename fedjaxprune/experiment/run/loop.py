"""Run an algorithm round by round: draw the cohort, call the compiled round, test, record, save.

One jitted step runs a round; the state and all clients' states are donated to it, so they live
once. The host reads metrics only, one round behind the device.
All randomness comes from the seed and the number of the round: a resumed run needs no key.
"""

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedjaxprune.costs.hardware import Hardware
from fedjaxprune.errors import ConfigError, RunFolderError
from fedjaxprune.experiment.config import files
from fedjaxprune.experiment.config.sections import RunConfig
from fedjaxprune.experiment.execution import chunk_size, joining, placing
from fedjaxprune.experiment.execution import processes as processes_lib
from fedjaxprune.experiment.execution.processes import ALONE, Processes
from fedjaxprune.experiment.feeding import feed as feed_lib
from fedjaxprune.experiment.feeding import feeder as feeding
from fedjaxprune.experiment.feeding.feed import Feed
from fedjaxprune.experiment.feeding.homes import Home
from fedjaxprune.experiment.folder import checkpoints, layout, record
from fedjaxprune.experiment.folder.network import Network
from fedjaxprune.experiment.run import composing, evaluation, round_record
from fedjaxprune.experiment.run.evaluation import TestSet
from fedjaxprune.experiment.run.listener import Listener
from fedjaxprune.models import parameters
from fedjaxprune.rounds import simulation
from fedjaxprune.rounds.simulation import Simulation
from fedjaxprune.settings import INT_MAX
from fedjaxprune.types import Algorithm, Key, Model, Params, Population, RoundMetrics, RoundState

AdvanceFn = Callable[[Key, Simulation, Population], tuple[Simulation, RoundMetrics]]


class RunParts(NamedTuple):
    """What a run is put together from."""

    config: RunConfig  # of the run, with its devices, chunk size and number of clients
    model: Model
    algorithm: Algorithm
    population: Population
    test: TestSet
    preprocess: Callable[[Key, Any], Any]  # ``(key, inputs) -> inputs`` for tests
    # for each stage the function that runs one of its rounds (`simulation.advance`)
    advance: tuple[AdvanceFn, ...]
    network: Network  # what the run folder keeps of the network
    task: str = "classification"  # what the labels are, as `Dataset.task`
    mesh: Mesh | None = None  # the devices that share a cohort; None for one device
    # how many clients a device trains at once, if that was left to a trial
    chunk: chunk_size.Choice | None = None
    hardware: Hardware | None = None  # the clients' devices; None where times are not modeled
    feed: Feed | None = None  # what rounds are fed, where not everything is on the device
    places: str = ""  # a sentence about what is not

    @property
    def num_rounds(self) -> int:
        """Rounds of all stages."""
        return sum(stage.num_rounds for stage in self.algorithm.stages)


def train(
    parts: RunParts,
    *,
    folder: pathlib.Path,
    listener: Listener,
    stop: Callable[[], bool] = lambda: False,
    allow: Collection[str] = (),
    processes: Processes = ALONE,
) -> RoundState:
    """Run all rounds that the folder does not hold yet, and return the final state.

    A folder with checkpoints continues from the newest one that is whole, to the same bits as if it
    had never stopped; the record is cut to that round.

    Args:
      parts: of the run.
      folder: of the run.
      listener: receives its events.
      stop: asked once a round: whether to save a checkpoint after it and return.
      allow: with `checkpoints.RESTART` a run starts again at round 1 if what was saved cannot be
        read.
      processes: that run it together; process 0 alone reads and writes the folder.

    Raises:
      RunFolderError: no checkpoint can be used, or the newest one is another run's.
    """
    algorithm, config = parts.algorithm, parts.config
    joining.connect(processes, parts.mesh)
    key = jax.random.key(config.seed)
    rounds_key = jax.random.fold_in(key, composing.ROUNDS)
    begin, shapes = _beginning(parts, jax.random.fold_in(key, composing.INIT))
    people = feeding.on_device(parts.feed, parts.population)
    rounds_key, people, test = placing.place((rounds_key, people, parts.test), parts.mesh)
    where = placing.of_simulation(shapes, parts.mesh)
    writer = round_record.writer(parts, shapes.state, warn=listener.warn)
    try_out = _testing(parts)
    fingerprint = files.fingerprint(config)
    deploy = _deploying(parts, where)
    clock = 0.0

    def note(stage: str, stage_round: int, number: int, found: Any) -> None:
        """Wait for one round and put it on record."""
        nonlocal clock
        metrics, tested = jax.device_get(found)
        if not processes.is_first:
            return
        before, clock = clock, time.perf_counter()
        line = writer.line(stage, stage_round, number, metrics, tested)
        line["time_s"] = round(clock - before, 6)
        record.append(folder, line)
        listener.round(line)

    def save(number: int) -> None:
        deployed, first = deploy(now.state), None
        if feeding.has_store(parts.feed):
            first = _begin_rows(feeder, number, manager, processes)
        if not processes.is_first:
            return
        record.sync(folder)
        checkpoints.save(
            manager, number, now, fingerprint=fingerprint, deployed=deployed, first=first
        )

    tests, saves = config.evaluation, config.checkpoints
    with (
        feeding.feeder(
            parts.feed,
            lambda: feeding.without_rows(parts.feed, begin())[1],
            num_clients=parts.population.offsets.shape[0] - 1,
            folder=folder,
            fingerprint=fingerprint,
            mesh=parts.mesh,
            home=Home(processes.process, processes.number),
        ) as feeder,
        _opened(processes, folder / layout.CHECKPOINTS, keep=saves.keep) as manager,
    ):
        read = functools.partial(_saved, lacks=feeder.lacks, every=saves.every, allow=allow)
        found = None
        if processes.is_first:
            found = read(manager, shapes, folder, warn=listener.warn)
        done = processes_lib.decided(processes, lambda: 0 if found is None else found[0])
        if done:
            saved = processes_lib.shared_arrays(processes, found and found[1], shapes)
            now = placing.place(saved, parts.mesh, where)
            feeder.restore(done)
        else:
            now, _ = feeding.without_rows(parts.feed, begin())
            _check_values(now, config)
        if processes.is_first:
            checkpoints.prepare(manager, shapes, shapes.state.params)
            listener.start(writer.header, record.cut(folder, writer.header, done))

        first, note_last = 0, _nothing_to_note
        clock = time.perf_counter()
        for which, (stage, advance) in enumerate(zip(algorithm.stages, parts.advance, strict=True)):
            end = first + stage.num_rounds
            left = range(max(first, done), end)
            step = feeder.step(which, _compiled(advance, parts, where), left)
            for index in left:
                number = index + 1
                is_last = number == parts.num_rounds
                is_due = number >= tests.start and number % tests.every == 0
                try:
                    now, metrics = step(rounds_key, now, people)
                    tested = try_out(now.state, test) if is_due or is_last else None
                except Exception:
                    note_last()  # so that the record ends where the error came
                    raise
                note_last()
                # The device may still be working on this round.
                outcome = (metrics, tested)
                note_last = functools.partial(note, stage.name, number - first, number, outcome)
                if (is_over := stop()) or number % saves.every == 0 or is_last:
                    note_last()
                    note_last = _nothing_to_note
                    save(number)
                if is_over:
                    return now.state
            first = end
    return now.state


def _begin_rows(
    feeder: feeding.Feeder, number: int, manager: Any, processes: Processes
) -> Callable[[], None] | None:
    """Begin to save clients' rows; give what writes them before the checkpoint, unless it is done.

    Of several processes each writes its rows now: no checkpoint is without anybody's.
    """
    keep = processes_lib.decided(processes, lambda: _written(manager))
    write = feeder.save(number, keep)
    if processes.number == 1:
        return write
    write()
    processes_lib.wait_for_all(processes)
    return None


def _written(manager: Any) -> list[int]:
    """List the checkpoints; until the last one is written, its rows belong to none."""
    checkpoints.finish(manager)
    return list(manager.all_steps())


def _beginning(parts: RunParts, key: Key) -> tuple[Callable[[], Simulation], Simulation]:
    """Make the function that makes the simulation before the first round.

    Clients' rows are made where they stay, as a second copy may not fit, and can be donated. Beside
    it are the shapes of the simulation, without rows that are kept elsewhere.
    """

    def begin_fn(key: Key) -> Simulation:
        return start(key, parts)

    shapes = jax.eval_shape(begin_fn, key)
    begin = jax.jit(begin_fn, out_shardings=placing.of_simulation(shapes, parts.mesh))
    key = placing.place(key, parts.mesh)
    return lambda: begin(key), feeding.without_rows(parts.feed, shapes)[0]


def _testing(parts: RunParts) -> Callable[[RoundState, TestSet], evaluation.Evaluation]:
    """Make the compiled function ``(state, test) -> Evaluation`` of what is deployed."""
    test_fn = evaluation.evaluate(parts.model, parts.preprocess, task=parts.task, mesh=parts.mesh)
    deployed_params = parts.algorithm.deployed_params
    return jax.jit(lambda state, test: test_fn(deployed_params(state), state.model_state, test))


def _deploying(parts: RunParts, where: Any) -> Callable[[RoundState], Params]:
    """Make the compiled function ``state -> parameters`` that are deployed, placed as they are."""
    places = where.state.params if isinstance(where, Simulation) else where
    return jax.jit(parts.algorithm.deployed_params, out_shardings=places)


def _opened(processes: Processes, folder: pathlib.Path, *, keep: int) -> Any:
    """Open the checkpoints; only process 0 has them."""
    if not processes.is_first:
        return contextlib.nullcontext()
    return checkpoints.open_manager(folder, keep=keep)


def _check_values(begun: Simulation, config: RunConfig) -> None:
    """Refuse a network that begins with a NaN or an infinity, as no round would count."""
    try:
        parameters.check_values(begun.state.params, begun.state.model_state)
    except ValueError as error:
        raise ConfigError(f"model {config.model.name!r}: {error}") from None


def _saved(
    manager: Any,
    shapes: Simulation,
    folder: pathlib.Path,
    *,
    lacks: Callable[[int], str],
    every: int,
    allow: Collection[str],
    warn: Callable[[str], object],
) -> tuple[int, Simulation] | None:
    """Read the newest checkpoint that can be used: number of rounds and simulation."""
    num_lines = len(record.read(folder).lines)
    found = checkpoints.restore(
        manager,
        shapes,
        usable=lambda step: step <= num_lines,
        aside=folder / layout.SKIPPED,
        warn=warn,
        allow=allow,
        lacks=lacks,
    )
    # The second checkpoint is begun only when the first one is written.
    if found is None and num_lines > 2 * every and checkpoints.RESTART not in allow:
        raise RunFolderError(
            f"the run in {str(folder)!r} has {num_lines} rounds on record and no checkpoint: put "
            "its checkpoints back (nothing was changed), or start it again at round 1 with "
            f"`--allow {checkpoints.RESTART}`."
        )
    if found is None and num_lines:
        warn("no checkpoint can be used: the run starts again at round 1.")
    return found


def _nothing_to_note() -> None:
    """Do nothing: all rounds are on record."""


def check_start(parts: RunParts) -> None:
    """Trace the start of a run, with shapes alone, which takes no time.

    Whatever the components raise on settings that do not fit goes through.
    """
    jax.eval_shape(lambda key: start(key, parts), jax.random.key(0))


def check(parts: RunParts) -> None:
    """Trace a round of every stage, with shapes alone; `train` finds these traces.

    Whatever the components raise on settings that do not fit goes through.
    """
    stages = parts.algorithm.stages
    if (total := sum(stage.num_rounds for stage in stages)) > INT_MAX:
        each = ", ".join(f"{stage.num_rounds} of {stage.name}" for stage in stages)
        raise ValueError(
            f"all stages together must have at most {INT_MAX} rounds, got {total} ({each})."
        )
    key = jax.random.key(0)
    now = jax.eval_shape(lambda key: start(key, parts), key)
    now, row = feeding.without_rows(parts.feed, now)
    where = placing.of_simulation(now, parts.mesh)
    for index, advance in enumerate(parts.advance):
        given = (now, parts.population)
        if parts.feed is not None:
            given = feed_lib.shapes(parts.feed, index, now, row, parts.population, parts.mesh)
        begun = placing.shapes(
            given[0], _of_state(where) if feeding.has_store(parts.feed) else where
        )
        rest = placing.shapes((key, *given[1:]), placing.everywhere(parts.mesh))
        jax.eval_shape(_compiled(advance, parts, where), rest[0], begun, *rest[1:])


def _compiled(advance: AdvanceFn, parts: RunParts, where: Any) -> AdvanceFn:
    """Let XLA compile the round; it may write the new simulation over the old one.

    `where` is the placement of the simulation (`placing.of_simulation`).
    """
    if parts.mesh is None:
        return jax.jit(advance, donate_argnums=1)
    everywhere = placing.everywhere(parts.mesh)
    outputs = (where, everywhere)
    if feeding.has_store(parts.feed):
        outputs = (_of_state(where), everywhere, everywhere)
    return jax.jit(advance, donate_argnums=1, out_shardings=outputs)


def _of_state(where: Any) -> Any:
    """Take the server's side out of the placement of a simulation."""
    return where.state if isinstance(where, Simulation) else where


def start(key: Key, parts: RunParts) -> Simulation:
    """Make the simulation before the first round; where rows are kept elsewhere, it has one."""
    # Traced once for all that need it: that of a deep network takes half a second.
    params, model_state = jax.jit(parts.model.init, inline=True)(key)
    num_clients = parts.population.offsets.shape[0] - 1
    num_clients = 1 if feeding.has_store(parts.feed) else num_clients
    made = simulation.start(parts.algorithm, params, model_state, num_clients=num_clients)
    # Of strong types, as a round gives them back: else it would be traced twice.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), made)
