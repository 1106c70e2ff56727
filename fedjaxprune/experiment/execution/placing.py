"""Put arrays on all devices of a mesh, which may be those of several processes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedjaxprune.federated import cohort
from fedjaxprune.rounds import placement
from fedjaxprune.rounds.simulation import Simulation


def everywhere(mesh: Mesh | None) -> NamedSharding | None:
    """Name the placement of an array that every device holds."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def of_simulation(now: Simulation, mesh: Mesh | None) -> Any:
    """Name the placement of a simulation: everywhere, or in parts where devices share a model."""
    if mesh is None or cohort.MODEL_AXIS not in mesh.axis_names:
        return everywhere(mesh)
    return placement.of_simulation(now, mesh)


def shapes(tree: Any, where: Any) -> Any:
    """Give the shapes of a tree of arrays, placed as one placement or a tree of them says."""

    def shape(leaf: Any, place: NamedSharding | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    if where is None or isinstance(where, NamedSharding):
        return jax.tree.map(lambda leaf: shape(leaf, where), tree)
    return jax.tree.map(shape, tree, where)


def place(tree: Any, mesh: Mesh | None, where: Any = None) -> Any:
    """Put a tree on every device of a mesh, or where a placement or a tree of them says.

    Without a mesh there is one device. Of several processes each puts its own copy on its own
    devices, and nothing is sent: all must give the same.
    """
    sharding = everywhere(mesh)
    if mesh is None or sharding is None:
        return jax.device_put(tree)
    if not mesh.is_multi_process:
        return jax.device_put(tree, sharding if where is None else where)

    def put(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)
