"""Federated pruning as pure functions over parameter trees and mask trees.

Importing this package imports nothing else: a name is looked up when it is first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_VERBS = (
    "compare",
    "describe",
    "export",
    "find",
    "load",
    "report",
    "resume",
    "run",
    "sweep",
    "task",
)
# Public names by the module that they are taken from.
_PLACES = {
    **dict.fromkeys((*_VERBS, "Run", "Sweep"), "fedjaxprune.experiment.verbs"),
    "Listener": "fedjaxprune.experiment.run.listener",
    **dict.fromkeys(
        ("Aggregator", "Algorithm", "Client", "Model", "Pruner", "Stage", "Uplink"),
        "fedjaxprune.types",
    ),
    "Task": "fedjaxprune.rounds.task",
    "Protocol": "fedjaxprune.rounds.protocol",
    **dict.fromkeys(("Method", "Needs", "Paper"), "fedjaxprune.method"),
    **dict.fromkeys(("Part", "part"), "fedjaxprune.registry"),
    "Dataset": "fedjaxprune.data.datasets",
    **dict.fromkeys(("Settings", "setting"), "fedjaxprune.settings"),
    **dict.fromkeys(
        ("ConfigError", "DataError", "FedJaxPruneError", "RunFolderError"), "fedjaxprune.errors"
    ),
}
_NAMESPACES = (
    "costs",
    "data",
    "federated",
    "masks",
    "methods",
    "metrics",
    "models",
    "pruning",
    "registry",
    "rounds",
    "structure",
    "trees",
    "types",
    "wire",
)

__all__ = ["__version__", *sorted([*_PLACES, *_NAMESPACES])]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _PLACES:
        found = getattr(importlib.import_module(_PLACES[name]), name)
    elif name in _NAMESPACES:
        found = importlib.import_module(f"fedjaxprune.{name}")
    else:
        raise AttributeError(f"module 'fedjaxprune' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """List the public names, used or not."""
    return sorted(__all__)
