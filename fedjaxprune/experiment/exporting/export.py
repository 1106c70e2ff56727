"""Take a network out of a run: compacted, as files that others can read.

::

    model.safetensors   parameters under their masks, state, and the constants of what is gone
    model.stablehlo     the network with its weights, serialized by ``jax.export``, for any batch
    README.md           the model card
    config.yaml         of the run

The folder appears whole or not at all.
"""

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
    """A network to be used.

    Attributes:
      predict: ``inputs [B, ...], as the data set stores them, -> logits [B, classes]``.
      params: its parameters, pruned entries exact zeros; nested dicts.
      masks: of the parameters.
      state: what is not trained.
      folder: where it came from.
    """

    predict: Callable[[Any], jax.Array]
    params: Params
    masks: Any
    state: State
    folder: pathlib.Path


def export(
    run: pathlib.Path,
    out: pathlib.Path,
    *,
    model: Found | None = None,
    warn: Callable[[str], object] | None = None,
) -> model_card.Facts:
    """Write the network of a run's newest checkpoint, compacted, into a new folder.

    The data set is not needed.

    Args:
      run: folder of the run.
      out: folder to be made.
      model: what builds the network, where the run was given a value in Python.
      warn: takes sentences about checkpoints that cannot be read.

    Returns:
      What the model card says.

    Raises:
      RunFolderError: in one sentence, and nothing is written.
      ConfigError: what builds the network cannot be found.
    """
    check_packages()
    restore.check(run)
    check_free(out)
    found = restore.from_folder(run, model=model, warn=warn)
    two = restore.stored_shapes(found.network, 2)
    small = compact.compact(
        found.model,
        found.params,
        found.masks,
        state=found.state,
        inputs=jax.eval_shape(found.preprocess, jax.random.key(0), two),
    )
    whole = jax.jit(restore.predict_stored(found.model.predict, found.preprocess))
    predict = restore.predict_stored(small.predict, found.preprocess)
    program = serialize(predict, small.params, small.state, two)
    some = restore.random_inputs(found.network, CHECKED)
    expected = whole(masks_lib.apply(found.masks, found.params), found.state, some)
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
        facts = model_card.collect(found, small, sizes, difference, len(some))
        (draft / CARD).write_text(model_card.write(facts), encoding="utf-8")
        draft.rename(out.absolute())
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise RunFolderError(
            f"cannot write {str(out)!r} ({error.strerror or error}); nothing was written."
        ) from None
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return facts


def serialize(
    predict: Callable[[Params, State, Any], jax.Array], params: Params, state: State, inputs: Any
) -> bytearray:
    """Write a network with its weights as StableHLO, for any number of examples.

    Args:
      predict: ``(params, state, inputs) -> outputs``.
      params: baked in.
      state: baked in.
      inputs: examples ``[E, ...]``, of which shape and type count.
    """
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
    return model_card.Difference(relative=relative, num_changed=changed)


def read(folder: str | pathlib.Path, *, model: Found | None = None) -> Loaded:
    """Bring the network of a run, or what was exported of one, back into Python.

    Args:
      folder: of a run, or one that `export` has written. Of a run it is the network of the newest
        checkpoint under its masks, of an export the compacted one.
      model: what builds the network, where the run was given a value in Python.

    Raises:
      RunFolderError: there is neither in the folder, or it is damaged.
    """
    folder = layout.path_of(folder)
    if not os.path.isfile(folder / PROGRAM):
        if not load.is_run(folder):
            raise load.no_run(folder, "run and no exported network")
        found = restore.from_folder(folder, model=model)
        predict = restore.predict_stored(found.model.predict, found.preprocess)
        params = masks_lib.apply(found.masks, found.params)
        run = jax.jit(predict)
        return Loaded(
            predict=lambda inputs: run(params, found.state, jnp.asarray(inputs)),
            params=params,
            masks=found.masks,
            state=found.state,
            folder=folder,
        )
    check_packages()
    arrays, masks = safetensors.read(folder / TENSORS)
    try:
        program = jax_export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    except Exception:  # whatever flatbuffers makes of a damaged file
        raise RunFolderError(f"{str(folder / PROGRAM)!r} cannot be read: it is damaged.") from None
    call = jax.jit(program.call)
    return Loaded(
        predict=lambda inputs: call(jnp.asarray(inputs)),
        params=arrays.pop("params", {}),
        masks=masks.get("params", {}),
        state=arrays,
        folder=folder,
    )


def check_packages() -> None:
    """See that what exports need is there.

    Raises:
      RunFolderError: naming what is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RunFolderError(
            f"exported networks need {' and '.join(missing)}: "
            "install them with `pip install 'fedjaxprune[export]'`."
        )


def check_free(out: pathlib.Path) -> None:
    """See that a folder may be made.

    Raises:
      RunFolderError: something is there.
    """
    if os.path.lexists(out):
        raise RunFolderError(f"{str(out)!r} exists; give a folder that does not.")
