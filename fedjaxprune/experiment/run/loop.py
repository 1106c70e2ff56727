"""Run an algorithm round by round: draw the cohort, call the compiled round, test, record, save.

One jitted step plays a round; the state and all clients' rows are donated to it, so they live once.
The host reads metrics only, one round behind the device.
All randomness comes from the seed and the number of the round: a resumed run needs no key.
"""

import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.costs import ledger
from fedjaxprune.experiment.config.flat.sections import INT_MAX
from fedjaxprune.experiment.execution import chunk_size
from fedjaxprune.experiment.folder import checkpoints, record
from fedjaxprune.experiment.run import client_accuracy, evaluation, round_costs
from fedjaxprune.experiment.run.evaluation import TestSet
from fedjaxprune.experiment.tracking import progress
from fedjaxprune.rounds import simulation
from fedjaxprune.rounds.simulation import Simulation
from fedjaxprune.types import (
    Algorithm,
    Key,
    Model,
    Population,
    PrunableFn,
    RoundMetrics,
    RoundState,
)

AdvanceFn = Callable[[Key, Simulation, Population], tuple[Simulation, RoundMetrics]]

# What a key is for: folded into the seed's key, so that none is used twice.
INIT, ROUNDS, COHORT, DEVELOPMENT = range(4)


class RunParts(NamedTuple):
    """What a run is put together from.

    Attributes:
      model: the network.
      algorithm: the federated method.
      population: the clients' examples.
      test: the test set.
      preprocess: ``(key, inputs) -> inputs`` for tests.
      advance: for each stage the function that plays one of its rounds (`simulation.advance`).
      prunable: what sparsity is reported of.
      mesh: the devices that the algorithm shares a cohort out to; None for one device.
      chunk: how many clients a device trains at once, if that was left to a trial.
      task: what the labels are, as `Dataset.task`.
    """

    model: Model
    algorithm: Algorithm
    population: Population
    test: TestSet
    preprocess: Callable[[Key, Any], Any]
    advance: tuple[AdvanceFn, ...]
    prunable: PrunableFn
    mesh: Mesh | None = None
    chunk: chunk_size.Choice | None = None
    task: str = "classification"


class _Pending(NamedTuple):
    """A round that the device may still be working on."""

    stage: str
    round: int
    metrics: Any
    tested: evaluation.Evaluation | None


def train(
    parts: RunParts,
    *,
    seed: int,
    folder: pathlib.Path,
    eval_every: int,
    eval_from: int = 1,
    checkpoint_every: int,
    keep_checkpoints: int,
    fingerprint: int,
    report: progress.Listener,
) -> RoundState:
    """Run all rounds that the folder does not hold yet, and return the final state.

    A folder with checkpoints goes on from the newest one that is whole, to the same bits as if it
    had never stopped; the record is cut to that round.

    Args:
      parts: what to run.
      seed: of every random choice.
      folder: a run folder; gets ``metrics.jsonl`` and ``checkpoints/``.
      eval_every: rounds from one test to the next; the last round is always tested.
      eval_from: first round that is tested.
      checkpoint_every: rounds from one checkpoint to the next; the last is always saved.
      keep_checkpoints: how many of the newest stay.
      fingerprint: of the config, for the checkpoints.
      report: is told how it goes.

    Raises:
      UserError: the record is damaged before its end.
      OSError: something cannot be written.
    """
    algorithm = parts.algorithm
    key = jax.random.key(seed)
    rounds_key = jax.random.fold_in(key, ROUNDS)
    num_rounds = sum(stage.num_rounds for stage in algorithm.stages)

    begin_fn = jax.jit(lambda key: start(key, parts))
    now = _place(jax.tree.map(_own, begin_fn(jax.random.fold_in(key, INIT))), parts.mesh)
    rounds_key, population, test = _place((rounds_key, parts.population, parts.test), parts.mesh)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), now)
    flags = masks_lib.prunable_leaves(shapes.state.params, parts.prunable)

    profile = round_costs.profile(
        parts.model,
        shapes.state.params,
        parts.test.inputs,
        preprocess=parts.preprocess,
        prunable=parts.prunable,
        warn=report.warn,
    )

    classes = client_accuracy.of_population(parts.population, parts.test.labels)
    test_fn = evaluation.evaluate(parts.model, parts.preprocess, task=parts.task, mesh=parts.mesh)
    try_out = jax.jit(
        lambda state, test: test_fn(algorithm.deployed_params(state), state.model_state, test)
    )
    clock = 0.0

    def note(pending: _Pending) -> None:
        """Wait for one round and put it on record."""
        nonlocal clock
        metrics, tested = jax.device_get((pending.metrics, pending.tested))
        pending = pending._replace(metrics=metrics, tested=tested)
        line = _line(pending, parts, shapes.state, flags, profile, classes)
        before, clock = clock, time.perf_counter()
        line = line._replace(wall_s=round(clock - before, 6))
        record.append(folder, line)
        report.round(line)

    num_lines = len(record.read(folder))
    with checkpoints.open_manager(folder / record.CHECKPOINTS, keep=keep_checkpoints) as manager:
        found = checkpoints.restore(
            manager,
            shapes,
            usable=lambda step: step <= num_lines,
            aside=folder / record.SKIPPED,
            warn=report.warn,
        )
        done = 0
        if found is not None:
            done, now = found[0], _place(found[1], parts.mesh)
        elif num_lines:
            report.warn("no checkpoint can be used: the run starts again at round 1.")
        report.start(record.cut(folder, done))

        begin, pending = 0, None
        clock = time.perf_counter()
        for stage, advance in zip(algorithm.stages, parts.advance, strict=True):
            end = begin + stage.num_rounds
            step = _compiled(advance, parts.mesh)
            for index in range(max(begin, done), end):
                number = index + 1
                is_due = number >= eval_from and number % eval_every == 0
                is_tested = is_due or number == num_rounds
                try:
                    now, metrics = step(rounds_key, now, population)
                    tested = try_out(now.state, test) if is_tested else None
                except Exception:
                    if pending is not None:  # so that the record ends where the error came
                        note(pending)
                    raise
                if pending is not None:
                    note(pending)
                pending = _Pending(stage.name, number, metrics, tested)
                if number % checkpoint_every == 0 or number == num_rounds:
                    note(pending)
                    pending = None
                    record.sync(folder)
                    checkpoints.save(manager, number, now, fingerprint=fingerprint)
            begin = end
    return now.state


