"""From a config to methods that prune whole filters before training."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from fedjaxprune.experiment.config.flat.sections import RunConfig
from fedjaxprune.experiment.recipes import Given
from fedjaxprune.experiment.task_of import task_of
from fedjaxprune.methods import averaged_filters, mpfl, pooled_filters, random_filters
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.types import Algorithm, Model

MODULES: Mapping[str, ModuleType] = {
    "mpfl": mpfl,
    "random_filters": random_filters,
    "pooled_filters": pooled_filters,
    "averaged_filters": averaged_filters,
}


def build(config: RunConfig, model: Model, protocol: Protocol, given: Given) -> Algorithm:
    """Build MPFL or one of its controls."""
    module = MODULES[config.algorithm]
    settings: dict[str, Any] = {
        "sparsity": config.sparsity,
        "dense_rounds": config.start_rounds,
        "remove": config.drops,
    }
    if config.algorithm != "random_filters":
        settings |= {
            "num_prune_steps": config.mask_iterations,
            "prune_fraction_per_step": config.filter_factor,
            "vote_epochs": config.pretrain_epochs,
        }
    if config.algorithm == "mpfl":
        settings |= {"consensus": config.consensus, "votes": config.votes}
    task = task_of(config, model, protocol, given)
    return module.build(module.METHOD.settings(**settings), task)


ALGORITHMS: Mapping[str, Callable[[RunConfig, Model, Protocol, Given], Algorithm]] = dict.fromkeys(
    MODULES, build
)
SUMMARIES: Mapping[str, str] = {
    "mpfl": "clients vote on filters, then train what stays (Gez and Cohen, arXiv 2312.03889)",
    "random_filters": "MPFL's control: filters drawn at random",
    "pooled_filters": "MPFL's control: filters that the data of all decide",
    "averaged_filters": "MPFL's control: filters that averaged weights decide",
}
