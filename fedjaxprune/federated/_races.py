"""Draws by weight, one client after the other without replacement, that look at few clients.

If client `i` arrives after an exponential time of rate ``w_i``, the first ``C`` to arrive are such
a draw. To find them, clients are grouped so that weights in a group differ by a factor of 2 at
most. Let `u` be the largest weight of a group of `n`. Its *candidates* are called at rate `u` each:
their times in turn are sums of exponentials of rates ``n u``, ``(n - 1) u``, ..., and who they are
is a random permutation. A candidate of weight `w` arrives when it is called with probability
``w / u``; if not, it has to wait for an exponential time of rate `w` more, since exponential times
have no memory. In all this is an exponential time of rate `w`.

Nobody arrives before it is called. So candidates are called in passes, some of each group, until
the ``C`` first arrivals come before everyone who has not been called.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import permutations
from fedjaxprune.types import Key

_DEVIATIONS = 6.0  # of counts that a pass has room for beyond what is expected
_BINS = 32  # for a factor of 2 in weight, where arrivals are foreseen
_BELOW_ONE = np.float32(1.0 - 2.0**-24)


class _Groups(NamedTuple):
    """The clients of positive weight, group by group from heavy to light.

    Attributes:
      members: ``[P]`` int32 ids.
      chances: ``[P]`` float32, weight by the largest of the group.
      begins, sizes: ``[G]`` int32, where a group is among the members.
      log_rates: ``[G]`` float32, logarithm of the largest weight times the time in which the cohort
        is expected to arrive: times are in units of it.
      groups, ranks: ``[M]`` int32, which group's candidate a slot of a pass is for, and which one.
    """

    members: np.ndarray
    chances: np.ndarray
    begins: np.ndarray
    sizes: np.ndarray
    log_rates: np.ndarray
    groups: np.ndarray
    ranks: np.ndarray


def first_arrivals(weights: np.ndarray, cohort_size: int) -> Callable[[Key], jax.Array]:
    """Make the draw ``key -> client_ids [C] int32``, ascending.

    Args:
      weights: ``[N]`` float64, not negative, of which at least `cohort_size` are positive.
      cohort_size: ``C``.
    """
    made = _grouped(weights, cohort_size)
    slots = np.bincount(made.groups, minlength=len(made.sizes)).astype(np.int32)
    lasts = np.cumsum(slots) - 1

    def draw_fn(key):
        order_key, time_key = jax.random.split(key)
        sizes = jnp.asarray(made.sizes)
        pivots, seeds = jax.vmap(permutations.draw)(
            jax.random.split(order_key, len(made.sizes)), sizes
        )

        def go_on(race: _Race):
            return ~(race.times[-1] <= race.horizon)

        def call(race: _Race):
            ranks = race.num_passes * jnp.asarray(slots)[made.groups] + made.ranks
            left = sizes[made.groups] - ranks
            keys = jax.random.split(jax.random.fold_in(time_key, race.num_passes), 3)
            gaps = _exponential(keys[0], ranks.shape) / jnp.maximum(left, 1).astype(jnp.float32)
            gaps = gaps + jnp.where(made.ranks == 0, race.called[made.groups], jnp.float32(0.0))
            called = _sums(gaps, made.ranks == 0)
            places = permutations.walk(
                lambda r: (pivots[made.groups, r], seeds[made.groups, r]),
                jnp.clip(ranks, 0, sizes[made.groups] - 1),
                sizes[made.groups],
            )
            members = made.begins[made.groups] + places
            chances = jnp.asarray(made.chances)[members]
            arrives = jax.random.uniform(keys[1], ranks.shape) < chances
            waits = _exponential(keys[2], ranks.shape) / chances
            times = called + jnp.where(arrives, jnp.float32(0.0), waits)
            times = jnp.log(times) - made.log_rates[made.groups]
            times = jnp.where(left > 0, times, jnp.float32(jnp.inf))
            times = jnp.concatenate([race.times, times])
            ids = jnp.concatenate([race.client_ids, jnp.asarray(made.members)[members]])
            _, best = jax.lax.top_k(-times, cohort_size)
            is_called = (race.num_passes + 1) * slots >= sizes
            waiting = jnp.log(called[lasts]) - made.log_rates
            return _Race(
                num_passes=race.num_passes + 1,
                called=called[lasts],
                times=times[best],
                client_ids=ids[best],
                horizon=jnp.min(jnp.where(is_called, jnp.float32(jnp.inf), waiting)),
            )

        start = _Race(
            num_passes=jnp.int32(0),
            called=jnp.zeros(len(made.sizes), jnp.float32),
            times=jnp.full(cohort_size, jnp.inf, jnp.float32),
            client_ids=jnp.zeros(cohort_size, jnp.int32),
            horizon=jnp.float32(-jnp.inf),
        )
        return jnp.sort(jax.lax.while_loop(go_on, call, start).client_ids)

    return draw_fn


class _Race(NamedTuple):
    """What has happened so far; times of arrival are logarithms.

    Attributes:
      num_passes: ``[]`` int32.
      called: ``[G]`` float32, when the last candidate of each group was called, times its rate.
      times, client_ids: ``[C]``, the first arrivals in turn.
      horizon: ``[]``, before which everyone has been called.
    """

    num_passes: jax.Array
    called: jax.Array
    times: jax.Array
    client_ids: jax.Array
    horizon: jax.Array


def _grouped(weights: np.ndarray, cohort_size: int) -> _Groups:
    """Group the clients, and decide how many candidates of each group a pass calls."""
    positive = np.flatnonzero(weights > 0)
    members = positive[np.argsort(-weights[positive], kind="stable")]
    logs = np.log(weights[members])
    _, begins = np.unique(np.floor((logs[0] - logs) / np.log(2.0)), return_index=True)
    sizes = np.diff(begins, append=len(members))
    largest = logs[begins]
    slots, time = sizes, 0.0 if not np.isfinite(logs).all() else -float(logs[-1])
    room = _with_room(cohort_size)
    if room < len(members):
        time = _time_of(logs, room)
        expected = sizes * _arrived(largest, time)
        slots = np.minimum(sizes, np.ceil(_with_room(expected))).astype(np.int64)
    groups = np.repeat(np.arange(len(sizes)), slots)
    firsts = np.cumsum(slots) - slots
    return _Groups(
        members=members.astype(np.int32),
        chances=np.exp(logs - np.repeat(largest, sizes)).astype(np.float32),
        begins=begins.astype(np.int32),
        sizes=sizes.astype(np.int32),
        log_rates=(largest + time).astype(np.float32),
        groups=groups.astype(np.int32),
        ranks=(np.arange(len(groups)) - np.repeat(firsts, slots)).astype(np.int32),
    )


def _with_room(expected: Any) -> Any:
    """Add what a count may exceed its expectation by."""
    return expected + _DEVIATIONS * np.sqrt(expected) + _DEVIATIONS


def _time_of(logs: np.ndarray, number: float) -> float:
    """Find when so many are expected to have arrived, as a logarithm; `logs` ``[P]`` descend."""
    _, firsts, counts = np.unique(
        np.floor((logs[0] - logs) * (_BINS / np.log(2.0))), return_index=True, return_counts=True
    )
    low, high = -logs[0] - 50.0, -logs[-1] + 50.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        is_late = np.sum(counts * _arrived(logs[firsts], middle)) >= number
        low, high = (low, middle) if is_late else (middle, high)
    return high


def _arrived(log_weights: np.ndarray, log_time: float) -> np.ndarray:
    """Give the probability of having arrived by a time."""
    return -np.expm1(-np.exp(np.minimum(log_weights + log_time, 100.0)))


def _exponential(key: Key, shape: tuple[int, ...]) -> jax.Array:
    """Draw exponential times of mean 1 that are fine near 0, where the first to arrive are."""
    coarse, fine = jax.random.uniform(key, (2, *shape), jnp.float32)
    return -jnp.log1p(-jnp.minimum(coarse + fine * jnp.float32(2.0**-23), _BELOW_ONE))


def _sums(values: jax.Array, begins: jax.Array) -> jax.Array:
    """Add up ``[M]`` from each beginning on."""

    def add(first, second):
        total, has_begun = second
        return jnp.where(has_begun, total, first[0] + total), first[1] | has_begun

    return jax.lax.associative_scan(add, (values, jnp.asarray(begins)))[0]
