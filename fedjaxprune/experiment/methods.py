"""What the config must know of methods and networks: names, kinds, and how their settings fit.

Like `config`, it imports neither JAX nor anything that does.
"""

from typing import Any, Literal

Name = Literal[
    "fedavg",
    "fedprox",
    "scaffold",
    "fednova",
    "feddip",
    "feddip_without_penalty",
    "feddip_without_pruning",
    "fedtiny",
    "random_masks",
    "magnitude_masks",
    "one_client_masks",
    "pooled_masks",
    "snip_masks",
    "snip_masks_of_clients",
    "gradual_magnitude",
    "autoflip",
    "explored_start",
    "mpfl",
    "random_filters",
    "pooled_filters",
    "averaged_filters",
    "adaptive_dynamic_pruning",
    "squeeze_excitation",
    "random_channels",
    "feddp_threshold",
]
Network = Literal[
    "mlp",
    "lenet5",
    "cnn",
    "two_cnn",
    "femnist_cnn",
    "pooled_cnn",
    "alexnet",
    "vgg11",
    "vgg11_bn",
    "vgg16_bn",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet50",
    "gated_resnet8",
    "gated_resnet32",
    "gated_vgg16",
    "char_lstm",
]
FIXED = (  # whose masks are fixed before training
    "random_masks",
    "magnitude_masks",
    "one_client_masks",
    "pooled_masks",
    "snip_masks",
    "snip_masks_of_clients",
)
GRADUAL = ("feddip", "feddip_without_penalty", "gradual_magnitude")  # whose sparsity climbs
EXPLORING = ("autoflip", "explored_start")  # whose clients explore before they train
BY_FILTER = ("mpfl", "random_filters", "pooled_filters", "averaged_filters")
PRUNING = (*GRADUAL, *FIXED, *BY_FILTER, "autoflip", "fedtiny")  # that have a sparsity
NORMALIZED = ("fedtiny",)  # that need BatchNorm
GATED = ("adaptive_dynamic_pruning", "squeeze_excitation", "random_channels")  # that need gates
STEERED = ("adaptive_dynamic_pruning", "random_channels")  # whose gates close channels
GATED_NETWORKS = ("gated_resnet8", "gated_resnet32", "gated_vgg16")
CONVOLUTIONAL = (*BY_FILTER, "feddp_threshold")  # that need convolutions
AT_SERVER = ("fedtiny", "magnitude_masks", "snip_masks")  # that need examples at the server
CORRECTED = ("scaffold", "fednova")  # that are FedAvg with a remedy against drift
MIN_PENALTY = 5e-4  # first step of FedDIP's penalty, as algorithms.feddip has it


def default_sparsity(before: dict[str, Any]) -> float:
    """Choose a sparsity that a small network bears, weight by weight or filter by filter.

    AutoFLIP's is its paper's.
    """
    if before["algorithm"] == "autoflip":
        return 0.3
    return 0.5 if before["algorithm"] in BY_FILTER else 0.92


def default_network(before: dict[str, Any]) -> str:
    """Choose a network of the kind that the algorithm needs."""
    if before["algorithm"] in GATED:
        return "gated_resnet8"
    return "resnet8" if before["algorithm"] in (*NORMALIZED, *CONVOLUTIONAL) else "mlp"


def needs(algorithm: str) -> str:
    """Say what a network or the data must have for a method; empty if anything will do."""
    wanted = [
        (NORMALIZED, "BatchNorm (resnets, vgg11_bn, vgg16_bn, gated networks)"),
        (GATED, f"gates ({', '.join(GATED_NETWORKS)})"),
        (CONVOLUTIONAL, "convolutions"),
        (AT_SERVER, "examples at the server (server_share)"),
    ]
    return ", ".join(words for names, words in wanted if algorithm in names)


def default_period(before: dict[str, Any]) -> int:
    """Choose a `prune_every` that falls into the run, from the settings before it."""
    if before["algorithm"] == "fedtiny":
        return min(10, before["rounds"])
    return max(1, min(5, before["rounds"] - 1))


