"""Rounds that are fed: the cohort's examples and rows are brought to the device one round ahead.

The host knows a round's cohort from the run's key and the number of the round. While the device
works on a round, a thread fetches the examples of the next cohort, and what its clients remember.
Rows that the round before has changed are not waited for: they go from its result to the next round
on the device, and to the store when they are computed. The bits are those of a run whose examples
and rows are on the device.

Of several processes each draws all cohorts, fetches the examples of the clients that its own
devices train, and puts them there. The rows of a cohort come from the homes of its clients.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fedjaxprune.experiment.execution import placing as placing_lib
from fedjaxprune.experiment.feeding import homes
from fedjaxprune.experiment.feeding.rows import RowStore
from fedjaxprune.federated import cohort
from fedjaxprune.rounds import feeding, simulation
from fedjaxprune.rounds.feeding import Pantry
from fedjaxprune.rounds.simulation import DrawFn, GivenRows, Simulation
from fedjaxprune.types import Population, Stage

StepFn = Callable[[Any, Simulation, Any], Any]  # as `simulation.advance` makes it


class Feed(NamedTuple):
    """What the rounds of a run are fed.

    Attributes:
      draws: for each stage the function that draws its cohorts (`simulation.drawing`).
      cohort_sizes: for each stage the slots of a cohort, ``C``.
      pantries: for each stage where its examples come from; None where all are on the device.
      rows: where clients' rows are.
      num_written: clients at most that a run of all stages asks, ``N`` or fewer.
    """

    draws: tuple[DrawFn, ...]
    cohort_sizes: tuple[int, ...]
    pantries: tuple[Pantry, ...] | None
    rows: str
    num_written: int


class Hands(NamedTuple):
    """What brings things to the device while a run lasts.

    Attributes:
      mesh: the devices that share a cohort; None for one.
      store: of the clients' rows, where these are not on the device.
      pool: one thread.
    """

    mesh: Mesh | None
    store: RowStore | None
    pool: futures.Executor


class _Given(NamedTuple):
    """What a round is given, on the device; rows are ``()`` where no store keeps them."""

    cohort: tuple[np.ndarray, np.ndarray]  # ids and presence, on the host
    members: Any
    population: Any
    rows: Any
    places: Any


def advance(stage: Stage, *, rows: str, mesh: Mesh | None) -> Callable[..., Any]:
    """Make the function that runs one round of a stage, to be compiled."""
    if rows == "device":
        return simulation.advance_cohort(stage)
    advance_fn = simulation.advance_rows(stage)
    if not placing_lib.is_shared(mesh):
        return advance_fn

    def advance_shared_fn(key, state, given, members, population):
        given = given._replace(rows=homes.joined(given.rows, mesh))
        return advance_fn(key, state, given, members, population)

    return advance_shared_fn


@contextlib.contextmanager
def hands(mesh: Mesh | None, store: RowStore | None) -> Iterator[Hands]:
    """Begin to bring things to the device; at the end whatever was begun is waited for."""
    with futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="feeding") as pool:
        try:
            yield Hands(mesh, store, pool)
        finally:
            pool.shutdown(cancel_futures=True)


def step(feed: Feed, index: int, compiled: Callable[..., Any], by: Hands, rounds: range) -> StepFn:
    """Make the function that runs the next of a stage's rounds, like that of `simulation.advance`.

    Args:
      feed: of the run.
      index: of the stage.
      compiled: the round (`advance`).
      by: bring things to the device.
      rounds: numbers of the rounds, `RoundState.round` before each.

    Returns:
      ``(key, simulation, population) -> (simulation, metrics)``, to be called once for each of the
      rounds. The population is that of the device; without one there, it means nothing.
    """
    drawn, ready = {}, {}
    draw = jax.jit(feed.draws[index])
    pantry = None if feed.pantries is None else _on_device(feed.pantries[index], by.mesh)
    coming = iter(rounds)
    later = None

    def step_fn(key, now, population):
        nonlocal later
        number = next(coming)
        ahead = range(number, min(number + 3, rounds.stop))
        for one in ahead:  # before this round is begun, behind which the device would put them
            if one not in drawn:
                drawn[one] = draw(key, np.int32(one))
        for one in ahead[:2]:
            if one not in ready:
                ready[one] = by.pool.submit(_prepare, one, rounds.start, drawn, pantry, by)
        given = ready.pop(number).result()
        drawn.pop(number - 1, None)
        given = given._replace(population=population if pantry is None else given.population)
        if by.store is None:
            return compiled(key, now, given.members, given.population)
        if later is None:
            later = _empty(by.store, feed.cohort_sizes[index], by.mesh)
        rows = GivenRows(given.rows, later, given.places)
        state, later, metrics = compiled(key, now.state, rows, given.members, given.population)
        by.store.promise(number, given.cohort, later)
        return Simulation(state=state, rows=()), metrics  # pyright: ignore[reportArgumentType]

    return step_fn


def shapes(
    feed: Feed, index: int, now: Simulation, row: Any, population: Population, mesh: Mesh | None
) -> tuple:
    """Give the shapes of what the round of a stage is called with after the key.

    Args:
      feed: of the run.
      index: of the stage.
      now: shapes of the simulation.
      row: shapes of a client's row; counts where rows are not on the device.
      population: that of the device.
      mesh: the devices that share a cohort; None for one.
    """
    size = feed.cohort_sizes[index]
    ids = jax.ShapeDtypeStruct((size,), np.int32)
    members = ids, jax.ShapeDtypeStruct((size,), np.bool_)
    if feed.pantries is not None:
        population = feeding.shapes(feed.pantries[index])
    if feed.rows == "device":
        return now, members, population
    number = mesh.shape[cohort.AXIS] if placing_lib.is_shared(mesh) else 1

    def rows(number: int) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((number * size, *leaf.shape), leaf.dtype), row
        )

    return now.state, GivenRows(rows(number), rows(1), ids), members, population  # pyright: ignore[reportArgumentType]


def _prepare(number: int, first: int, drawn: Any, pantry: Pantry | None, by: Hands) -> _Given:
    """Bring what a round needs to the device, when the round before the last is over."""
    ids, present = jax.device_get(drawn[number])
    population = () if pantry is None else _fetch(pantry, ids[present], by.mesh)
    rows = places = ()
    if by.store is not None:
        num_clients = by.store.kept.num_clients
        by.store.settle(number - 2)
        # An absent slot's id may be anything.
        rows = by.store.read(np.clip(np.where(ids < 0, ids + num_clients, ids), 0, num_clients - 1))
        before = jax.device_get(drawn[number - 1]) if number > first else None
        places = _places(ids, before)
        places = placing_lib.place(places, by.mesh)
        if placing_lib.is_shared(by.mesh):
            rows = homes.place_rows(rows, by.mesh)
        else:
            rows = placing_lib.place(rows, by.mesh)
    return _Given((ids, present), drawn[number], population, rows, places)


def _empty(store: RowStore, size: int, mesh: Mesh | None) -> Any:
    """Make rows ``[C, ...]`` of no round."""
    rows = store.read(np.zeros(size, np.int64))
    return placing_lib.place(jax.tree.map(np.zeros_like, rows), mesh)


def _fetch(pantry: Pantry, ids: np.ndarray, mesh: Mesh | None) -> Population:
    """Fetch the examples of a cohort, or of those clients that this process's devices train."""
    if mesh is None or pantry.whole.num_parts == 1:
        return placing_lib.place(feeding.population(pantry, ids), mesh)
    found = feeding.population(pantry, ids, parts=placing_lib.own_parts(mesh))
    examples = placing_lib.place_parts(found.examples, mesh)
    return placing_lib.place(found._replace(examples=()), mesh)._replace(examples=examples)


def _places(ids: np.ndarray, before: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """Find clients of a cohort among those of the one before that took part, ``[C]`` int32."""
    places = np.full(ids.shape, -1, np.int32)
    if before is None:
        return places
    earlier, took_part = before
    at = np.flatnonzero(took_part)
    at = at[np.argsort(earlier[at], kind="stable")]
    if not at.size:
        return places
    # Of a client that was drawn twice, the last row counts.
    found = np.searchsorted(earlier[at], ids, side="right") - 1
    is_there = (found >= 0) & (earlier[at][found] == ids)
    return np.where(is_there, at[found], -1).astype(np.int32)


def _on_device(pantry: Pantry, mesh: Mesh | None) -> Pantry:
    """Put on the device what is the same for all populations of a stage."""
    order, held, whole = placing_lib.place((pantry.order, pantry.held, pantry.whole), mesh)
    return pantry._replace(order=order, held=held, whole=whole)
