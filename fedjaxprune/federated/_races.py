"""Draws by weight, one client after the other without replacement, that look at few clients.

If client `i` arrives after an exponential time of rate ``w_i``, the first ``C`` to arrive are such
a draw. To find them, clients are grouped so that weights in a group differ by a factor of 2 at
most. Let `u` be the largest weight of a group of `n`. Its clients are called one by one, at rate
`u` each: the times in turn are sums of exponentials of rates ``n u``, ``(n - 1) u``, ..., and who
is called when is a random permutation. A client of weight `w` arrives when it is called with
probability ``w / u``; if not, it has to wait for an exponential time of rate `w` more. Since
exponential times have no memory, in all this is an exponential time of rate `w`.

Nobody arrives before it is called. So clients are called in passes, a few of each group, until the
first ``C`` arrivals are before everyone who has not been called.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune import permutations
from fedjaxprune.types import Key

_PARTS = 16  # groups that a cohort would fill, if all were of one weight
_DEVIATIONS = 6.0  # by which a pass has room for more than the expected number
_BINS = 32  # for a factor of 2 in weight, where arrivals are foreseen
_BELOW_ONE = np.float32(1.0 - 2.0**-24)


class _Groups(NamedTuple):
    """The clients of positive weight, group by group from heavy to light.

    Attributes:
      members: ``[P]`` int32 ids, on the device, as a draw would carry a NumPy array there anew.
      chances: ``[P]`` float32, weight by the largest of the group; on the device.
      begins, sizes: ``[G]`` int32, where a group is among the members.
      log_rates: ``[G]`` float32, logarithm of the group's largest weight, in units of one client
        in the time in which the cohort is expected to arrive.
      width: ``W``, clients of a group that a pass calls.
    """

    members: jax.Array
    chances: jax.Array
    begins: np.ndarray
    sizes: np.ndarray
    log_rates: np.ndarray
    width: int


class _Race(NamedTuple):
    """What has happened so far; times of arrival are logarithms.

    Attributes:
      num_passes: ``[]`` int32.
      called: ``[G]`` float32, when the last one of each group was called, times its rate.
      times, places: ``[C]``, the first arrivals in turn, and where they are among the members.
      horizon: ``[]``, before which everyone has been called.
    """

    num_passes: jax.Array
    called: jax.Array
    times: jax.Array
    places: jax.Array
    horizon: jax.Array


def first_arrivals(weights: np.ndarray, cohort_size: int) -> Callable[[Key], jax.Array]:
    """Make the draw ``key -> client_ids [C] int32``, ascending.

    Args:
      weights: ``[N]`` float64, not negative, of which at least `cohort_size` are positive.
      cohort_size: ``C``.
    """
    groups = _grouped(weights, cohort_size)

    def draw_fn(key):
        order_key, time_key = jax.random.split(key)
        race = _Race(
            num_passes=jnp.int32(0),
            called=jnp.zeros(len(groups.sizes), jnp.float32),
            times=jnp.full(cohort_size, jnp.inf, jnp.float32),
            places=jnp.zeros(cohort_size, jnp.int32),
            horizon=jnp.float32(-jnp.inf),
        )
        race = jax.lax.while_loop(
            lambda race: race.times[-1] > race.horizon,
            lambda race: _call(groups, order_key, time_key, race),
            race,
        )
        return jnp.sort(groups.members[race.places])

    return draw_fn


def _call(groups: _Groups, order_key: Key, time_key: Key, race: _Race) -> _Race:
    """Call the next ``[G, W]`` clients, and keep the first arrivals."""
    sizes, log_rates = jnp.asarray(groups.sizes)[:, None], jnp.asarray(groups.log_rates)[:, None]
    ranks = race.num_passes * groups.width + jnp.arange(groups.width, dtype=jnp.int32)[None]
    left = sizes - ranks  # clients that have not been called before; 0 or less is nobody
    # One draw for all that is random, as each takes long to compile.
    pass_key = jax.random.fold_in(time_key, race.num_passes)
    drawn = _uniform(jax.random.bits(pass_key, (3, *left.shape), jnp.uint32))
    gaps = -jnp.log1p(-drawn[0]) / jnp.maximum(left, 1).astype(jnp.float32)
    called = race.called[:, None] + jnp.cumsum(gaps, axis=1)
    turns = permutations.permute_each(order_key, jnp.minimum(ranks, sizes - 1), sizes[:, 0])
    places = jnp.asarray(groups.begins)[:, None] + turns
    chances = groups.chances[places]
    waits = -jnp.log1p(-drawn[2]) / chances
    times = jnp.log(jnp.where(drawn[1] < chances, called, called + waits)) - log_rates
    times = jnp.where(left > 0, times, jnp.full_like(times, jnp.inf))
    number = len(race.times)
    times, places = _first(times.ravel(), places.ravel(), number)
    # One pass is nearly always enough, and then nothing is joined.
    times, places = jax.lax.cond(
        race.num_passes == 0,
        lambda: (times, places),
        lambda: _first(
            jnp.concatenate([race.times, times]), jnp.concatenate([race.places, places]), number
        ),
    )
    waiting = jnp.log(called[:, -1]) - log_rates[:, 0]
    return _Race(
        num_passes=race.num_passes + 1,
        called=called[:, -1],
        times=times,
        places=places,
        horizon=jnp.min(jnp.where(left[:, -1] > 1, waiting, jnp.full_like(waiting, jnp.inf))),
    )


def _first(times: jax.Array, places: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """Take the `number` earliest of ``[A]`` times and their places; nobody arrives at infinity."""
    lacking = max(0, number - len(times))
    times = jnp.pad(times, (0, lacking), constant_values=jnp.inf)
    _, first = jax.lax.top_k(-times, number)
    return times[first], jnp.pad(places, (0, lacking))[first]


def _grouped(weights: np.ndarray, cohort_size: int) -> _Groups:
    """Group the clients, and decide how many of each group a pass calls."""
    positive = np.flatnonzero(weights > 0)
    members = positive[np.argsort(-weights[positive], kind="stable")]
    logs = np.log(weights[members])
    _, begins, sizes = np.unique(_bins(logs, 1), return_index=True, return_counts=True)
    time = _time_of(logs, min(_with_room(cohort_size), 0.999 * len(logs)))
    # Groups are cut until none expects more than a part of the cohort to be called in that time.
    expected = sizes * _arrived(logs[begins], time)
    num_parts = np.ceil(expected / max(1.0, cohort_size / _PARTS)).astype(np.int64)
    cuts = [
        begin + size * np.arange(parts) // parts
        for begin, size, parts in zip(begins, sizes, np.maximum(num_parts, 1), strict=True)
    ]
    begins = np.concatenate(cuts)
    sizes = np.diff(begins, append=len(logs))
    largest = logs[begins]
    slots = np.minimum(sizes, np.ceil(_with_room(sizes * _arrived(largest, time))))
    return _Groups(
        members=jnp.asarray(members.astype(np.int32)),
        chances=jnp.asarray(np.exp(logs - np.repeat(largest, sizes)).astype(np.float32)),
        begins=begins.astype(np.int32),
        sizes=sizes.astype(np.int32),
        log_rates=(largest + time).astype(np.float32),
        width=int(slots.max()),
    )


def _bins(logs: np.ndarray, number: int) -> np.ndarray:
    """Sort descending logarithms of weights into `number` bins for each factor of 2."""
    return np.floor((logs[0] - logs) * (number / np.log(2.0)))


def _with_room(expected: Any) -> Any:
    """Add what a count may exceed its expectation by."""
    return expected + _DEVIATIONS * np.sqrt(expected) + _DEVIATIONS


def _time_of(logs: np.ndarray, number: float) -> float:
    """Find when so many are expected to have arrived, as a logarithm."""
    _, firsts, counts = np.unique(_bins(logs, _BINS), return_index=True, return_counts=True)
    low, high = -logs[0] - 50.0, -logs[-1] + 50.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        is_late = np.sum(counts * _arrived(logs[firsts], middle)) >= number
        low, high = (low, middle) if is_late else (middle, high)
    return high


def _arrived(log_weights: np.ndarray, log_time: float) -> np.ndarray:
    """Give the probability of having arrived by a time, both as logarithms."""
    return -np.expm1(-np.exp(np.minimum(log_weights + log_time, 100.0)))


def _uniform(bits: jax.Array) -> jax.Array:
    """Make numbers in (0, 1), fine near 0, where the first to arrive are."""
    return jnp.minimum((bits.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32), _BELOW_ONE)
