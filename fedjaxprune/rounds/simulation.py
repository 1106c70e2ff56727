"""Rounds over a population whose rows live on the device: sample, gather, run, scatter."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjaxprune import trees
from fedjaxprune.types import (
    Algorithm,
    ClientState,
    Cohort,
    Key,
    Params,
    Population,
    RoundMetrics,
    RoundState,
    Stage,
    State,
)

SamplingFn = Callable[[Key], tuple[jax.Array, jax.Array]]


class Simulation(NamedTuple):
    """Everything that a run needs to continue.

    Attributes:
      state: the server's side.
      rows: the clients' side, tree of ``[N, ...]``.
    """

    state: RoundState
    rows: ClientState


def start(
    algorithm: Algorithm, params: Params, model_state: State, *, num_clients: int
) -> Simulation:
    """Make the simulation in which no client has taken part yet.

    Parameters and state are copied, so that the simulation may be donated.
    """
    own = functools.partial(jax.tree.map, lambda leaf: jnp.array(leaf, dtype=leaf.dtype, copy=True))
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

    Args:
      stage: whose round is run.
      participation: ``key -> (client_ids [C], present [C])``.

    Returns:
      ``(key, simulation, population) -> (simulation, metrics)``.
    """

    def advance_fn(key, simulation, population):
        round_key = jax.random.fold_in(key, simulation.state.round)
        sample_key, work_key = jax.random.split(round_key)
        client_ids, present = participation(sample_key)
        cohort = Cohort(
            client_ids=client_ids,
            participated=present,
            states=trees.take_rows(simulation.rows, client_ids),
        )
        state, new, metrics = stage.round(work_key, simulation.state, cohort, population)
        # Absent clients are written back nowhere: a filling slot may bear a present client's id.
        slots = jnp.where(present, client_ids, population.offsets.shape[0])
        rows = jax.tree.map(
            lambda old, row: old.at[slots].set(row, mode="drop"), simulation.rows, new
        )
        return Simulation(state=state, rows=rows), metrics

    return advance_fn
