"""Runs that are stopped again and again, and resumed from what lies on disk: one way for all."""

import contextlib
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import chex
import jax
import pytest

from fedjaxprune.experiment.config import resolve
from fedjaxprune.experiment.folder import checkpoints, layout, network, record
from fedjaxprune.experiment.folder.network import Network
from fedjaxprune.experiment.run import loop
from fedjaxprune.experiment.run.evaluation import TestSet
from fedjaxprune.experiment.run.listener import Listener
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
    params, state = jax.eval_shape(model.init, jax.random.key(0))
    options = {"seed": 3, "checkpoints.every": 1, "checkpoints.keep": 2, "method": "fedavg"}
    return loop.RunParts(
        config=resolve.resolve(options),
        network=Network(
            task="classification",
            input_shape=people.examples["inputs"].shape[1:],
            input_dtype="float32",
            num_outputs=1,
            num_classes=1,
            positions=(),
            max_value=None,
            mean=None,
            std=None,
            params=network.shapes(params),
            state=network.shapes(state),
            prunable=(),
            data_checksum=0,
        ),
        model=model,
        algorithm=algorithm,
        population=people,
        test=TestSet(people.examples["inputs"], people.examples["labels"]),
        preprocess=lambda key, inputs: inputs,
        advance=tuple(
            simulation.advance(stage, draws.get(stage.name, draw)) for stage in algorithm.stages
        ),
    )


def play(
    parts: loop.RunParts,
    folder: pathlib.Path,
    *,
    stop_after: int | None = None,
    eval_every: int = 1,
    warn: Callable[[str], Any] = pytest.fail,
) -> tuple[Simulation | None, list[record.Line]]:
    """Run in a folder, perhaps only up to a round, whose checkpoint is then missing.

    Gives what the newest checkpoint holds, None if the run was stopped, and the record without
    times. What is compiled of a round serves all runs of the same parts.
    """

    def on_round(line):
        if line["round"] == stop_after:
            raise Stopped

    folder.mkdir(exist_ok=True)
    state = None
    config = resolve.replace(parts.config, {"evaluation.every": eval_every})
    parts = parts._replace(config=config)
    with contextlib.suppress(Stopped):
        state = loop.train(parts, folder=folder, listener=Listener(round=on_round, warn=warn))
    lines = [{**line, "time_s": 0.0} for line in record.read(folder).lines]
    if state is None:
        return None, lines
    like = jax.eval_shape(lambda: loop.start(jax.random.key(0), parts))
    with checkpoints.open_manager(folder / layout.CHECKPOINTS, keep=2) as manager:
        found = checkpoints.restore(
            manager, like, usable=lambda step: True, aside=folder, warn=pytest.fail
        )
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
) -> list[record.Line]:
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
