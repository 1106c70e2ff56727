"""From a config to a method's own arguments: one function for each that takes some thought."""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.data import batching
from fedjaxprune.experiment import methods
from fedjaxprune.experiment.config.flat.sections import RunConfig
from fedjaxprune.experiment.run import loop
from fedjaxprune.federated import local_training
from fedjaxprune.methods import feddip, fedtiny, gradual_magnitude, magnitude_masks
from fedjaxprune.pruning import drop_and_grow
from fedjaxprune.pruning.structured import filters
from fedjaxprune.rounds import server_work
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.rounds.task import Task
from fedjaxprune.structure import reading_order
from fedjaxprune.types import Algorithm, Batcher, Model, PrunableFn


class Given(NamedTuple):
    """What a method may need beside its config, the network and the protocol.

    Attributes:
      held: ``[S]`` rows of the training examples that the server holds.
      input_shape: of one example, as the network takes it.
      train: preprocessing in training.
      test: preprocessing without augmentation.
    """

    held: np.ndarray
    input_shape: tuple[int, ...]
    train: Any
    test: Any


def with_proximal_term(task: Task, mu: float) -> Task:
    """Add FedProx's term to the local loss."""
    return task._replace(penalties=(local_training.proximal(mu=mu),) if mu else ())


def dip(config: RunConfig, **changes: Any) -> feddip.FedDIP:
    """Choose FedDIP's settings."""
    given = {
        "sparsity": config.sparsity,
        "initial_sparsity": config.initial_sparsity,
        "prune_every": config.prune_every,
        "max_penalty": config.max_penalty,
        "mode": config.feddip_mode,
    }
    return feddip.FedDIP(**{**given, **changes})


def tiny(config: RunConfig, model: Model, setup: Protocol, given: Given) -> Algorithm:
    """Build FedTiny, with the network's stages as blocks, or five blocks where it has none."""
    layers = reading_order.reading_order(model, input_shape=given.input_shape)
    first = _first_convolution(model, layers)
    prunable = (
        masks_lib.is_kernel if first is None else masks_lib.excluding(masks_lib.is_kernel, first)
    )
    return fedtiny.fedtiny(
        model,
        setup,
        density=1.0 - config.sparsity,
        source=server_work.server_examples(given.held),
        pretraining=_server_epochs(config, given),
        development=batching.development(
            jax.random.fold_in(jax.random.key(config.seed), loop.DEVELOPMENT),
            share=config.development_share,
            batch_size=config.batch_size,
            preprocess=given.test,
        ),
        blocks=_blocks(model, layers, prunable),
        prunable=prunable,
        pool_size=config.pool_size,
        selection=config.fedtiny_selection,
        swap_fraction=config.swap_fraction,
        period=config.prune_every,
        until=methods.last_revision(config),
    )


def fixed(config: RunConfig) -> dict[str, Any]:
    """Choose the settings that all fixed masks have."""
    shared = config.layer_sparsity
    allocation = "global" if shared == "whole_model" else shared
    return {"sparsity": config.sparsity, "allocation": allocation}


def magnitude(config: RunConfig, examples: Any) -> magnitude_masks.MagnitudeMasks:
    """Choose the settings of one-shot magnitude masks."""
    return magnitude_masks.MagnitudeMasks(
        examples=examples,
        server_epochs=config.pretrain_epochs,
        client_id=config.mask_client,
        start_from=config.mask_start,
        **fixed(config),
    )


def gradual(config: RunConfig) -> gradual_magnitude.GradualMagnitude:
    """Choose the settings of gradual magnitude pruning over the whole run."""
    return gradual_magnitude.GradualMagnitude(
        sparsity=config.sparsity,
        initial_sparsity=config.initial_sparsity,
        prune_every=config.prune_every,
    )


def optimizer(config: RunConfig) -> optax.GradientTransformation:
    """Choose the clients' optimizer."""
    if config.optimizer == "adam":
        return optax.adam(config.learning_rate)
    return optax.sgd(config.learning_rate, momentum=config.momentum or None)


def reported(config: RunConfig) -> PrunableFn:
    """Choose the leaves whose sparsity is on record."""
    if config.algorithm.startswith("feddip"):
        return feddip.without_shortcuts
    return filters.convolutions if config.algorithm in methods.BY_FILTER else masks_lib.is_kernel


def _server_epochs(config: RunConfig, given: Given) -> Batcher:
    """Choose how long the server trains on its own examples."""
    return batching.epochs(
        num_epochs=config.pretrain_epochs, batch_size=config.batch_size, preprocess=given.train
    )


def _first_convolution(model: Model, layers: list[str]) -> str | None:
    """Find the first kernel, if it is a convolution's."""
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    shapes = dict(zip(trees.paths(params), jax.tree.leaves(params), strict=True))
    first = next((path for path in layers if masks_lib.is_kernel(path, shapes[path])), None)
    return None if first is None or shapes[first].ndim < 4 else first


def _blocks(model: Model, layers: list[str], prunable: PrunableFn) -> drop_and_grow.BlockFn:
    """Make blocks of a residual network's stages, else five of consecutive layers."""
    if any("stage_" in path for path in layers):
        return drop_and_grow.by_stage(layers)
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    num_layers = sum(masks_lib.prunable_leaves(params, prunable))
    return drop_and_grow.consecutive(layers, num_blocks=max(1, min(5, num_layers)))
