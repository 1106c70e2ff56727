"""Who takes part in a round: a key to the cohort's ids and presence.

Who is chosen depends on the key alone, so that a resumed run draws the cohorts that it would have
drawn.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedjaxprune import permutations
from fedjaxprune.federated import _races
from fedjaxprune.registry import Part
from fedjaxprune.types import Key

# Up to so many clients each is given a ticket, and the best tickets win: for few that takes less
# time, and less to compile. Beyond, a draw looks at about as many clients as the cohort has.
_FEW = 1024

# key -> (client_ids [C] int32, ascending; present [C] bool)
SamplingFn = Callable[[Key], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)  # `jax.jit` takes no tuple for a function
class Sampling:
    """A `SamplingFn` that says how many clients it draws from, so that a round can compare.

    Attributes:
      choose: ``key -> (client_ids, present)``; ids are distinct and in ``[0, num_clients)``.
      num_clients: ``N``.
    """

    choose: SamplingFn
    num_clients: int

    def __call__(self, key: Key) -> tuple[jax.Array, jax.Array]:
        """Draw a cohort."""
        return self.choose(key)


def num_clients_of(sampling: SamplingFn) -> int | None:
    """Tell how many clients a function draws from; None for one that does not say."""
    return getattr(sampling, "num_clients", None)


def uniform(*, num_clients: int, cohort_size: int) -> Sampling:
    """Choose `cohort_size` of the `num_clients` clients, every cohort being equally likely.

    Of more than 1,024 clients they are the first places of a random permutation, so that a draw
    takes as long as the cohort is large, whatever the population.

    Raises:
      ValueError: if the cohort is empty or larger than the population.
    """
    _check_cohort(cohort_size, num_clients, "clients in the population")

    def choose_among_few(key):
        return _best(jax.random.bits(key, (num_clients,), jnp.uint32), cohort_size)

    def choose_fn(key):
        places = jnp.arange(cohort_size, dtype=jnp.int32)
        client_ids = permutations.permute_each(key, places, jnp.int32(num_clients))
        return jnp.sort(client_ids), jnp.ones(cohort_size, jnp.bool_)

    return Sampling(choose_among_few if num_clients <= _FEW else choose_fn, num_clients)


def weighted(weights: ArrayLike | Sequence[float], *, cohort_size: int) -> Sampling:
    """Choose clients one after the other without replacement, with odds proportional to `weights`.

    For cohorts of more than one client the probability of taking part is therefore less than
    proportional for heavy clients. Up to 1,024 clients the largest ``log(weight) + Gumbel noise``
    are such a draw; of more, a draw looks at a few times as many as the cohort has.

    Args:
      weights: ``[N]``, finite and not negative (numbers of examples, for instance); a client of
        weight 0 is never chosen.
      cohort_size: how many clients take part.

    Raises:
      ValueError: if a weight is negative or not finite, or if the cohort is empty or larger than
        the number of clients with a positive weight.

    References:
      Efraimidis and Spirakis, `Weighted random sampling with a reservoir
      <https://doi.org/10.1016/j.ipl.2005.11.003>`_, 2006.
    """
    values = np.asarray(weights, np.float64)
    if values.ndim != 1:
        raise ValueError(f"weights must have one axis, [N], got the shape {values.shape}.")
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if wrong.size:
        raise ValueError(
            "weights must be finite and not negative, "
            f"got {values[wrong[0]]} for client {wrong[0]} of {values.size}."
        )
    _check_cohort(cohort_size, int(np.sum(values > 0)), "clients with a positive weight")
    if values.size > _FEW:
        draw = _races.first_arrivals(values, int(cohort_size))
        return Sampling(lambda key: (draw(key), jnp.ones(cohort_size, jnp.bool_)), values.size)
    log_weights = np.full(values.shape, -np.inf, np.float32)
    log_weights[values > 0] = np.log(values[values > 0])

    def choose_fn(key):
        noise = jax.random.gumbel(key, log_weights.shape, jnp.float32, mode="high")
        return _best(jnp.asarray(log_weights) + noise, cohort_size)

    return Sampling(choose_fn, values.size)


def all_clients(num_clients: int) -> Sampling:
    """Let all clients take part in every round.

    Raises:
      ValueError: if there are none.
    """
    _check_cohort(num_clients, num_clients, "clients in the population")

    def choose_fn(key):
        del key  # deterministic
        return jnp.arange(num_clients, dtype=jnp.int32), jnp.ones(num_clients, jnp.bool_)

    return Sampling(choose_fn, num_clients)


def same_every_round(key: Key, draw: SamplingFn) -> SamplingFn:
    """Draw the same cohort every time, for exchanges that several rounds make with one cohort.

    Args:
      key: with which it is drawn, in place of the rounds' keys.
      draw: chooses it, drop-outs included.
    """

    def choose_fn(round_key):
        del round_key  # the cohort does not depend on the round
        return draw(key)

    return _like(draw, choose_fn)


def with_dropout(inner: SamplingFn, *, probability: float) -> SamplingFn:
    """Mark each of the clients that `inner` chooses as absent, independently of the others.

    The cohort keeps its size, so that nothing is compiled again; a round may lose all of it.

    Args:
      inner: chooses the cohort.
      probability: that a chosen client fails to report, in [0, 1].

    Raises:
      ValueError: if `probability` is outside [0, 1].
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability must lie in [0, 1], got {probability}.")

    def choose_fn(key):
        choose_key, drop_key = jax.random.split(key)
        client_ids, present = inner(choose_key)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(drop_key, client_ids)
        dropped = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
        return client_ids, present & ~dropped

    return _like(inner, choose_fn)


def _like(inner: SamplingFn, choose: SamplingFn) -> SamplingFn:
    """Say what the inner function says about its clients."""
    number = num_clients_of(inner)
    return choose if number is None else Sampling(choose, number)


def _best(tickets: jax.Array, cohort_size: int) -> tuple[jax.Array, jax.Array]:
    """Take the clients with the largest tickets, in ascending order of their ids."""
    _, client_ids = jax.lax.top_k(tickets, cohort_size)
    return jnp.sort(client_ids.astype(jnp.int32)), jnp.ones(cohort_size, jnp.bool_)


def _check_cohort(cohort_size: int, num_clients: int, which: str) -> None:
    """Refuse a cohort that cannot be drawn."""
    for name, value in (("num_clients", num_clients), ("cohort_size", cohort_size)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ValueError(f"{name} must be a whole number, got {value!r}.")
    if cohort_size < 1:
        raise ValueError(f"cohort_size must be at least 1, got {cohort_size}.")
    if cohort_size > num_clients:
        raise ValueError(
            f"cohort_size must be at most the number of {which}, "
            f"got cohort_size={cohort_size} and {num_clients} {which}."
        )


PARTS = {
    "uniform": Part(
        lambda settings, *, num_clients, cohort_size, sizes: uniform(
            num_clients=num_clients, cohort_size=cohort_size
        ),
        summary="every client alike, without repetition",
    ),
    "weighted": Part(
        lambda settings, *, num_clients, cohort_size, sizes: weighted(
            jnp.asarray(sizes, jnp.float32), cohort_size=cohort_size
        ),
        summary="by the clients' numbers of examples, without repetition",
    ),
}
