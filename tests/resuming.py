"""Runs that are stopped again and again, and resumed from what lies on disk: one way for all."""

import contextlib
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import chex
import jax
import pytest

from fedjaxprune import masks
from fedjaxprune.experiment.folder import checkpoints, record
from fedjaxprune.experiment.run import loop
from fedjaxprune.experiment.run.evaluation import TestSet
from fedjaxprune.experiment.tracking import progress
from fedjaxprune.rounds import simulation
from fedjaxprune.rounds.simulation import Simulation
from fedjaxprune.types import Algorithm, Model, Population


class Stopped(Exception):
    pass


def parts(
    model: Model,
    algorithm: Algorithm,
    people: Population,
    draw: simulation.SamplingFn,
    **draws: simulation.SamplingFn,
) -> loop.RunParts:
    """Put a run together whose test set are the clients' examples; `draws` are by stage."""
    return loop.RunParts(
        model=model,
        algorithm=algorithm,
        population=people,
        test=TestSet(people.examples["inputs"], people.examples["labels"]),
        preprocess=lambda key, inputs: inputs,
        advance=tuple(
            simulation.advance(stage, draws.get(stage.name, draw)) for stage in algorithm.stages
        ),
        prunable=masks.is_kernel,
    )


def play(
    parts: loop.RunParts,
    folder: pathlib.Path,
    *,
    stop_after: int | None = None,
    eval_every: int = 1,
    warn: Callable[[str], Any] = pytest.fail,
) -> tuple[Simulation | None, list[record.RoundRecord]]:
    """Run in a folder, perhaps only up to a round, whose checkpoint is then missing.

    Gives what the newest checkpoint holds, None if the run was stopped, and the record without
    times. What is compiled of a round serves all runs of the same parts.
    """

    def on_round(line):
        if line.round == stop_after:
            raise Stopped

    folder.mkdir(exist_ok=True)
    state = None
    with contextlib.suppress(Stopped):
        state = loop.train(
            parts,
            seed=3,
            folder=folder,
            eval_every=eval_every,
            checkpoint_every=1,
            keep_checkpoints=2,
            fingerprint=7,
            report=progress.Listener(start=lambda lines: None, round=on_round, warn=warn),
        )
    lines = [line._replace(wall_s=0.0) for line in record.read(folder)]
    if state is None:
        return None, lines
    like = jax.eval_shape(lambda: loop.start(jax.random.key(0), parts))
    found = checkpoints.read_newest(folder / record.CHECKPOINTS, like, warn=pytest.fail)
    assert found is not None
    assert found[0] == len(lines)
    chex.assert_trees_all_equal(found[1].state, state)
    return found[1], lines


def assert_resumes(
    parts: loop.RunParts,
    folder: pathlib.Path,
    *,
    stops: Iterable[int] | None = None,
    **options: Any,
) -> list[record.RoundRecord]:
    """Stop one run after each round in turn (or after `stops`); it ends as one that never stopped.

    The server's state, all clients' rows and all lines of the record are the same, to the bit.
    """
    whole, lines = play(parts, folder / "whole", **options)
    assert whole is not None
    for stop_after in range(1, len(lines) + 1) if stops is None else stops:
        stopped, so_far = play(parts, folder / "stopped", stop_after=stop_after, **options)
        assert stopped is None
        assert so_far == lines[:stop_after]
    again, again_lines = play(parts, folder / "stopped", **options)
    chex.assert_trees_all_equal(again, whole)
    assert again_lines == lines
    return lines
