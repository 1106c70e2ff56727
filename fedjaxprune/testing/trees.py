"""Trees of arrays, compared on the host."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def pruned(leaf: Any, mask: Any) -> np.ndarray:
    """Give the entries that a mask prunes."""
    return np.asarray(leaf)[~np.asarray(mask)]


def held(tree: Any, masks: Any) -> bool:
    """Tell whether a tree has values other than zero where masks prune."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(masks), strict=True)
    return any(np.any(pruned(leaf, mask)) for leaf, mask in pairs)


def take(rows: Any, clients: Any) -> Any:
    """Give what some clients, or one, remember."""
    return jax.tree.map(lambda leaf: leaf[clients], rows)


def difference(found: Any, wanted: Any, *, rtol: float = 0.0, atol: float = 0.0) -> str:
    """Say where two trees differ; numbers that are not floating must be equal."""
    if jax.tree.structure(found) != jax.tree.structure(wanted):
        return "another structure"
    paths = jax.tree_util.tree_leaves_with_path(wanted)
    for (path, right), left in zip(paths, jax.tree.leaves(found), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        one, two = (_on_host(leaf) for leaf in (left, right))
        if one.shape != two.shape or one.dtype != two.dtype:
            return f"{name} is {one.dtype}{one.shape}, not {two.dtype}{two.shape}"
        if not jnp.issubdtype(one.dtype, jnp.floating):
            if not np.array_equal(one, two):
                return f"{name} differs"
            continue
        wide = [each.astype(np.float64) for each in (one, two)]
        if not np.allclose(*wide, rtol=rtol, atol=atol, equal_nan=True):
            return f"{name} differs by up to {np.nanmax(np.abs(wide[0] - wide[1])):.3g}"
    return ""


def _on_host(leaf: Any) -> np.ndarray:
    """Make an array of numpy, of a key the numbers that it is."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)
