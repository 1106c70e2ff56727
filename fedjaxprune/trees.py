"""Parameter-tree arithmetic that optax.tree lacks, and leaf paths."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp


def paths(tree: Any) -> list[str]:
    """List the leaves' paths as ``"dense_1/kernel"``, in the tree's own order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def items(tree: Any) -> list[tuple[str, Any]]:
    """List the leaves with their paths, as `paths` gives them."""
    return list(zip(paths(tree), jax.tree.leaves(tree), strict=True))


def map_with_path(function: Any, tree: Any, *rest: Any) -> Any:
    """Map ``function(path, leaf, *other_leaves)`` over trees, with paths as `paths` gives them."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(
            jax.tree_util.keystr(path, simple=True, separator="/"), *leaves
        ),
        tree,
        *rest,
    )


def sizes(tree: Any) -> list[int]:
    """List the number of elements of every leaf, in Python integers."""
    return [int(leaf.size) for leaf in jax.tree.leaves(tree)]


def tree_sum(tree: Any, *, dtype: Any) -> jax.Array:
    """Add up a tree of numbers ``[]``, in the leaves' order; an empty tree comes to zero."""
    return functools.reduce(jnp.add, jax.tree.leaves(tree), jnp.zeros([], dtype))


def tree_where(condition: jax.Array, on_true: Any, on_false: Any) -> Any:
    """Take one of two trees of the same structure, by one boolean ``[]``."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def all_finite(tree: Any) -> jax.Array:
    """Tell whether no leaf has a NaN or an infinity; integer and boolean leaves always pass.

    A NaN or an infinity less itself is a NaN, and on a CPU floats are summed two to four times as
    fast as bools.
    """
    return functools.reduce(jnp.logical_and, _finite(tree), jnp.bool_(True))


def all_below(tree: Any, bound: float) -> jax.Array:
    """Tell whether all floating-point values are smaller than `bound`, a power of 2, either way.

    It costs what `all_finite` costs: a value that is not smaller overflows when it is scaled. A
    type that cannot represent the bound passes if it is finite.
    """

    def scaled(leaf):
        if not _is_inexact(leaf):
            return leaf
        # The bound becomes the first power of 2 that overflows.
        power = int(jnp.finfo(leaf.dtype).maxexp) - int(math.log2(bound))
        return leaf * jnp.asarray(2.0 ** max(power, 0), leaf.dtype)

    return all_finite(jax.tree.map(scaled, tree))


def stays_finite(before: Any, after: Any) -> jax.Array:
    """Tell whether every leaf that had no NaN or infinity has none now.

    State may begin with an infinity on purpose, such as the best loss so far.
    """
    pairs = zip(_finite(before), _finite(after), strict=True)
    return functools.reduce(jnp.logical_and, (now | ~then for then, now in pairs), jnp.bool_(True))


def _finite(tree: Any) -> list[jax.Array]:
    """Tell of each floating-point leaf whether it has neither NaN nor infinity."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if _is_inexact(leaf)]
    return [jnp.isfinite(jnp.sum(leaf - leaf)) for leaf in floats]


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def clip_norm(tree: Any, bound: float) -> Any:
    """Shorten a tree of floating-point leaves to a Euclidean norm of at most `bound`."""
    wide = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    # The largest value is taken out, as squares of the values themselves may overflow.
    largest = functools.reduce(
        jnp.maximum, (jnp.max(jnp.abs(leaf), initial=0.0) for leaf in wide), jnp.float32(0.0)
    )
    unit = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    squares = tree_sum([jnp.sum(jnp.square(leaf / unit)) for leaf in wide], dtype=jnp.float32)
    norm = jnp.sqrt(squares)  # in units of the largest value
    is_long = norm * unit > bound

    def leaf(value):
        short = value / unit.astype(value.dtype) * (bound / norm).astype(value.dtype)
        return jnp.where(is_long, short, value)

    return jax.tree.map(leaf, tree)


def count(marks: jax.Array) -> jax.Array:
    """Count the True entries of a leaf: ``[]`` int32.

    On a CPU they are added up in bytes, tile by tile, which fuses with the comparison that made
    them; as one sum in int32 it takes four to seven times as long. A leaf of less than a tile is
    one sum everywhere, so that nothing depends on the platform. So is any leaf where a client works
    that devices may share: the rest behind the last tile would travel between these. On a CPU XLA
    lets all devices of the mesh wait for that, and those of other clients may be elsewhere.
    """
    if marks.size < _TILE[0] * _TILE[1] or _may_be_shared():
        return _count_plainly(marks)
    return jax.lax.platform_dependent(marks, cpu=_count_tiles, default=_count_plainly)


def _may_be_shared() -> bool:
    """Tell whether this is traced where some axes of a mesh are left to XLA, and others are not."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.manual_axes) and len(mesh.manual_axes) < len(mesh.axis_names)


_TILE = (64, 128)  # added up along the first axis, in which a byte does not overflow


def _count_tiles(marks):
    height, width = _TILE
    if marks.ndim > 1 and marks.shape[-1] >= width:
        # As it is, since a leaf that devices share must be whole at each of them to be flattened.
        rows, width = marks.reshape(-1, marks.shape[-1]), marks.shape[-1]
        rest = rows.shape[0] % height
        whole, tail = rows[: rows.shape[0] - rest], rows[rows.shape[0] - rest :]
    else:
        flat, rest = marks.ravel(), marks.size % (height * width)
        whole, tail = flat[: marks.size - rest], flat[marks.size - rest :]
    if not whole.size:
        return _count_plainly(tail)
    tiles = jnp.sum(whole.reshape(-1, height, width).astype(jnp.int8), axis=1, dtype=jnp.int8)
    return jnp.sum(tiles, dtype=jnp.int32) + _count_plainly(tail)


def _count_plainly(marks):
    return jnp.sum(marks, dtype=jnp.int32)


def check_shapes(tree: Any, like: Any, *, what: str) -> None:
    """Refuse a tree, named `what`, that has not the structure and the shapes of `like`.

    Raises:
      ValueError: it has another structure, or a leaf of another shape.
    """
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ValueError(f"{what} must be a tree like the parameters, got {_structure(tree)}.")
    for path, leaf, wanted in zip(
        paths(like), jax.tree.leaves(tree), jax.tree.leaves(like), strict=True
    ):
        if jnp.shape(leaf) != jnp.shape(wanted):
            raise ValueError(
                f"{what} must have shape {jnp.shape(wanted)} at {path}, got {jnp.shape(leaf)}."
            )


def _structure(tree: Any) -> str:
    return ", ".join(paths(tree)[:4]) or "no leaves"


def shape_only(tree: Any) -> Any:
    """Keep nothing of a tree but shapes and types: leaves ``[0, ...]``."""
    return jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), tree)


def take_rows(tree: Any, rows: jax.Array | slice | int) -> Any:
    """Take `rows` of every leaf's leading axis."""
    return jax.tree.map(lambda leaf: leaf[rows], tree)
