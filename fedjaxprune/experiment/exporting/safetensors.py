"""Trees of arrays as a safetensors file, pruned entries left out.

Every leaf is a tensor under its path. One that masks prune is stored by its live values alone,
``PATH.values`` ``[k]`` in row-major order, and its mask, ``PATH.mask`` ``[ceil(size / 8)]`` uint8,
a bit an entry, the most significant first, as ``numpy.packbits`` writes them; where that would not
be shorter, whole with the mask beside it. Shapes of such leaves are in the file's metadata, under
``shapes``, as JSON. The safetensors library alone reads it; `read` puts it together again.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedjaxprune import trees
from fedjaxprune.errors import RunFolderError
from fedjaxprune.experiment import reading
from fedjaxprune.types import Masks

FORMAT, VERSION = "fedjaxprune", "1"
VALUES, MASK = ".values", ".mask"


def flatten(tree: Any, prefix: str) -> dict[str, np.ndarray]:
    """Name the leaves of a tree by their paths, after a prefix."""
    import jax

    leaves = jax.device_get(jax.tree.leaves(tree))
    return {
        f"{prefix}/{path}" if path else prefix: np.ascontiguousarray(leaf)
        for path, leaf in zip(trees.paths(tree), leaves, strict=True)
    }


def encode(
    arrays: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Make tensors and metadata of named arrays and of the masks that some of them have."""
    tensors: dict[str, np.ndarray] = {}
    shapes = {}
    for name, array in arrays.items():
        mask = masks.get(name)
        if mask is None or mask.all():
            tensors[name] = array
            continue
        shapes[name] = list(array.shape)
        tensors[name + MASK] = np.packbits(mask)
        if mask.sum() * array.itemsize + tensors[name + MASK].size < array.nbytes:
            tensors[name + VALUES] = array[mask]
        else:
            tensors[name] = array
    return tensors, {"format": FORMAT, "version": VERSION, "shapes": json.dumps(shapes)}


def decode(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Undo `encode`: named arrays, and masks of all of them."""
    shapes = reading.from_json(metadata["shapes"])
    arrays, masks = {}, {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        if not 0 <= size <= 8 * tensors[name + MASK].size:  # else a few bytes could claim memory
            raise ValueError("a shape and its mask do not fit")
        mask = np.unpackbits(tensors[name + MASK], count=size).astype(bool).reshape(shape)
        if name + VALUES in tensors:
            values = tensors[name + VALUES]
            arrays[name] = np.zeros(shape, values.dtype)
            arrays[name][mask] = values
        else:
            arrays[name] = np.asarray(tensors[name])
        masks[name] = mask
    for name, tensor in tensors.items():
        if name.removesuffix(MASK).removesuffix(VALUES) not in shapes:
            arrays[name] = np.asarray(tensor)
            masks[name] = np.ones(tensor.shape, bool)
    return arrays, masks


def write(path: pathlib.Path, params: Any, masks: Masks, rest: Mapping[str, Any]) -> None:
    """Write parameters under the name ``params``, their masks, and other trees by name."""
    from safetensors import numpy as safetensors_numpy

    arrays = flatten(params, "params")
    for name, tree in rest.items():
        arrays |= flatten(tree, name)
    tensors, metadata = encode(arrays, flatten(masks, "params"))
    path.write_bytes(safetensors_numpy.save(tensors, metadata=metadata))


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a network: nested dicts of arrays, and masks of the same structure."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
                raise RunFolderError(f"{str(path)!r} is not an exported network of this version.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        arrays, masks = decode(tensors, metadata)
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(
            f"{str(path)!r} cannot be read: it is damaged or no such file."
        ) from None
    return nest(arrays), nest(masks)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn paths into nested dicts."""
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parts, last = path.split("/")
        inner = nested
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = leaf
    return nested
