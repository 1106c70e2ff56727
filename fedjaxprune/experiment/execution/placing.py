"""Put arrays on all devices of a mesh, which may be those of several processes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def everywhere(mesh: Mesh | None) -> NamedSharding | None:
    """Name the placement of an array that every device holds."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Put a tree on every device of a mesh.

    Of several processes each puts its own copy on its own devices, and nothing is sent: all must
    give the same.
    """
    sharding = everywhere(mesh)
    if mesh is None or sharding is None:
        return tree
    if not mesh.is_multi_process:
        return jax.device_put(tree, sharding)

    def put(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)
