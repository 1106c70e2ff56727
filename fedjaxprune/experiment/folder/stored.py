"""The arrays of a checkpoint, read by name.

orbax makes a reader of all arrays for each call, which takes ten times as long as to read a small
one; and of several in one call, all but the first to fail would complain on stderr.
"""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import tensorstore


def reader(folder: pathlib.Path) -> Callable[[Sequence[str]], np.ndarray]:
    """Make the function that reads one array in `folder`, named by the keys that lead to it.

    `declared.check` looks at the folder before. The function raises ValueError, or what else
    TensorStore makes of it, where the array is absent or damaged.
    """
    base = {"driver": "file", "path": f"{folder.absolute()}/"}
    is_packed = (folder / "manifest.ocdbt").exists()
    context = tensorstore.Context()

    def read(name: Sequence[str]) -> np.ndarray:
        path = f"{'.'.join(name)}/"
        if is_packed:
            place = {"driver": "ocdbt", "base": base, "path": path}
        else:
            place = {**base, "path": base["path"] + path}
        spec = {"driver": "auto", "kvstore": place}  # of either version of zarr
        array = tensorstore.open(spec, context=context, open=True).result()
        return np.asarray(array.read().result())

    return read
