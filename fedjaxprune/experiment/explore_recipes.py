"""From a config to methods that explore before they train."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from fedjaxprune.data import batching
from fedjaxprune.experiment import methods
from fedjaxprune.experiment.config.flat.sections import RunConfig
from fedjaxprune.experiment.recipes import Given
from fedjaxprune.experiment.task_of import task_of
from fedjaxprune.methods import autoflip
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.types import Algorithm, Model


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
    return _build(
        config,
        (model, setup, given),
        sparsity=config.sparsity,
        explorer_weights=config.explorer_weights,
        layer_scaling=config.guidance_scale,
        agreement=config.agreement,
        prune_every=config.refresh_every,
        channel_threshold=config.channel_threshold,
        start_from=config.explore_start,
    )


def explored(config: RunConfig, model: Model, setup: Protocol, given: Given) -> Algorithm:
    """Build FedAvg from an explored start."""
    return _build(config, (model, setup, given), **autoflip.METHOD.variants["explored_start"])


def _build(config: RunConfig, run: tuple[Model, Protocol, Given], **settings: Any) -> Algorithm:
    # The largest client is checked by `complaint`.
    return autoflip.build(
        autoflip.AutoFLIP(
            explore_epochs=config.explore_epochs,
            patience=config.explore_patience,
            stop_on=config.explore_watch,
            validation_fraction=config.development_share,
            num_explorers=config.explorers,
            **settings,
        ),
        task_of(config, *run, largest_client=10**6),
    )


ALGORITHMS: Mapping[str, Callable[[RunConfig, Model, Protocol, Given], Algorithm]] = {
    "autoflip": flip,
    "explored_start": explored,
}

SUMMARIES: Mapping[str, str] = {
    "autoflip": "prune what no client had to move while exploring alone, then FedAvg (Internò et "
    "al., arXiv 2405.10271)",
    "explored_start": "AutoFLIP's control: FedAvg from the mean of the explored models",
}
