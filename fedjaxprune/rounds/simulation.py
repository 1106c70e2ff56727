"""Rounds over a population whose rows live on the device: sample, gather, run, scatter."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import trees
from fedjaxprune.federated import populations, sampling
from fedjaxprune.federated.sampling import SamplingFn
from fedjaxprune.models import parameters
from fedjaxprune.rounds import stages
from fedjaxprune.types import (
    Algorithm,
    ClientState,
    Cohort,
    Key,
    Params,
    Population,
    RoundFn,
    RoundMetrics,
    RoundState,
    Stage,
    State,
    Whole,
)

Members = tuple[jax.Array, jax.Array]  # of a cohort: ids [C], and who of them takes part [C]
DrawFn = Callable[[Key, jax.Array], Members]


class Simulation(NamedTuple):
    """Everything that a run needs to continue.

    Attributes:
      state: the server's side.
      rows: the clients' side, tree of ``[N, ...]``.
    """

    state: RoundState
    rows: ClientState


class GivenRows(NamedTuple):
    """The rows of a cohort that are kept elsewhere, as far as these are written already.

    Attributes:
      rows: tree of ``[C, ...]``.
      later: tree of ``[C', ...]``, what the round before wrote.
      places: ``[C]`` int32, where in `later` a client's newer row is; below 0 for none.
    """

    rows: ClientState
    later: ClientState
    places: jax.Array


def start(
    algorithm: Algorithm,
    params: Params,
    model_state: State,
    *,
    num_clients: int,
    population: Population | None = None,
) -> Simulation:
    """Make the simulation in which no client has taken part yet.

    Parameters and state are copied, so that the simulation may be donated.

    Args:
      algorithm: whose state and rows are made.
      params: real floating numbers.
      model_state: what is not trained.
      num_clients: ``N`` of the population; the first round compares.
      population: one that `partitions.population` did not make; its values are checked here, once.
        The first round compares the shapes of any.

    Raises:
      ValueError: there is no client, the parameters cannot be trained (`parameters.check`) or are
        not finite, or the population has rows that do not exist (`populations.check_values`).
    """
    if isinstance(num_clients, bool) or not isinstance(num_clients, int | np.integer):
        raise ValueError(f"num_clients must be a whole number, got {num_clients!r}.")
    if num_clients < 1:
        raise ValueError(f"num_clients must be at least 1, got {num_clients}.")
    if population is not None:
        populations.check_values(population)
        if population.offsets.shape[0] - 1 != num_clients:
            raise ValueError(
                f"num_clients must be that of the population, {population.offsets.shape[0] - 1}, "
                f"got {num_clients}."
            )
    parameters.check(params, model_state)
    parameters.check_values(params, model_state)
    own = functools.partial(
        jax.tree.map, lambda leaf: jnp.array(leaf, dtype=jnp.result_type(leaf), copy=True)
    )
    params, model_state = own(params), own(model_state)
    row = algorithm.init_client(params)
    rows = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_clients, *jnp.shape(leaf))), row)
    return Simulation(state=algorithm.init(params, model_state), rows=rows)


def advance(
    stage: Stage, participation: SamplingFn
) -> Callable[[Key, Simulation, Population], tuple[Simulation, RoundMetrics]]:
    """Make the function that runs one round; to be jitted, with the simulation donated.

    The returned function folds the round's number into the key that it is given, so the run's one
    key goes in every time, and a run continued from a saved simulation takes the same path.

    The population says how many clients there are. A function of `sampling`, and the rows, are
    compared with it while tracing; of any other function, whoever it draws that is no client counts
    as absent.

    Args:
      stage: whose round is run. One of your own is guarded (`stages.guarded`): a round that writes
        a NaN or an infinity changes nothing but the number of rounds.
      participation: ``key -> (client_ids [C], present [C])``. An id may occur twice, as in a draw
        with replacement: it then counts twice.

    Returns:
      ``(key, simulation, population) -> (simulation, metrics)``.

    Raises:
      ValueError: while tracing, if the numbers of clients disagree, or the participation is none.
    """

    round_fn = _round_of(stage)

    def advance_fn(key, simulation, population):
        num_clients = _count_clients(simulation, population, participation)
        sample_key, work_key = _keys(key, simulation.state.round)
        members = _draw(participation, sample_key, num_clients)
        return _advance(round_fn, work_key, simulation, members, population)

    return advance_fn


def drawing(participation: SamplingFn, *, num_clients: int) -> DrawFn:
    """Make the function that draws the cohort of a round alone, the one that `advance` draws.

    Args:
      participation: as for `advance`.
      num_clients: ``N``.

    Returns:
      ``(key, round) -> (client_ids [C], present [C])``: the run's key, and `RoundState.round`.

    Raises:
      ValueError: a function of `sampling` draws from another number of clients.
    """
    _check_drawn(participation, num_clients)

    def draw_fn(key, round):
        return _draw(participation, _keys(key, round)[0], num_clients)

    return draw_fn


def advance_cohort(
    stage: Stage,
) -> Callable[[Key, Simulation, Members, Population], tuple[Simulation, RoundMetrics]]:
    """Make the function that runs one round with a cohort that is drawn already (`drawing`).

    Returns:
      ``(key, simulation, (client_ids, present), population) -> (simulation, metrics)``, otherwise
      as of `advance`; the population may hold the examples of these clients alone (`feeding`).
    """
    round_fn = _round_of(stage)

    def advance_fn(key, simulation, members, population):
        _count_clients(simulation, population, None)
        _, work_key = _keys(key, simulation.state.round)
        return _advance(round_fn, work_key, simulation, members, population)

    return advance_fn


def advance_rows(
    stage: Stage,
) -> Callable[
    [Key, RoundState, GivenRows, Members, Population], tuple[RoundState, ClientState, RoundMetrics]
]:
    """Make the function that runs one round with the rows of its cohort, which are kept elsewhere.

    Returns:
      ``(key, state, rows, (client_ids, present), population) -> (state, rows [C, ...], metrics)``.
      The rows of absent clients mean nothing, and are to be written nowhere.
    """
    round_fn = _round_of(stage)

    def advance_fn(key, state, given, members, population):
        populations.check_shapes(population)
        _, work_key = _keys(key, state.round)
        ids, present = members
        is_later = given.places >= 0
        later = trees.take_rows(given.later, jnp.maximum(given.places, 0))
        states = jax.vmap(trees.tree_where)(is_later, later, given.rows)
        cohort = Cohort(client_ids=ids, participated=present, states=states)
        return round_fn(work_key, state, cohort, population)

    return advance_fn


def _keys(key: Key, round: jax.Array) -> tuple[Key, Key]:
    """Make a round's keys: for its cohort, and for its work."""
    sample_key, work_key = jax.random.split(jax.random.fold_in(key, round))
    return sample_key, work_key


def _round_of(stage: Stage) -> RoundFn:
    """Take a stage's round, guarded, and hide what a fed round leaves out, if it reads nobody.

    Else clients whom the stage forgot to name in `reads` would be empty without notice.
    """
    round_fn = stages.guarded(stage.round)
    if stage.reads or stage.cohort == "population":  # all are there
        return round_fn

    def of_cohort_fn(key, state, cohort, population):
        if isinstance(population.whole, Whole):
            population = populations.OfCohort(*population)
        try:
            return round_fn(key, state, cohort, population)
        except populations.NotReadError as error:
            raise ValueError(f"the stage {stage.name!r} {error}") from None

    return of_cohort_fn


def _advance(
    round_fn: RoundFn, key: Key, simulation: Simulation, members: Members, population: Population
) -> tuple[Simulation, RoundMetrics]:
    """Run a round with the rows of its cohort, and write them back."""
    client_ids, present = members
    states = trees.take_rows(simulation.rows, client_ids)
    cohort = Cohort(client_ids=client_ids, participated=present, states=states)
    state, new, metrics = round_fn(key, simulation.state, cohort, population)
    # Absent clients are written back nowhere: a filling slot may bear a present client's id.
    slots = jnp.where(present, client_ids, population.offsets.shape[0])
    # What is written follows from what was read, or XLA would copy everybody's rows, as the order
    # of the two would be open. No version is so small, which XLA cannot know.
    present = present & (states.masks_held > jnp.iinfo(jnp.int32).min)
    new = jax.tree.map(lambda row, old: jax.vmap(jnp.where)(present, row, old), new, states)
    rows = jax.tree.map(lambda old, row: old.at[slots].set(row, mode="drop"), simulation.rows, new)
    return Simulation(state=state, rows=rows), metrics


def _count_clients(simulation: Simulation, population: Population, draw: SamplingFn | None) -> int:
    """Count the population, and see that rows and draws are of as many clients."""
    populations.check_shapes(population)
    num_clients = population.offsets.shape[0] - 1
    if num_clients < 1:
        raise ValueError("the population must have at least one client, got none.")
    if draw is not None:
        _check_drawn(draw, num_clients)
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(simulation.rows)}
    if others := sizes - {num_clients}:
        raise ValueError(
            f"the simulation was started with num_clients={max(others)}, but the population has "
            f"{num_clients} clients."
        )
    return num_clients


