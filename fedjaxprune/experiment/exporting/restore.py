"""A run's network, brought back from its folder without touching anything in it."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedjaxprune.experiment.config.flat import files
from fedjaxprune.experiment.config.flat.sections import RunConfig, UserError
from fedjaxprune.experiment.folder import checkpoints, load, record
from fedjaxprune.experiment.run import build, loop
from fedjaxprune.types import Masks, Params, State


class Finished(NamedTuple):
    """What a run has come to.

    Attributes:
      config: of the run.
      parts: what it was put together from; `parts.model` is the network.
      num_rounds: played when the checkpoint was made.
      params: to be deployed, pruned entries exact zeros.
      masks: in force.
      state: what is not trained.
      lines: of the record, up to that round.
    """

    config: RunConfig
    parts: loop.RunParts
    num_rounds: int
    params: Params
    masks: Masks
    state: State
    lines: list[record.RoundRecord]


def from_folder(
    folder: pathlib.Path, *, data_dir: str | None = None, warn: Callable[[str], None] | None = None
) -> Finished:
    """Read the newest checkpoint of a run that is whole; the run may still be going on.

    Args:
      folder: of the run.
      data_dir: folder of prepared data, if it is another than the run's.
      warn: is told of checkpoints that cannot be read.

    Raises:
      UserError: there is no run, no checkpoint, or not the data.
    """
    check(folder)
    config = stored(folder)
    made_by = checkpoints.fingerprints(folder / record.CHECKPOINTS)
    if any(value != files.fingerprint(config) for value in made_by.values()):
        raise UserError(
            f"{str(folder / record.CONFIG)!r} is not the config that made the run's checkpoints: "
            "it was edited or replaced; put it back."
        )
    if data_dir is not None:
        config = config.model_copy(update={"data_dir": data_dir})
    parts = build.build(config.model_copy(update={"devices": 1}))
    shapes = jax.eval_shape(lambda key: loop.start(key, parts), jax.random.key(0))
    found = checkpoints.read_newest(
        folder / record.CHECKPOINTS, shapes, warn=warn or (lambda text: None)
    )
    if found is None:
        raise UserError(
            f"no checkpoint of the run in {str(folder)!r} can be read: its newest ones are damaged."
        )
    num_rounds, now = found
    return Finished(
        config=config,
        parts=parts,
        num_rounds=num_rounds,
        params=parts.algorithm.deployed_params(now.state),
        masks=now.state.masks,
        state=now.state.model_state,
        lines=record.read(folder)[:num_rounds],
    )


def stored(folder: pathlib.Path) -> RunConfig:
    """Read a run's config.

    Raises:
      UserError: it is not whole.
    """
    try:
        return record.stored(folder)[0]
    except UserError as error:
        raise UserError(str(error).removeprefix("resume: ")) from None


def check(folder: pathlib.Path) -> None:
    """See that a folder holds a run with a checkpoint, before anything heavy is done.

    Raises:
      UserError: in one sentence.
    """
    if not load.is_run(folder):
        raise load.no_run(folder)
    found = folder / record.CHECKPOINTS
    if not found.is_dir() or not any(entry.name.isdigit() for entry in found.iterdir()):
        what = f"continue it with `fedjaxprune run --resume {folder}`"
        if load.is_held(folder):
            what = "it is still going: wait for one"
        raise UserError(
            f"the run in {str(folder)!r} has no checkpoint, so there is no network to take out of "
            f"it; {what}."
        )


def predict_stored(
    predict: Callable[[Params, State, Any], jax.Array], preprocess: Callable[..., Any]
) -> Callable[[Params, State, Any], jax.Array]:
    """Make a network take inputs as the data set stores them."""

    def predict_fn(params: Params, state: State, inputs: Any) -> jax.Array:
        key = jax.random.key(0)  # preprocessing for tests is deterministic and reads no key
        return predict(params, state, preprocess(key, inputs))

    return predict_fn


def example_shapes(parts: loop.RunParts) -> Any:
    """Give the shapes of a batch of two, as the network reads it."""
    two = jax.ShapeDtypeStruct((2, *parts.test.inputs.shape[1:]), parts.test.inputs.dtype)
    return jax.eval_shape(parts.preprocess, jax.random.key(0), two)
