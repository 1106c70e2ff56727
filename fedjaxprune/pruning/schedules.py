"""How much is pruned, and in which rounds? Schedules give a sparsity, predicates say when.

A schedule takes a round of any float or integer dtype and answers in floats. Pruners ask in float64
(`evaluate`), so that the number of kept weights is the one that Python would compute: a float32
sparsity cannot count ten million weights exactly.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedjaxprune.types import Schedule

Predicate = Callable[[jax.Array], jax.Array]  # round [] -> bool []


def constant(value: float) -> Schedule:
    """Hold one sparsity in all rounds."""
    _check_sparsity("value", value)
    return lambda round: jnp.full_like(_as_float(round), value)


def linear(
    *, initial_sparsity: float, final_sparsity: float, begin_round: int, end_round: int
) -> Schedule:
    """Move from one sparsity to another at a constant pace; hold the ends outside."""
    sparsities = (initial_sparsity, final_sparsity)
    return _between(sparsities, (begin_round, end_round), lambda progress: 1.0 - progress)


def cubic(
    *, initial_sparsity: float, final_sparsity: float, begin_round: int, end_round: int
) -> Schedule:
    """Move from one sparsity to another, fast at first; hold the ends outside.

    In round t it is ``s_end + (s_begin - s_end) * (1 - (t - begin) / (end - begin)) ** 3``.

    References:
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_, 2017.
    """
    sparsities = (initial_sparsity, final_sparsity)
    return _between(sparsities, (begin_round, end_round), lambda progress: (1.0 - progress) ** 3)


def cosine(
    *, initial_sparsity: float, final_sparsity: float, begin_round: int, end_round: int
) -> Schedule:
    """Move from one sparsity to another along half a cosine; hold the ends outside."""
    sparsities = (initial_sparsity, final_sparsity)
    return _between(
        sparsities,
        (begin_round, end_round),
        lambda progress: 0.5 * (1.0 + jnp.cos(math.pi * progress)),
    )


def listed(sparsities: Sequence[float]) -> Schedule:
    """Take the sparsities of a list, one a round; hold the last one afterwards.

    Raises:
      ValueError: the list is empty, or a sparsity lies outside [0, 1).
    """
    if not sparsities:
        raise ValueError("sparsities must list at least one number, got none.")
    for sparsity in sparsities:
        _check_sparsity("sparsities", sparsity)
    table = np.asarray(sparsities, np.float64)

    def schedule(round: jax.Array) -> jax.Array:
        index = jnp.clip(round.astype(jnp.int32), 0, len(table) - 1)
        return jnp.asarray(table, _as_float(round).dtype)[index]

    return schedule


def linear_steps(sparsity: float, num_steps: int) -> tuple[float, ...]:
    """Prune equal numbers of weights in each of `num_steps` steps: ``sparsity * k / num_steps``."""
    return tuple(sparsity * step / num_steps for step in range(1, num_steps + 1))


def exponential_steps(sparsity: float, num_steps: int) -> tuple[float, ...]:
    """Keep the same fraction of what is left in each step: ``1 - (1 - sparsity) ** (k / steps)``.

    The last of the `num_steps` sparsities is `sparsity` itself, without rounding.

    References:
      de Jorge et al., `FORCE <https://arxiv.org/abs/2006.09081>`_, 2021; Tanaka et al., `SynFlow
      <https://arxiv.org/abs/2006.05467>`_, 2020.
    """
    before = (1.0 - (1.0 - sparsity) ** (step / num_steps) for step in range(1, num_steps))
    return (*before, sparsity)


def every(period: int, *, start: int = 0, until: int | None = None) -> Predicate:
    """Be due every `period` rounds, first in round `start`, last before round `until`.

    Raises:
      ValueError: `period` is below 1, `start` below 0, or `until` not after `start`.
    """
    if period < 1:
        raise ValueError(f"period must be at least 1 round, got {period}.")
    if start < 0:
        raise ValueError(f"start must be a round from 0, got {start}.")
    if until is not None and until <= start:
        raise ValueError(f"until must be a round after start ({start}), got {until}.")

    def predicate(round: jax.Array) -> jax.Array:
        due = (round >= start) & ((round - start) % period == 0)
        return due if until is None else due & (round < until)

    return predicate


def at(*rounds: int) -> Predicate:
    """Be due in these rounds only.

    Raises:
      ValueError: no round is given, or one below 0.
    """
    if not rounds or min(rounds) < 0:
        raise ValueError(f"at takes one or more rounds from 0, got {rounds}.")

    def predicate(round: jax.Array) -> jax.Array:
        return functools.reduce(operator.or_, (round == due for due in rounds))

    return predicate


def evaluate(schedule: Schedule, round: jax.Array) -> jax.Array:
    """Ask a schedule in double precision, whatever JAX's default precision is.

    Args:
      schedule: any; one that answers in float32 is believed to that precision.
      round: ``[]`` int32, may be traced.

    Returns:
      ``[]`` float64.
    """
    with jax.enable_x64(True):
        value = schedule(jax.lax.convert_element_type(round, jnp.float64))
        return jax.lax.convert_element_type(value, jnp.float64)


def num_kept(size: int, sparsity: jax.Array) -> jax.Array:
    """Count what is left of `size` weights: ``size - round(sparsity * size)``, half to even.

    Args:
      size: a Python integer below 2³¹.
      sparsity: ``[]`` float64, as `evaluate` gives it.

    Returns:
      ``[]`` int32 in [0, size].
    """
    with jax.enable_x64(True):
        sparsity = jax.lax.convert_element_type(sparsity, jnp.float64)
        num_pruned = jnp.clip(jnp.round(sparsity * size), 0, size)
        return (size - num_pruned).astype(jnp.int32)


def _as_float(round: jax.Array) -> jax.Array:
    round = jnp.asarray(round)
    return round if jnp.issubdtype(round.dtype, jnp.floating) else round.astype(float)


def _between(sparsities, rounds, left) -> Schedule:
    """Move between two sparsities; `left` maps progress in [0, 1] to the part still to go."""
    (initial, final), (begin, end) = sparsities, rounds
    _check_sparsity("initial_sparsity", initial)
    _check_sparsity("final_sparsity", final)
    if not 0 <= begin < end:
        raise ValueError(
            "begin_round and end_round must be rounds from 0, the end after the beginning, got "
            f"{begin} and {end}."
        )

    def schedule(round: jax.Array) -> jax.Array:
        progress = jnp.clip((_as_float(round) - begin) / (end - begin), 0.0, 1.0)
        return final + (initial - final) * left(progress)

    return schedule


def _check_sparsity(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}.")
