"""What a method does in all its stages, recorded once, so that laws can be read off it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune.method import Method
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.testing import scenario
from fedjaxprune.types import (
    Cohort,
    Downlink,
    Masks,
    Params,
    RoundMetrics,
    RoundState,
    State,
    Uplink,
)

SEED = 3
# (index, state, rows, members, population=...) -> (state, rows, metrics): any round
RunFn = Callable[..., tuple[RoundState, Any, RoundMetrics]]


class Members(NamedTuple):
    """Who is asked in a round: ids, and who of them takes part."""

    client_ids: tuple[int, ...]
    participated: tuple[bool, ...]


class Step(NamedTuple):
    """One round; rows are those of all clients, ``[N, ...]``, on the host."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    stage: str
    members: Members
    before: RoundState
    rows_before: Any
    after: RoundState
    rows: Any
    metrics: RoundMetrics


class History(NamedTuple):
    """All stages of a method and six rounds of training."""

    scenario: scenario.Scenario
    run: RunFn
    steps: tuple[Step, ...]
    num_traces: tuple[int, ...]  # of each stage's round
    num_before: int  # rounds before training


class Remembered(NamedTuple):
    """A client's memory of its uplink, and what it sent last."""

    inner: State
    delta: Params
    sent: Masks


def remember(uplink: Uplink) -> Uplink:
    """Let each client keep what it has sent, so that it can be encoded and compared."""

    def init(params):
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.bool_), params)
        return Remembered(uplink.init(params), jax.tree.map(jnp.zeros_like, params), nothing)

    def update(key, delta, state, masks):
        delta, inner = uplink.update(key, delta, state.inner, masks)
        return delta, Remembered(inner, delta, masks)

    return uplink._replace(init=init, update=update)


class Shown(NamedTuple):
    """The server's memory of its downlink, and what clients saw last."""

    inner: State
    seen: Params
    received: Masks


def remember_shown(downlink: Downlink) -> Downlink:
    """Let the server keep what clients saw, so that it can be encoded and compared."""

    def init(params):
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.bool_), params)
        return Shown(downlink.init(params), jax.tree.map(jnp.zeros_like, params), nothing)

    def update(key, params, state, masks):
        seen, inner = downlink.update(key, params, state.inner, masks)
        return seen, Shown(inner, seen, masks)

    of_version, of_due, of_restart = downlink.version, downlink.due, downlink.restart
    return downlink._replace(
        init=init,
        update=update,
        version=None if of_version is None else lambda state: of_version(state.inner),
        due=None if of_due is None else lambda state, held: of_due(state.inner, held),
        restart=None
        if of_restart is None
        else lambda state: state._replace(inner=of_restart(state.inner)),
    )


def record(
    method: Method,
    settings: Mapping[str, Any],
    protocol: Mapping[str, Any] = scenario.PROTOCOL,
    **changes: Any,
) -> History:
    """Play all stages before training and six rounds of training; `changes` are the protocol's."""

    def adapt(given: Protocol) -> Protocol:
        assert given.uplink is not None
        shown = None if given.downlink is None else remember_shown(given.downlink)
        return given._replace(uplink=remember(given.uplink), downlink=shown, **changes)

    made = scenario.make(method, settings, protocol, adapt=adapt)
    run, traces = player(made)
    state, rows = start(made)
    *earlier, last = made.algorithm.stages
    before = [stage.name for stage in earlier for _ in range(stage.num_rounds)]
    steps = []
    for index, name in enumerate([*before, *[last.name] * scenario.NUM_ROUNDS]):
        members = half(index)
        after, new, metrics = run(index, state, rows, members)
        steps.append(Step(index, name, members, state, rows, after, new, metrics))
        state, rows = after, new
    return History(made, run, tuple(steps), tuple(traces), len(before))


def start(made: scenario.Scenario) -> tuple[RoundState, Any]:
    """Make the state at the start, and the rows of clients that never took part."""
    algorithm, given = made.algorithm, (made.params, made.model_state)
    state, row = jax.jit(lambda p, s: (algorithm.init(p, s), algorithm.init_client(p)))(*given)

    def repeat(leaf):
        return np.broadcast_to(leaf, (len(scenario.SIZES), *leaf.shape))

    return state, jax.tree.map(repeat, jax.device_get(row))


def player(made: scenario.Scenario) -> tuple[RunFn, Sequence[int]]:
    """Make ``run``, which runs any round of any stage, and how often each stage was traced."""
    stages = made.algorithm.stages
    ends = np.cumsum([stage.num_rounds for stage in stages])
    traces = [0] * len(stages)

    def counted(number, *arguments):
        traces[number] += 1
        return stages[number].round(*arguments)

    rounds = [jax.jit(functools.partial(counted, number)) for number in range(len(stages))]

    def run(index, state, rows, members, population=None):
        ids = np.asarray(members.client_ids, np.int32)
        cohort = Cohort(
            client_ids=jnp.asarray(ids),
            participated=jnp.asarray(members.participated),
            states=jax.tree.map(lambda leaf: leaf[ids], rows),
        )
        number = min(int(np.searchsorted(ends, int(state.round), side="right")), len(stages) - 1)
        key = jax.random.fold_in(jax.random.key(SEED), index)
        people = population or scenario.population()
        after, own, metrics = rounds[number](key, state, cohort, people)

        def put(all_rows, new):
            result = np.array(all_rows)
            result[ids] = new
            return result

        return after, jax.tree.map(put, rows, jax.device_get(own)), jax.device_get(metrics)

    return run, traces


def half(index: int) -> Members:
    """Let everybody take part, then half of them, so that absentees have something to lose."""
    ids = tuple((index + j) % 6 for j in range(4))
    return Members(ids, (index % 2 == 0, True, index % 2 == 0, True))


def beside_others(members: Members) -> Members:
    """Put clients that were not asked in the places of those who are absent."""
    others = iter(sorted(set(range(len(scenario.SIZES))) - set(members.client_ids)))
    slots = zip(*members, strict=True)
    ids = tuple(client if here else next(others) for client, here in slots)
    return Members(ids, members.participated)