def _check_drawn(draw: SamplingFn, num_clients: int) -> None:
    """See that a cohort is drawn from as many clients as there are."""
    drawn = sampling.num_clients_of(draw)
    if drawn not in (None, num_clients):
        raise ValueError(
            f"the cohort is drawn from {drawn} clients, but the population has {num_clients}."
        )


def _draw(draw: SamplingFn, key: Key, num_clients: int) -> tuple[jax.Array, jax.Array]:
    """Draw a cohort; of a function that does not say from whom, only clients are present."""
    given = draw(key)
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ValueError(
            f"participation must give (client_ids, present), got {type(given).__name__}."
        )
    ids, present = map(jnp.asarray, given)
    if ids.ndim != 1 or ids.shape != present.shape or present.dtype != jnp.bool_:
        raise ValueError(
            "participation must give ids and booleans of one shape (cohort_size,), got "
            f"{ids.dtype} {ids.shape} and {present.dtype} {present.shape}."
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"participation must give ids that are integers, got {ids.dtype}.")
    if sampling.num_clients_of(draw) is None:
        ids = ids.astype(jnp.int32)
        is_client = (ids >= 0) & (ids < num_clients)
        # Who is no client has dropped out of nothing, and was sent nothing.
        ids, present = jnp.where(is_client, ids, jnp.full_like(ids, -1)), present & is_client
    return ids, present
