"""Take a network out of a run: compacted, as files that others can read.

::

    model.safetensors   parameters under their masks, state, and the constants of what is gone
    model.stablehlo     the network with its weights, serialized by ``jax.export``, for any batch
    README.md           the model card
    config.yaml         of the run

The folder appears whole or not at all.
"""

import functools
import importlib.util
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from fedjaxprune import masks as masks_lib
from fedjaxprune.errors import RunFolderError
from fedjaxprune.experiment.exporting import model_card, restore, safetensors
from fedjaxprune.experiment.folder import layout, load
from fedjaxprune.registry import Found
from fedjaxprune.structure.compaction import compact
from fedjaxprune.types import Params, State

TENSORS, PROGRAM, CARD, CONFIG = "model.safetensors", load.EXPORTED, "README.md", "config.yaml"
NEEDED = ("safetensors", "flatbuffers")  # of the extra `export`
PLATFORMS = ("cpu", "cuda", "tpu")
CHECKED = 200  # random inputs on which the exported network is compared with the run's
TOLERANCE = 1e-5  # of the largest output


class Loaded(NamedTuple):
    """A network to be used."""

    # ``inputs [B, ...], as the data set stores them, -> logits [B, classes]``
    predict: Callable[[Any], jax.Array]
    params: Params  # pruned entries exact zeros; nested dicts
    masks: Any  # of the parameters
    state: State  # what is not trained
    folder: pathlib.Path  # where it came from


def export(
    run: pathlib.Path,
    out: pathlib.Path,
    *,
    model: Found | None = None,
    warn: Callable[[str], object] | None = None,
) -> model_card.Facts:
    """Write the network of a run's newest checkpoint, compacted, into a new folder.

    The data set is not needed. `model` builds the network, where the run was given a value in
    Python; `warn` takes sentences about checkpoints that cannot be read.
    """
    check_packages()
    restore.check(run)
    if os.path.lexists(out):
        raise RunFolderError(f"{str(out)!r} exists; give a folder that does not.")
    found = restore.from_folder(run, model=model, warn=warn)
    _, params, masks, state = found.arrays
    two = jax.ShapeDtypeStruct((2, *found.network.input_shape), found.network.input_dtype)
    inputs = jax.eval_shape(found.preprocess, jax.random.key(0), two)
    small = compact.compact(found.model, params, masks, state=state, inputs=inputs)
    whole = jax.jit(restore.predict_stored(found.model.predict, found.preprocess))
    predict = restore.predict_stored(small.predict, found.preprocess)
    program = serialize(predict, small.params, small.state, two)
    some = restore.random_inputs(found.network, CHECKED)
    expected = whole(masks_lib.apply(masks, params), state, some)
    difference = compare(expected, jax_export.deserialize(program).call(some))
    if not difference.relative <= TOLERANCE:
        raise RunFolderError(
            f"the compacted network differs from the run's by {difference.relative:.1e} of the "
            f"largest output on {len(some)} random inputs, more than {TOLERANCE:g}: nothing was "
            "written; please report this network."
        )
    draft = out.absolute().with_name(f".{out.absolute().name}.new")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        rest = {name: tree for name, tree in small.state.items() if jax.tree.leaves(tree)}
        safetensors.write(draft / TENSORS, small.params, small.masks, rest)
        (draft / PROGRAM).write_bytes(program)
        shutil.copyfile(run / layout.CONFIG, draft / CONFIG)
        sizes = {name: (draft / name).stat().st_size for name in (TENSORS, PROGRAM)}
        facts = model_card.collect(found, small, sizes, difference)
        (draft / CARD).write_text(model_card.write(facts), encoding="utf-8")
        draft.rename(out.absolute())
    except OSError as error:
        raise RunFolderError(
            f"cannot write {str(out)!r} ({error.strerror or error}); nothing was written."
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # which is there only if something failed
    return facts


def serialize(
    predict: Callable[[Params, State, Any], jax.Array], params: Params, state: State, inputs: Any
) -> bytearray:
    """Write a network with its weights as StableHLO, for any number of `inputs` of such a shape."""
    (batch,) = jax_export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *inputs.shape[1:]), inputs.dtype)
    program = jax.jit(lambda inputs: predict(params, state, inputs))
    return jax_export.export(program, platforms=PLATFORMS)(shape).serialize()


def compare(expected: Any, found: Any) -> model_card.Difference:
    """Measure how far two outputs differ, as a fraction of the largest, and in classes."""
    expected, found = np.asarray(expected), np.asarray(found)
    largest = float(np.max(np.abs(expected)))
    relative = float(np.max(np.abs(expected - found))) / (largest or 1.0)
    changed = int(np.sum(expected.argmax(axis=-1) != found.argmax(axis=-1)))
    return model_card.Difference(relative, changed, len(found))


def read(folder: str | pathlib.Path, *, model: Found | None = None) -> Loaded:
    """Bring the network of a run, or what was exported of one, back into Python.

    Of a run it is the network of the newest checkpoint under its masks, which `model` builds if the
    run was given a value in Python; of an export it is the compacted one.
    """
    folder = layout.path_of(folder)
    if not os.path.isfile(folder / PROGRAM):
        if not load.is_run(folder):
            raise load.no_run(folder, "run and no exported network")
        found = restore.from_folder(folder, model=model)
        _, params, masks, state = found.arrays
        params = masks_lib.apply(masks, params)
        run = jax.jit(restore.predict_stored(found.model.predict, found.preprocess))
        call = functools.partial(run, params, state)
    else:
        check_packages()
        state, all_masks = safetensors.read(folder / TENSORS)
        path = folder / PROGRAM
        try:
            call = jax.jit(jax_export.deserialize(bytearray(path.read_bytes())).call)
        except Exception:  # whatever flatbuffers makes of a damaged file
            raise RunFolderError(f"{str(path)!r} cannot be read: it is damaged.") from None
        params, masks = state.pop("params", {}), all_masks.get("params", {})
    return Loaded(lambda inputs: call(jnp.asarray(inputs)), params, masks, state, folder)


def check_packages() -> None:
    """See that what exports need is there."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RunFolderError(
            f"exported networks need {' and '.join(missing)}: "
            "install them with `pip install 'fedjaxprune[export]'`."
        )