def check_start(parts: RunParts) -> None:
    """Trace the start of a run, with shapes alone, which takes no time.

    Whatever the components raise on settings that do not fit goes through.
    """
    jax.eval_shape(lambda key: start(key, parts), jax.random.key(0))


def check(parts: RunParts) -> None:
    """Trace a round of every stage, with shapes alone; `train` finds these traces.

    Whatever the components raise on settings that do not fit goes through.

    Raises:
      ValueError: if the stages have more rounds together than an int32 counts.
    """
    stages = parts.algorithm.stages
    if (total := sum(stage.num_rounds for stage in stages)) > INT_MAX:
        each = ", ".join(f"{stage.num_rounds} of {stage.name}" for stage in stages)
        raise ValueError(
            f"all stages together must have at most {INT_MAX} rounds, got {total} ({each})."
        )
    key = jax.random.key(0)
    now = jax.eval_shape(lambda key: start(key, parts), key)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_everywhere(parts.mesh)),
        (key, now, parts.population),
    )
    for advance in parts.advance:
        jax.eval_shape(_compiled(advance, parts.mesh), *placed)


def _compiled(advance: AdvanceFn, mesh: Mesh | None) -> AdvanceFn:
    """Let XLA compile the round; it may write the new simulation over the old one."""
    if mesh is None:
        return jax.jit(advance, donate_argnums=1)
    return jax.jit(advance, donate_argnums=1, out_shardings=_everywhere(mesh))


def _place(tree: Any, mesh: Mesh | None) -> Any:
    """Put a tree on every device of a mesh."""
    return tree if mesh is None else jax.device_put(tree, _everywhere(mesh))


def _everywhere(mesh: Mesh | None) -> NamedSharding | None:
    """Name the placement of an array that every device holds."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def start(key: Key, parts: RunParts) -> Simulation:
    """Make the simulation before the first round."""
    params, model_state = parts.model.init(key)
    num_clients = parts.population.offsets.shape[0] - 1
    return simulation.start(parts.algorithm, params, model_state, num_clients=num_clients)


def _own(leaf: jax.Array) -> jax.Array:
    """Copy to a buffer of its own (for donation) and of strong type (else a second trace)."""
    return jnp.array(leaf, dtype=leaf.dtype, copy=True)


def _line(
    pending: _Pending,
    parts: RunParts,
    shapes: RoundState,
    flags: list[bool],
    profile: round_costs.Profile,
    classes: client_accuracy.Classes | None,
) -> record.RoundRecord:
    """Turn a round's metrics, read to the host, into a line of the record."""
    metrics, tested = pending.metrics, pending.tested
    traffic = ledger.account(metrics, shapes, parts.algorithm)
    sizes = trees.sizes(shapes.params)
    num_prunable = sum(size for size, flag in zip(sizes, flags, strict=True) if flag)
    num_kept = sum(int(kept) for kept, flag in zip(metrics.num_live, flags, strict=True) if flag)
    scores = evaluation.scores(tested, parts.test.labels, task=parts.task) if tested else None
    loss = metrics.train["loss"]
    weight = float(loss.weight)
    return record.RoundRecord(
        stage=pending.stage,
        round=pending.round,
        train_loss=record.finite(float(loss.total) / weight) if weight > 0 else None,
        test_loss=record.finite(scores.loss) if scores else None,
        test_accuracy=scores.accuracy if scores else None,
        sparsity=(num_prunable - num_kept) / num_prunable if num_prunable else 0.0,
        num_kept=num_kept,
        num_changed=int(metrics.num_changed),
        uplink_bits=traffic.uplink_bits,
        downlink_bits=traffic.downlink_bits,
        mask_bits=traffic.uplink.masks + traffic.downlink.masks,
        statistics_bits=traffic.uplink.statistics + traffic.downlink.statistics,
        uplink_parts=traffic.uplink._asdict(),
        downlink_parts=traffic.downlink._asdict(),
        client_bits=[
            {**entry._asdict(), "client_ids": list(entry.client_ids)} for entry in traffic.clients
        ],
        modeled_bits={name: bits._asdict() for name, bits in traffic.published.items()},
        num_participating=int(metrics.num_participating),
        num_rejected=int(metrics.num_rejected),
        **round_costs.of_round(profile, metrics)._asdict(),
        wall_s=0.0,
        inference_flops=round_costs.of_inference(profile, metrics, tested.through)
        if tested
        else None,
        vote_agreement=parts.algorithm.diagnostics(metrics).get("agreement"),
        layer_sparsity={
            path: round(1.0 - int(kept) / max(1, size), 6)
            for path, kept, size, flag in zip(
                profile.paths, metrics.num_live, sizes, flags, strict=True
            )
            if flag
        },
        client_accuracy=client_accuracy.of_clients(classes, tested.class_correct)
        if tested and classes
        else None,
        test_error=record.finite(scores.error) if scores and scores.error is not None else None,
    )
