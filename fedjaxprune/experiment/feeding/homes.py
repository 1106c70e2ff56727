"""Which process keeps the rows of which clients, and how a cohort's rows come together.

Client `i` is at home with process ``i % P``, which alone keeps its row. Where a client is trained
does not depend on that: a round's devices share its clients out by examples. So rows of a cohort
are read at their homes, added up in the round (of each row one process has more than zeros), and
written at their homes again.
"""

import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fedjaxprune.experiment.execution import placing
from fedjaxprune.federated import cohort

_OF_PART = re.compile(r"([0-9]+)-of-([0-9]+)")  # name of a process's folder of saved rows


class Home(NamedTuple):
    """A process among those that keep rows: it has client `i` if ``i % number == process``."""

    process: int = 0
    number: int = 1


def count(home: Home, num_clients: int) -> int:
    """Count the clients that are at home there."""
    return len(range(home.process, num_clients, home.number))


def is_own(home: Home, ids: np.ndarray) -> np.ndarray:
    """Tell which clients are at home there."""
    return ids % home.number == home.process


def places(home: Home, ids: np.ndarray) -> np.ndarray:
    """Number clients that are at home there from 0."""
    return ids // home.number


def ids(home: Home, places: np.ndarray) -> np.ndarray:
    """Undo `places`."""
    return places * home.number + home.process


def folder(saved: pathlib.Path, home: Home) -> pathlib.Path:
    """Name the folder in which a process saves rows; one that is alone needs none of its own."""
    return saved if home.number == 1 else saved / f"{home.process}-of-{home.number}"


def all_homes(saved: pathlib.Path) -> Iterator[list[Home]]:
    """List the processes that have a folder of saved rows, those of one time together.

    That which was alone is listed first, and always.
    """
    yield [Home()]
    teams: dict[int, list[Home]] = {}
    for match in map(_OF_PART.fullmatch, (place.name for place in saved.glob("*-of-*"))):
        if match:
            teams.setdefault(int(match[2]), []).append(Home(int(match[1]), int(match[2])))
    for number in sorted(teams):
        yield sorted(teams[number])


def place_rows(rows: Any, mesh: Mesh) -> Any:
    """Put what one process has of a cohort's rows on its devices, for `joined`.

    Args:
      rows: tree of NumPy arrays ``[C, ...]``, zero where a client is at home elsewhere.
      mesh: of all devices.

    Returns:
      Tree of ``[devices * C, ...]``: the rows on the process's first device, zeros on the others.
    """
    number = len(placing.own_parts(mesh))

    def spread(leaf: np.ndarray) -> np.ndarray:
        made = np.zeros((number * len(leaf), *leaf.shape[1:]), leaf.dtype)
        made[: len(leaf)] = leaf
        return made

    return placing.place_parts(jax.tree.map(spread, rows), mesh)


def joined(rows: Any, mesh: Mesh) -> Any:
    """Give every device the rows of a cohort, ``[C, ...]``, inside a round.

    Bits are added up, not numbers, as minus zero would become zero.
    """

    def add(leaf: jax.Array) -> jax.Array:
        size = 8 * leaf.dtype.itemsize
        if leaf.dtype == jnp.bool_:
            return jax.lax.psum(leaf.astype(jnp.uint8), cohort.AXIS).astype(jnp.bool_)
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{size}"))
        # Collectives on CPUs know no integers of 16 bits.
        total = jax.lax.psum(bits.astype(jnp.uint32) if size == 16 else bits, cohort.AXIS)
        return jax.lax.bitcast_convert_type(total.astype(bits.dtype), leaf.dtype)

    return jax.shard_map(
        lambda tree: jax.tree.map(add, tree),
        mesh=mesh,
        in_specs=PartitionSpec(cohort.AXIS),
        out_specs=PartitionSpec(),
        axis_names={cohort.AXIS},
        check_vma=False,  # the sums are alike on all devices
    )(rows)
