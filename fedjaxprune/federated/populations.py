"""Check populations and cohorts that were made without `partitions.population` and `sampling`.

What shapes and types tell costs nothing and is checked when a round is traced; what values tell is
checked once, on the host.
"""

import math
from typing import Any, Never

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fedjaxprune import trees
from fedjaxprune.types import Cohort, Population, Whole

_INT32_MAX = 2**31 - 1
_NOT_READ = (
    "looks at clients' examples by itself, of which a fed round has those of its cohort alone, for "
    "`cohort.run`: name the clients in Stage.reads, or set execution.examples device."
)
_MADE = "; data.partitions.population makes one and checks it"


class NotReadError(ValueError):
    """A stage that reads no other client looks at the clients' examples."""


class _Unread:
    """An array of which there is the shape alone; whatever else is asked of it is refused."""

    def __init__(self, leaf: Any) -> None:
        self.shape, self.dtype = jnp.shape(leaf), jnp.result_type(leaf)

    def __getattr__(self, name: str) -> Never:  # jax.numpy asks for `__jax_array__`
        raise NotReadError(_NOT_READ)

    def __getitem__(self, index: Any) -> Never:
        raise NotReadError(_NOT_READ)


class OfCohort(Population):
    """A population that has the examples of a cohort alone, for `cohort.run` and nobody else.

    All other clients are of size 0, so whoever looked one up would be given nothing without notice.
    Of its arrays only the shapes can be seen; `all_of` gives them back.
    """

    __slots__ = ()

    @property
    def examples(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Shapes of the examples."""
        return jax.tree.map(_Unread, self[0])

    @property
    def order(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Shape of the order."""
        return _Unread(self[1])

    @property
    def offsets(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Shape of the offsets, by which clients are counted."""
        return _Unread(self[2])


def all_of(population: Population) -> Population:
    """Give a population whose arrays can be read."""
    return Population(*population)


def check_shapes(population: Population) -> None:
    """Compare the parts of a population, by shapes and types.

    Raises:
      ValueError: the examples' arrays differ in their first axis, or the clients' rows are no two
        vectors of integers.
    """
    sizes = {path or "examples": jnp.shape(x)[:1] for path, x in trees.items(population.examples)}
    if not sizes or () in sizes.values():
        shapeless = next((path for path, size in sizes.items() if not size), "examples")
        raise ValueError(
            "a population's examples must be arrays with an axis of examples, got "
            f"{'a single number' if sizes else 'no array'} in {shapeless!r}{_MADE}."
        )
    if len(set(sizes.values())) > 1:
        each = ", ".join(f"{size} in {path!r}" for path, (size,) in sizes.items())
        raise ValueError(
            f"a population's examples must agree in their first axis, got {each}{_MADE}."
        )
    (num_examples,) = next(iter(sizes.values()))
    num_held = math.prod(jnp.shape(population.order))
    for name, length in (("examples", num_examples), ("order", num_held)):
        if length > _INT32_MAX:
            raise ValueError(
                f"a population's {name} must have at most {_INT32_MAX} entries, as JAX counts them "
                f"in int32, got {length}; give fewer examples, or several populations."
            )
    if num_examples % num_parts(population):
        raise ValueError(
            f"a population's examples must be divided into {num_parts(population)} equal parts, "
            f"got {num_examples}{_MADE}."
        )
    for name in ("order", "offsets"):
        leaf = getattr(population, name)
        dtype, shape = jnp.result_type(leaf), jnp.shape(leaf)
        if len(shape) != 1 or not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(
                f"a population's {name} must be a vector of integers, got {dtype} of shape "
                f"{shape}{_MADE}."
            )


def is_wide(population: Population, *, more_than: int) -> bool:
    """Tell whether all clients together may hold more than so many examples, by shapes alone."""
    if isinstance(population.whole, Whole):
        return population.whole.is_wide
    return population.order.shape[0] > more_than


def num_parts(population: Population) -> int:
    """Count the parts that the examples are divided into, one for each device (`Whole`)."""
    return population.whole.num_parts if isinstance(population.whole, Whole) else 1


def most_clients(population: Population) -> int:
    """Count the clients of a cohort that one part may hold; 0 where there are no parts."""
    return population.whole.most_clients if isinstance(population.whole, Whole) else 0


def num_held(population: Population) -> int:
    """Count the examples that the server holds, ``S``."""
    leaves = jax.tree.leaves(population.held)
    return leaves[0].shape[0] if leaves else 0


def check_values(population: Population) -> None:
    """See that clients hold rows that exist; arrays that are being traced are left alone.

    Raises:
      ValueError: the shapes do not fit (`check_shapes`), the offsets are no sequence that climbs
        within the order, or the order has an index that no example has.
    """
    check_shapes(population)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(population)):
        return
    order, offsets = np.asarray(population.order), np.asarray(population.offsets)
    num_examples = jnp.shape(jax.tree.leaves(population.examples)[0])[0]
    if not (offsets.size and offsets[0] >= 0 and offsets[-1] <= order.size) or np.any(
        offsets[1:] < offsets[:-1]
    ):
        raise ValueError(
            f"a population's offsets must not fall, from 0 to the {order.size} entries of order, "
            f"got {_shown(offsets)}{_MADE}."
        )
    if order.size and not (order.min() >= 0 and order.max() < num_examples):
        raise ValueError(
            f"a population's order must hold rows in [0, {num_examples}), got {order.min()} to "
            f"{order.max()}{_MADE}."
        )


def check_cohort(cohort: Cohort) -> None:
    """Compare the parts of a cohort, by shapes and types.

    Raises:
      ValueError: ids, presence and rows are not of the same clients.
    """
    ids, present = cohort.client_ids, cohort.participated
    shape = jnp.shape(ids)
    if len(shape) != 1 or not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
        raise ValueError(
            "a cohort's client_ids must be a vector of integers, got "
            f"{jnp.result_type(ids)} of shape {shape}."
        )
    if jnp.shape(present) != shape or jnp.result_type(present) != jnp.bool_:
        raise ValueError(
            f"a cohort's participated must be booleans of shape {shape}, as its client_ids, got "
            f"{jnp.result_type(present)} of shape {jnp.shape(present)}."
        )
    for path, leaf in trees.items(cohort.states):
        if jnp.shape(leaf)[:1] != shape:
            raise ValueError(
                f"a cohort's states must have a row for each of its {shape[0]} clients, got shape "
                f"{jnp.shape(leaf)} in {path!r}."
            )


def _shown(values: np.ndarray) -> str:
    first = ", ".join(map(str, values[:6].tolist()))
    return f"[{first}{', ...' if values.size > 6 else ''}]"
