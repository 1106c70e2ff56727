"""From a config to methods that explore before they train."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from fedjaxprune.data import batching
from fedjaxprune.experiment import methods
from fedjaxprune.experiment.config.flat.sections import RunConfig
from fedjaxprune.experiment.recipes import Given
from fedjaxprune.experiment.run import loop
from fedjaxprune.federated import batch_norm, early_stopping
from fedjaxprune.methods import autoflip
from fedjaxprune.pruning import movement
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.structure.channels import groups as channel_groups
from fedjaxprune.types import Algorithm, Client, Model

SCALES: Mapping[str, movement.ScaleFn] = {
    "min_max": movement.min_max,
    "ranks": movement.ranks,
    "robust": movement.robust,
    "plain": movement.plain,
}


def complaint(config: RunConfig, largest: int) -> str | None:
    """Say it if not even the largest client would have examples to explore on, or None."""
    if config.algorithm not in methods.EXPLORING or config.explore_watch != "validation":
        return None
    if batching.num_shown(jnp.int32(largest), config.development_share) < largest:
        return None
    return (
        "development_share must leave explorers something to train on with explore_watch "
        f"'validation', but of {largest} examples, as the largest client holds, "
        f"{config.development_share} is all."
    )


def flip(config: RunConfig, model: Model, setup: Protocol, given: Given) -> Algorithm:
    """Build AutoFLIP."""
    threshold = config.channel_threshold
    return autoflip.autoflip(
        model,
        setup,
        sparsity=config.sparsity,
        explorer=explorer(config, model, setup, given),
        scale=SCALES[config.guidance_scale],
        explorer_weights=config.explorer_weights,
        agreement=config.agreement,
        refresh_every=config.refresh_every,
        groups=() if threshold is None else _groups(config, model, given),
        channel_threshold=0.3 if threshold is None else threshold,
        start=config.explore_start,
    )


def explored(config: RunConfig, model: Model, setup: Protocol, given: Given) -> Algorithm:
    """Build FedAvg from an explored start."""
    return autoflip.explored_start(model, setup, explorer=explorer(config, model, setup, given))


def explorer(config: RunConfig, model: Model, setup: Protocol, given: Given) -> Client:
    """Choose how a client explores, with the optimizer of its local work."""
    common = {"batch_size": config.batch_size}
    epoch = batching.epochs(num_epochs=1, preprocess=given.train, **common)
    validation = None
    if config.explore_watch == "validation":
        key = jax.random.fold_in(jax.random.key(config.seed), loop.DEVELOPMENT)
        split = {"share": config.development_share, **common}
        epoch = batching.undeveloped(key, preprocess=given.train, **split)
        validation = batch_norm.losses(
            model.predict, batcher=batching.development(key, preprocess=given.test, **split)
        )
    return early_stopping.until_no_improvement(
        model.loss,
        epoch=epoch,
        optimizer=setup.optimizer,
        max_epochs=config.explore_epochs,
        patience=config.explore_patience,
        watch="last_step" if config.explore_watch == "last_step" else "epoch",
        validation=validation,
    )


def _groups(config: RunConfig, model: Model, given: Given) -> tuple[channel_groups.Group, ...]:
    """Find the channels of the network that may go."""
    params, state = jax.eval_shape(model.init, jax.random.key(0))
    inputs = jax.ShapeDtypeStruct((2, *given.input_shape), jnp.float32)
    found = channel_groups.analyze(model.predict, params, state, inputs).groups
    if not found:
        raise ValueError(
            f"channel_threshold must be unset with the network {config.model!r}, which has no "
            f"channels that could go, got {config.channel_threshold}."
        )
    return found


ALGORITHMS: Mapping[str, Callable[[RunConfig, Model, Protocol, Given], Algorithm]] = {
    "autoflip": flip,
    "explored_start": explored,
}

SUMMARIES: Mapping[str, str] = {
    "autoflip": "prune what no client had to move while exploring alone, then FedAvg (Internò et "
    "al., arXiv 2405.10271)",
    "explored_start": "AutoFLIP's control: FedAvg from the mean of the explored models",
}
