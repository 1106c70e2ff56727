"""Federated pruning as pure functions over parameter trees and mask trees.

Importing this package imports nothing else: a name is looked up when it is first used.
"""

from fedjaxprune import namespace

__version__ = "0.2.0"

__all__, __getattr__, __dir__ = namespace.offer(
    __name__,
    modules=(
        "costs data federated live_weights masks methods metrics models pruning registry "
        "rounds structure testing trees types wire"
    ),
    names={
        "experiment.verbs": ("Run Sweep compare describe export find load report resume run sweep"),
        "experiment.run.composing": "task",
        "experiment.run.listener": "Listener",
        "types": "Aggregator Algorithm Client Downlink Model Pruner Stage Uplink",
        "rounds.task": "Task",
        "rounds.protocol": "Protocol",
        "method": "Method Needs Paper",
        "registry": "Part part",
        "data.datasets": "Dataset",
        "settings": "Settings setting",
        "errors": "ConfigError DataError FedJaxPruneError RunFolderError",
    },
)
