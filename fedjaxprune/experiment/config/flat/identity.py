"""Which settings matter to a run, and so which runs are seeds of one configuration.

A setting of another method, or of a part that is not in use, tells two runs apart in name only.
Methods of other versions are taken to need every setting.
"""

from collections.abc import Callable, Mapping
from typing import Any

from fedjaxprune.experiment import methods

# Where a run lies and how it is watched: the numbers are the same (up to rounding, for devices).
NEUTRAL = (
    "out",
    "data_dir",
    "chunk_size",
    "devices",
    "eval_every",
    "eval_from",
    "checkpoint_every",
    "keep_checkpoints",
)
SEED = "seed"

_DIP = ("feddip", "feddip_without_penalty")
_ITERATIVE = ("mpfl", "pooled_filters", "averaged_filters")
_TRAINED = ("fedtiny", "magnitude_masks", "one_client_masks", "pooled_masks", *_ITERATIVE)
_OF_METHODS: Mapping[str, tuple[str, ...]] = {
    "sparsity": methods.PRUNING,
    "initial_sparsity": methods.GRADUAL,
    "prune_every": (*methods.GRADUAL, "fedtiny"),
    "max_penalty": ("feddip", "feddip_without_pruning"),
    "feddip_mode": _DIP,
    "proximal_mu": ("fedprox",),
    "layer_sparsity": methods.FIXED,
    "mask_client": ("one_client_masks",),
    "mask_start": ("magnitude_masks", "one_client_masks", "pooled_masks"),
    "pretrain_epochs": _TRAINED,
    "pool_size": ("fedtiny",),
    "fedtiny_selection": ("fedtiny",),
    "development_share": ("fedtiny", *methods.EXPLORING),
    "swap_fraction": ("fedtiny",),
    "prune_until": ("fedtiny",),
    **dict.fromkeys(
        ("explore_epochs", "explore_patience", "explore_watch", "explorers"), methods.EXPLORING
    ),
    **dict.fromkeys(
        (
            "explorer_weights",
            "explore_start",
            "guidance_scale",
            "agreement",
            "refresh_every",
            "channel_threshold",
        ),
        ("autoflip",),
    ),
    **dict.fromkeys(("mask_iterations", "filter_factor"), _ITERATIVE),
    **dict.fromkeys(("consensus", "votes"), ("mpfl",)),
    **dict.fromkeys(("start_rounds", "drops"), methods.BY_FILTER),
    **dict.fromkeys(("gate_warm_up", "gate_gradient", "gate_upload", "gates"), methods.STEERED),
    "weight_threshold": ("feddp_threshold",),
}
_LISTED = (
    *methods.PRUNING,
    *methods.CORRECTED,
    *methods.GATED,
    "fedavg",
    "fedprox",
    "feddip_without_pruning",
    "explored_start",
    "feddp_threshold",
)
_OF_PARTS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "classes_per_client": lambda config: config.get("partition") == "shards",
    "alpha": lambda config: config.get("partition") == "dirichlet",
    "min_client_size": lambda config: config.get("partition") == "dirichlet",
    "trim_fraction": lambda config: config.get("aggregator") == "trimmed_mean",
    "server_momentum": lambda config: config.get("server") == "fedavgm",
    "uplink_fraction": lambda config: config.get("uplink") in ("top_k", "random_k"),
    "uplink_bits_per_value": lambda config: config.get("uplink") == "quantize",
    "local_epochs": lambda config: config.get("local_steps") is None,
    "gate_density": lambda config: (
        str(config.get("model")).startswith("gated_")
        and config.get("algorithm") != "squeeze_excitation"  # which opens all channels
    ),
    "development_share": lambda config: (
        config.get("algorithm") not in methods.EXPLORING
        or config.get("explore_watch") == "validation"
    ),
}


def knobs(algorithm: str) -> tuple[str, ...]:
    """List the settings that are a method's own."""
    own = [name for name, methods_of in _OF_METHODS.items() if algorithm in methods_of]
    return (*own, *(["gate_density"] if algorithm in methods.STEERED else []))


def matters(name: str, config: Mapping[str, Any]) -> bool:
    """Tell whether a setting can change the numbers of a run with this config."""
    if name in NEUTRAL:
        return False
    algorithm = config.get("algorithm")
    if algorithm in _LISTED and algorithm not in _OF_METHODS.get(name, (algorithm,)):
        return False
    return _OF_PARTS.get(name, lambda config: True)(config)


def configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the settings that matter, but for the seed."""
    return {name: value for name, value in config.items() if name != SEED and matters(name, config)}
