"""Gated networks and the methods for them: what `catalog` knows of these, in one place."""

from collections.abc import Callable, Mapping
from typing import Literal

from fedjaxprune.experiment.config.flat.sections import RunConfig
from fedjaxprune.experiment.recipes import Given
from fedjaxprune.experiment.task_of import task_of
from fedjaxprune.methods import adaptive_dynamic_pruning as adp
from fedjaxprune.methods import feddp_threshold
from fedjaxprune.models import gated
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.types import Algorithm, Model


def _options(config: RunConfig) -> tuple[float, Literal["salient", "random"]]:
    """Choose what the gates of a network do from the method that it is for."""
    density = 1.0 if config.algorithm == "squeeze_excitation" else config.gate_density
    return density, "random" if config.algorithm == "random_channels" else "salient"


def _resnet8(config: RunConfig, **sizes) -> Model:
    density, choice = _options(config)
    return gated.gated_resnet8(norm=config.norm, density=density, choice=choice, **sizes)


def _resnet32(config: RunConfig, **sizes) -> Model:
    density, choice = _options(config)
    return gated.gated_resnet32(norm=config.norm, density=density, choice=choice, **sizes)


def _vgg16(config: RunConfig, **sizes) -> Model:
    density, choice = _options(config)
    return gated.gated_vgg16(norm=config.norm, density=density, choice=choice, **sizes)


def _dynamic(config: RunConfig, model: Model, protocol: Protocol, given: Given) -> Algorithm:
    """Build adaptive dynamic pruning; its control differs from it by the network's choice alone."""
    settings = adp.AdaptiveDynamicPruning(
        gradient=config.gate_gradient,
        upload=config.gate_upload,
        gate_sharing=config.gates,
        warm_up_fraction=config.gate_warm_up,
    )
    return adp.build(settings, task_of(config, model, protocol, given))


def _open(config: RunConfig, model: Model, protocol: Protocol, given: Given) -> Algorithm:
    settings = adp.AdaptiveDynamicPruning(gradient="plain", upload="dense")
    return adp.build(settings, task_of(config, model, protocol, given))


def _threshold(config: RunConfig, model: Model, protocol: Protocol, given: Given) -> Algorithm:
    settings = feddp_threshold.FedDPThreshold(threshold=config.weight_threshold)
    return feddp_threshold.build(settings, task_of(config, model, protocol, given))


MODELS: Mapping[str, Callable[..., Model]] = {
    "gated_resnet8": _resnet8,
    "gated_resnet32": _resnet32,
    "gated_vgg16": _vgg16,
}
ALGORITHMS: Mapping[str, Callable[[RunConfig, Model, Protocol, Given], Algorithm]] = {
    "adaptive_dynamic_pruning": _dynamic,
    "squeeze_excitation": _open,
    "random_channels": _dynamic,
    "feddp_threshold": _threshold,
}
SUMMARIES: Mapping[str, str] = {
    "adaptive_dynamic_pruning": "channels chosen for every example (Yu et al., arXiv 2106.06921)",
    "squeeze_excitation": "adaptive dynamic pruning's reference: all channels open, FedAvg",
    "random_channels": "adaptive dynamic pruning's control: channels drawn for every example",
    "feddp_threshold": "small weights become zero after each epoch (the second public code of "
    "Yu et al., arXiv 2106.06921)",
    "gated_resnet8": "resnet8 whose layers choose their channels for every example",
    "gated_resnet32": "resnet32 whose layers choose their channels for every example",
    "gated_vgg16": "vgg16_bn whose layers choose their channels for every example",
}