def last_revision(config: Any) -> int:
    """Tell the last round of training in which the masks may be revised."""
    return min(config.prune_until or 100, config.rounds)


def complaint(config: Any) -> str | None:
    """Say what does not fit a method's settings together, or None."""
    name = config.algorithm
    if name == "feddip" and 0.0 < config.max_penalty < MIN_PENALTY:
        return (
            f"max_penalty must be 0 or at least {MIN_PENALTY}, where FedDIP's staircase "
            f"starts, got {config.max_penalty}."
        )
    if name in GRADUAL and config.initial_sparsity > config.sparsity:
        return (
            f"initial_sparsity must be at most sparsity ({config.sparsity}), "
            f"got {config.initial_sparsity}."
        )
    tightens = name in GRADUAL and config.initial_sparsity < config.sparsity
    if tightens and config.prune_every >= config.rounds > 1:
        return (
            f"prune_every must be less than rounds ({config.rounds}), as the sparsity would never "
            f"leave initial_sparsity ({config.initial_sparsity}), got {config.prune_every}."
        )
    if name == "fedtiny" and config.swap_fraction and config.prune_every > last_revision(config):
        return (
            f"prune_every must be at most {last_revision(config)}, the last round in which fedtiny "
            f"revises its masks, got {config.prune_every}."
        )
    if name == "one_client_masks" and config.mask_client >= config.num_clients:
        return (
            f"mask_client must be less than num_clients ({config.num_clients}), "
            f"got {config.mask_client}."
        )
    if name in EXPLORING and (found := _explorers_complaint(config)):
        return found
    if config.optimizer == "adam" and config.momentum:
        return f"momentum must be 0 with the optimizer 'adam', got {config.momentum}."
    if config.optimizer == "adam" and "fednova" in (name, config.drift):
        return "optimizer must be 'sgd' for fednova, which counts steps of SGD, got 'adam'."
    if name in GATED and config.model not in GATED_NETWORKS:
        return (
            f"model must be one of {', '.join(GATED_NETWORKS)} for {name}, which needs gates, "
            f"got {config.model!r}."
        )
    if name in STEERED and config.norm != "batch":
        return (
            f"norm must be 'batch' for {name}, as statistics of a group run over channels that a "
            f"gate has closed, got {config.norm!r}."
        )
    if name in STEERED and config.gate_upload != "dense" and config.aggregator != "weighted_mean":
        return (
            f"aggregator must be 'weighted_mean' for {name} with gate_upload "
            f"{config.gate_upload!r}, as what a client does not send would count as no change; got "
            f"{config.aggregator!r}."
        )
    if name in CORRECTED and config.drift not in ("none", name):
        return f"drift must be 'none' or {name!r} for the algorithm {name!r}, got {config.drift!r}."
    if name in NORMALIZED and config.norm != "batch":
        return (
            f"norm must be 'batch' for {name}, which chooses by BatchNorm statistics, "
            f"got {config.norm!r}."
        )
    return None


def _explorers_complaint(config: Any) -> str | None:
    """Say what does not fit together of a method that explores, or None."""
    if config.explorers is not None and config.explorers > config.num_clients:
        return (
            f"explorers must be at most num_clients ({config.num_clients}), got {config.explorers}."
        )
    if config.explore_watch == "validation" and config.development_share == 1.0:
        return (
            "development_share must be less than 1 with explore_watch 'validation', as explorers "
            "would have nothing to train on, got 1.0."
        )
    if config.algorithm != "autoflip":
        return None
    if config.agreement == "scaled" and config.guidance_scale == "robust":
        return (
            "agreement must be 'none' or 'majority' with guidance_scale 'robust', whose guidance "
            "may be negative, got 'scaled'."
        )
    if config.refresh_every is not None and config.refresh_every > config.rounds:
        return (
            f"refresh_every must be at most rounds ({config.rounds}), as the mask would never be "
            f"revised, got {config.refresh_every}."
        )
    return None
