"""``network.json``: what a run folder says of its network, so that it can be read without the data.

It has the shapes of the parameters and how examples, as the data set stores them, become inputs.
"""

import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjaxprune import trees
from fedjaxprune.errors import RunFolderError
from fedjaxprune.experiment import reading
from fedjaxprune.experiment.folder.layout import NETWORK, SCHEMA

_LARGEST = 2**28  # entries of an example


class Network(NamedTuple):
    """What is known of a network and its data, in plain values."""

    task: str  # what the labels are, as `Dataset.task`
    input_shape: tuple[int, ...]  # of an example as stored
    input_dtype: str  # of it
    num_outputs: int  # width of the output
    num_classes: int  # 0 for a regression
    # ``(T,)`` where a sequence has a label at each position, else ``()``
    positions: tuple[int, ...]
    max_value: float | None  # by which stored inputs are divided; None: they are used as they are
    mean: tuple[float, ...] | None  # subtracted after that, by channel; None where nothing is
    std: tuple[float, ...] | None  # divided by after that
    # by path, the type and shape of every parameter, such as ``["float32", [64, 10]]``
    params: dict[str, Any]
    state: dict[str, Any]  # likewise of what is not trained
    prunable: tuple[str, ...]  # paths of the parameters whose sparsity is on record
    data_checksum: int  # of a sample of the examples
    # of all of them, and of who holds which; None in the folder of a version without it
    population_checksum: int | None = None
    class_names: tuple[str, ...] = ()  # what outputs, and tokens, stand for; empty: not known


def shapes(tree: Any) -> dict[str, list[Any]]:
    """Write down types and shapes of a tree of arrays, by path."""
    leaves = zip(trees.paths(tree), jax.tree.leaves(tree), strict=True)
    return {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves}


def to_text(network: Network) -> str:
    """Write it as JSON."""
    return json.dumps({"schema": SCHEMA, **network._asdict()}, indent=1) + "\n"


def read(folder: pathlib.Path) -> Network:
    """Read what a run folder says of its network."""
    path = folder / NETWORK
    try:
        found = reading.from_json(reading.text(path, may_link=False))
        if found.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        lists = {name: tuple(one) for name, one in found.items() if isinstance(one, list)}
        known = Network(**{**found, **lists})
        _check(known)
        return known
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise RunFolderError(
            f"{str(path)!r} cannot be read: it is missing, damaged or of another version."
        ) from None


def _check(known: Network) -> None:
    """Raise unless fields are of their types, and an example of a size that fits a memory."""
    shapes = [known.input_shape, known.positions]
    for tree in (known.params, known.state):
        for dtype, shape in tree.values():
            jax.numpy.dtype(dtype)
            shapes.append(shape)
    sizes = [known.num_outputs, known.num_classes, *(size for shape in shapes for size in shape)]
    if not all(isinstance(one, int) and 0 <= one < 2**31 for one in sizes):
        raise ValueError("a size is no size")
    if math.prod(known.input_shape) > _LARGEST or math.prod(known.positions) > _LARGEST:
        raise ValueError("an example is too large")
    if not isinstance(known.population_checksum, int | None):
        raise ValueError("a checksum is no number")
    if not all(isinstance(name, str) for name in known.class_names):
        raise ValueError("a name of a class is no text")
    if np.dtype(known.input_dtype).kind not in "fiub":
        raise ValueError("inputs are no numbers")


def check_same(now: Network, folder: pathlib.Path) -> None:
    """Refuse to continue with another network or other data than those of the run in `folder`."""
    then = read(folder)
    for what in ("params", "state"):
        old, new = getattr(then, what), getattr(now, what)
        for path in dict.fromkeys([*old, *new]):
            if old.get(path) != new.get(path):
                raise RunFolderError(
                    f"the network is not that of the run in {str(folder)!r}: {path} is "
                    f"{_shape(new.get(path))} now and {_shape(old.get(path))} in the run."
                )
    is_known = then.population_checksum is not None
    if now.data_checksum != then.data_checksum or (
        is_known and now.population_checksum != then.population_checksum
    ):
        raise RunFolderError(f"the data are not those of the run in {str(folder)!r}.")


def _shape(entry: Any) -> str:
    return "absent" if entry is None else f"{entry[0]} {tuple(entry[1])}"
