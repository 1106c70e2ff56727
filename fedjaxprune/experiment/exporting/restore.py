"""A run's network, brought back from its folder without touching anything in it.

What the network is built by and the checkpoint are read, not the data: what the network must know
of them is in the run folder (`network.json`).
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjaxprune.data import transforms
from fedjaxprune.data.datasets import Dataset
from fedjaxprune.errors import RunFolderError
from fedjaxprune.experiment import reading
from fedjaxprune.experiment.config import files, resolve
from fedjaxprune.experiment.config.sections import PLACES
from fedjaxprune.experiment.exporting import safetensors
from fedjaxprune.experiment.folder import checkpoints, layout, load, lock, network, record
from fedjaxprune.experiment.folder.network import Network
from fedjaxprune.experiment.run import composing
from fedjaxprune.registry import Found, as_started_in, find
from fedjaxprune.types import Model, Params, State


class Finished(NamedTuple):
    """What a run has come to."""

    stored: files.Stored  # its config
    network: Network  # what its folder says of the network and the data
    model: Model
    preprocess: transforms.Preprocess  # of examples as stored, for tests
    arrays: checkpoints.Finished
    record: record.Record  # up to the checkpoint


def from_folder(
    folder: pathlib.Path, *, model: Found | None = None, warn: Callable[[str], object] | None = None
) -> Finished:
    """Read the newest checkpoint of a run that is whole; the run may still be going on.

    `model` builds the network, where the run was given a value in Python; `warn` takes a sentence
    about each checkpoint that cannot be read, and one if the network's code has changed.
    """
    check(folder)
    known = network.read(folder)
    stored = layout.stored(folder)
    keep = stored.values["checkpoints"].get("keep")
    checkpoints.check_number(folder / layout.CHECKPOINTS, keep)
    found = record.read(folder)
    if not found.header:
        raise RunFolderError(f"the run in {str(folder)!r} has no record ({layout.METRICS}).")
    built, preprocess = _model(folder, known, model, warn)
    params, state = jax.eval_shape(built.init, jax.random.key(0))
    network.check_same(
        known._replace(params=network.shapes(params), state=network.shapes(state)), folder
    )
    arrays = read(folder, params, state, warn=warn)
    found = found._replace(lines=found.lines[: arrays.num_rounds])
    return Finished(stored, known, built, preprocess, arrays, found)


def read(
    folder: pathlib.Path, params: Any, state: Any, *, warn: Callable[[str], object] | None = None
) -> checkpoints.Finished:
    """Read a network from the newest checkpoint that is whole; trees of shapes say what it is."""
    found = checkpoints.read_network(
        folder / layout.CHECKPOINTS, params, state, warn=warn or (lambda text: None)
    )
    if found is None:
        raise RunFolderError(
            f"no checkpoint of the run in {str(folder)!r} can be read: its newest ones are damaged."
        )
    return found


def arrays_of(folder: pathlib.Path) -> checkpoints.Finished:
    """Read parameters, masks and state as nested dicts, without what builds the network."""

    def nest(shapes: Mapping[str, Any]) -> dict[str, Any]:
        leaves = {path: jax.ShapeDtypeStruct(s, dtype) for path, (dtype, s) in shapes.items()}
        return safetensors.nest(leaves)

    check(folder)
    known = network.read(folder)
    return read(folder, nest(known.params), nest(known.state))


def model_of(folder: pathlib.Path, *, model: Found | None = None) -> Model:
    """Build the network of a run, which imports its code."""
    return _model(folder, network.read(folder), model, None)[0]


def _model(
    folder: pathlib.Path,
    known: Network,
    given: Found | None,
    warn: Callable[[str], object] | None,
) -> tuple[Model, transforms.Preprocess]:
    """Build the network and the preprocessing of tests by what the run folder says."""
    stored = layout.stored(folder)
    section = dict(stored.values["model"])
    name = section.pop("name")
    if given is None and stored.parts.get("model", {}).get("source") == "value":
        raise RunFolderError(
            f"model of the run in {str(folder)!r} was a value given in Python ({name}): give it "
            "again, as model=..."
        )
    with as_started_in(stored.started_in):
        found = find(PLACES["model"].kind, given or name, path="model")
    source = str(folder / layout.CONFIG)
    settings = resolve.settings_of(found, section, path="model", source=source)
    then = {path: one for path, one in stored.parts.items() if path == "model"}
    if warn and (other := files.code_changes(then, {"model": files.origin_of(found)})):
        warn(other)
    # Of the data only what the network must know: one example of each split, as stored.
    labels = (known.num_outputs,) if known.task == "regression" else known.positions
    one = {
        "inputs": np.zeros((1, *known.input_shape), known.input_dtype),
        "labels": np.zeros((1, *labels), np.int32),
    }
    dataset = Dataset(
        name=stored.values["data"]["dataset"]["name"],
        train=one,
        test=one,
        task=known.task,  # pyright: ignore[reportArgumentType]
        num_classes=known.num_classes,
        input_shape=known.input_shape,
        max_value=known.max_value,
        mean=known.mean,
        std=known.std,
    )
    preprocess = transforms.for_dataset(dataset, augment=False)[1]
    make = functools.partial(found.part.build, settings)
    made = composing.make_model(make, dataset, preprocess=preprocess, what=f"model {name!r}")
    return made, preprocess


def check(folder: pathlib.Path) -> None:
    """See that a folder holds a run with a checkpoint, before anything heavy is done."""
    if not load.is_run(folder):
        raise load.no_run(folder)
    try:
        reading.check_own(folder, layout.OWN, checkpoints=layout.CHECKPOINTS)
    except OSError as error:
        raise RunFolderError(f"cannot read {str(error.filename)!r}: {error.strerror}.") from None
    found = folder / layout.CHECKPOINTS
    if not found.is_dir() or not any(entry.name.isdigit() for entry in found.iterdir()):
        what = f"continue it with `fedjaxprune run --resume {folder}`"
        if lock.is_held(folder):
            what = "it is still going: wait for one"
        raise RunFolderError(
            f"the run in {str(folder)!r} has no checkpoint, so there is no network to take out of "
            f"it; {what}."
        )


def predict_stored(
    predict: Callable[[Params, State, Any], jax.Array], preprocess: transforms.Preprocess
) -> Callable[[Params, State, Any], jax.Array]:
    """Make a network take inputs as the data set stores them."""

    def predict_fn(params: Params, state: State, inputs: Any) -> jax.Array:
        key = jax.random.key(0)  # preprocessing for tests is deterministic and reads no key
        return predict(params, state, preprocess(key, inputs))

    return predict_fn


def random_inputs(known: Network, number: int) -> np.ndarray:
    """Make inputs as the data set stores them: what they show does not matter."""
    rng = np.random.default_rng(0)
    shape, dtype = (number, *known.input_shape), np.dtype(known.input_dtype)
    if np.issubdtype(dtype, np.floating):
        return rng.standard_normal(shape).astype(dtype)
    largest = known.num_classes - 1 if known.max_value is None else int(known.max_value)
    return rng.integers(0, max(1, largest) + 1, shape).astype(dtype)
