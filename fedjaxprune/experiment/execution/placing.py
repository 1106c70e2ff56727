"""Put arrays on the devices of a mesh, which may be those of several processes."""

from typing import Any, TypeGuard

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


def is_shared(mesh: Mesh | None) -> TypeGuard[Mesh]:
    """Tell whether several processes have the devices, so that each holds its own part alone."""
    return mesh is not None and mesh.is_multi_process


def in_parts(mesh: Mesh) -> NamedSharding:
    """Name the placement of an array of which each device that shares a cohort has a part."""
    return NamedSharding(mesh, PartitionSpec(cohort.AXIS))


def own_parts(mesh: Mesh) -> list[int]:
    """List the parts that this process's devices have."""
    devices = mesh.devices.reshape(mesh.shape[cohort.AXIS], -1)
    here = set(mesh.local_devices)
    return [part for part, of_part in enumerate(devices) if here & set(of_part)]


def place_parts(tree: Any, mesh: Mesh) -> Any:
    """Put parts on the devices of this process; all processes together give all parts.

    Args:
      tree: of arrays of the host, ``[own * n, ...]``, the parts of `own_parts` in their order.
      mesh: of all devices.

    Returns:
      Tree of ``[parts * n, ...]``.
    """
    sharding, own = in_parts(mesh), own_parts(mesh)
    number = mesh.shape[cohort.AXIS]

    def put(leaf: np.ndarray) -> jax.Array:
        size = len(leaf) // len(own)

        def part(index: Any) -> np.ndarray:
            begin = own.index((index[0].start or 0) // size) * size
            return leaf[begin : begin + size]

        return jax.make_array_from_callback((number * size, *leaf.shape[1:]), sharding, part)

    return jax.tree.map(put, tree)


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
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)
