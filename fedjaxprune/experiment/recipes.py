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
from fedjaxprune.methods import feddip, fedtiny, fixed_masks, gradual_magnitude
from fedjaxprune.pruning import allocation
from fedjaxprune.pruning.structured import filters
from fedjaxprune.rounds import server_work
from fedjaxprune.rounds.protocol import Protocol
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


def dip(config: RunConfig, model: Model, setup: Protocol) -> Algorithm:
    """Build FedDIP; a run of fewer rounds than the penalty's 20 steps gets one step a round."""
    return feddip.feddip(
        model,
        setup,
        final_sparsity=config.sparsity,
        initial_sparsity=config.initial_sparsity,
        period=config.prune_every,
        max_penalty=config.max_penalty if config.rounds > 1 else 0.0,
        num_segments=max(2, min(feddip.NUM_SEGMENTS, config.rounds)),
        mode=config.feddip_mode,
    )


def tiny(config: RunConfig) -> fedtiny.FedTiny:
    """Choose FedTiny's settings."""
    return fedtiny.FedTiny(
        sparsity=config.sparsity,
        pool_size=config.pool_size,
        selection=config.fedtiny_selection,
        server_epochs=config.pretrain_epochs,
        validation_fraction=config.development_share,
        drop_fraction=config.swap_fraction,
        prune_every=config.prune_every,
        last_prune_round=config.prune_until,
    )


def emptied(config: RunConfig, model: Model) -> str | None:
    """Say that a sparsity leaves nothing of the network, or of a layer, so that nothing passes."""
    if config.algorithm not in (*methods.GRADUAL, *methods.FIXED):
        return None  # the others keep a weight or a filter of every layer, or say so themselves
    sizes = _sizes(model, reported(config))

    def is_emptied(size: int) -> bool:
        return size - round(config.sparsity * size) < 1

    if sizes and is_emptied(sum(sizes.values())):
        return (
            f"sparsity must leave at least one of the {sum(sizes.values())} prunable weights of "
            f"{config.model!r}, got {config.sparsity}."
        )
    if config.algorithm in methods.FIXED and config.layer_sparsity == "uniform":
        path = min(sizes, key=lambda path: sizes[path], default="")
        if path and is_emptied(sizes[path]):
            return (
                f"sparsity must leave at least one of the {sizes[path]} weights of {path!r}, or "
                f"nothing passes; got {config.sparsity} with layer_sparsity 'uniform' (erk and "
                "whole_model keep more of small layers)."
            )
    return None


def _sizes(model: Model, prunable: PrunableFn) -> dict[str, int]:
    """Count the weights of each prunable leaf, by path."""
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    flags = masks_lib.prunable_leaves(params, prunable)
    leaves = zip(trees.paths(params), trees.sizes(params), flags, strict=True)
    return {path: size for path, size, flag in leaves if flag}


def shares(config: RunConfig, model: Model, given: Given) -> allocation.AllocationFn:
    """Choose how a fixed mask shares its weights out.

    Raises:
      ValueError: the network has no first convolution to be kept whole, or it alone is more than
        may be kept.
    """
    if config.layer_sparsity == "uniform_but_first":
        return _uniform_but_first(config, model, given)
    return {
        "uniform": allocation.uniform,
        "erk": allocation.erk,
        "whole_model": allocation.global_pool,
    }[config.layer_sparsity]()


def _uniform_but_first(config: RunConfig, model: Model, given: Given) -> allocation.AllocationFn:
    first = _first_convolution(
        model, reading_order.reading_order(model, input_shape=given.input_shape)
    )
    if first is None:
        raise ValueError(
            "layer_sparsity 'uniform_but_first' keeps the first convolution whole, and the network "
            "has none."
        )
    sizes = _sizes(model, masks_lib.is_kernel)
    if sizes[first] >= (1.0 - config.sparsity) * sum(sizes.values()):
        raise ValueError(
            f"sparsity must be less than {1.0 - sizes[first] / sum(sizes.values()):.4g} with "
            f"layer_sparsity 'uniform_but_first', as the first convolution is kept whole, got "
            f"{config.sparsity}."
        )
    return allocation.erk(power=0.0, dense=lambda path, leaf: path == first)


def magnitude(
    config: RunConfig, model: Model, setup: Protocol, given: Given, source: server_work.SourceFn
) -> Algorithm:
    """Build one-shot magnitude masks.

    Unless `mask_start` says otherwise the server goes on from the weights that it has trained; of
    what is trained at a client, or on the pooled data, nothing but the mask is taken.
    """
    own = "trained" if config.algorithm == "magnitude_masks" else "initial"
    return fixed_masks.magnitude_masks(
        model,
        setup,
        sparsity=config.sparsity,
        source=source,
        pretraining=_server_epochs(config, given),
        weights=config.mask_start or own,
        working_clients=(config.mask_client,) if config.algorithm == "one_client_masks" else (),
        allocation=shares(config, model, given),
    )


def snip(config: RunConfig, model: Model, setup: Protocol, given: Given) -> Algorithm:
    """Build SNIP on the server's examples."""
    return fixed_masks.snip_masks(
        model,
        setup,
        sparsity=config.sparsity,
        source=server_work.server_examples(given.held),
        batcher=_one_pass(config, given),
        allocation=shares(config, model, given),
    )


def snip_of_clients(config: RunConfig, model: Model, setup: Protocol, given: Given) -> Algorithm:
    """Build SNIP on the clients' gradients."""
    return fixed_masks.snip_masks_of_clients(
        model,
        setup,
        sparsity=config.sparsity,
        batcher=_one_pass(config, given),
        allocation=shares(config, model, given),
    )


def gradual(config: RunConfig, model: Model, setup: Protocol, given: Given) -> Algorithm:
    """Build gradual magnitude pruning over the whole run."""
    del given  # needs nothing beside the protocol
    return gradual_magnitude.gradual_magnitude(
        model,
        setup,
        final_sparsity=config.sparsity,
        initial_sparsity=config.initial_sparsity,
        period=config.prune_every,
        end_round=config.rounds,
    )


def optimizer(config: RunConfig) -> optax.GradientTransformation:
    """Choose the clients' optimizer."""
    if config.optimizer == "adam":
        return optax.adam(config.learning_rate)
    return optax.sgd(config.learning_rate, momentum=config.momentum or None)


def reported(config: RunConfig) -> PrunableFn:
    """Choose the leaves whose sparsity is on record."""
    if config.algorithm.startswith("feddip"):
        return feddip.prunable_without_shortcuts
    return filters.convolutions if config.algorithm in methods.BY_FILTER else masks_lib.is_kernel


def _one_pass(config: RunConfig, given: Given) -> Batcher:
    return batching.epochs(num_epochs=1, batch_size=config.batch_size, preprocess=given.train)


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
