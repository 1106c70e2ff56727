"""From a config to methods that prune whole filters before training."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune.data import batching
from fedjaxprune.experiment.config.flat.sections import RunConfig
from fedjaxprune.experiment.recipes import Given
from fedjaxprune.methods import filter_controls, mpfl
from fedjaxprune.pruning.structured import voting
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.structure.channels import groups
from fedjaxprune.types import Algorithm, Model

CONSENSUS: Mapping[str, voting.ConsensusFn] = {
    "ascending": voting.ascending,
    "top_k": voting.top_k,
    "majority": voting.majority,
    "unanimous": voting.unanimous,
    "anybody": voting.anybody,
    "histogram": voting.histogram,
    "code_dynamic": voting.code_dynamic,
}


def by_vote(config: RunConfig, model: Model, setup: Protocol, given: Given) -> Algorithm:
    """Build MPFL."""
    return mpfl.mpfl(
        model,
        setup,
        consensus=CONSENSUS[config.consensus],
        votes=config.votes,
        **_common(config, model, given),
        **_iterative(config, given),
    )


def pooled(config: RunConfig, model: Model, setup: Protocol, given: Given) -> Algorithm:
    """Build the control of filters that the data of all decide."""
    return filter_controls.pooled_filters(
        model, setup, **_common(config, model, given), **_iterative(config, given)
    )


def averaged(config: RunConfig, model: Model, setup: Protocol, given: Given) -> Algorithm:
    """Build the control of filters that averaged weights decide."""
    return filter_controls.averaged_filters(
        model, setup, **_common(config, model, given), **_iterative(config, given)
    )


def random(config: RunConfig, model: Model, setup: Protocol, given: Given) -> Algorithm:
    """Build the control of random filters."""
    return filter_controls.random_filters(model, setup, **_common(config, model, given))


def _common(config: RunConfig, model: Model, given: Given) -> dict[str, Any]:
    params, state = jax.eval_shape(model.init, jax.random.key(0))
    inputs = jax.ShapeDtypeStruct((2, *given.input_shape), jnp.float32)
    return {
        "channels": groups.analyze(model.predict, params, state, inputs),
        "sparsity": config.sparsity,
        "start_rounds": config.start_rounds,
        "drops": config.drops,
    }


def _iterative(config: RunConfig, given: Given) -> dict[str, Any]:
    return {
        "iterations": config.mask_iterations,
        "factor": config.filter_factor,
        "agreement": batching.epochs(
            num_epochs=config.pretrain_epochs,
            batch_size=config.batch_size,
            preprocess=given.train,
        ),
    }


ALGORITHMS: Mapping[str, Callable[[RunConfig, Model, Protocol, Given], Algorithm]] = {
    "mpfl": by_vote,
    "random_filters": random,
    "pooled_filters": pooled,
    "averaged_filters": averaged,
}
SUMMARIES: Mapping[str, str] = {
    "mpfl": "clients vote on filters, then train what stays (Gez and Cohen, arXiv 2312.03889)",
    "random_filters": "MPFL's control: filters drawn at random",
    "pooled_filters": "MPFL's control: filters that the data of all decide",
    "averaged_filters": "MPFL's control: filters that averaged weights decide",
}
