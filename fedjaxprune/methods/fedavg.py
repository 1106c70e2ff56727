"""FedAvg: dense federated averaging, the baseline of every pruning method.

Clients train the dense model and the server averages their parameters, weighted by their numbers
of examples. With another server optimizer this is FedAvgM, FedAdam or FedYogi; with
``client.proximal_mu`` it is FedProx, with ``client.correction`` SCAFFOLD or FedNova.

References:
  McMahan et al., `Communication-Efficient Learning of Deep Networks from Decentralized Data
  <https://arxiv.org/abs/1602.05629>`_, 2017; Li et al., `Federated Optimization in Heterogeneous
  Networks <https://arxiv.org/abs/1812.06127>`_, 2020.
"""

from fedjaxprune.method import Method, Paper
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import Settings
from fedjaxprune.types import Algorithm


class FedAvg(Settings):
    """Settings of FedAvg: there are none beside those of the protocol."""


def build(settings: FedAvg, task: Task) -> Algorithm:
    """Average the clients' parameters, weighted by their numbers of examples."""
    del settings  # there are none
    dense = training(task.protocol, client=task.local_client())
    return dense._replace(has_fixed_masks=True)


METHOD = Method(
    build=build,
    settings=FedAvg,
    paper=Paper(
        "McMahan et al.",
        2017,
        "Communication-Efficient Learning of Deep Networks from Decentralized Data",
        arxiv="1602.05629",
    ),
    variants={
        "fedprox": {"client.proximal_mu": 0.01},
        "scaffold": {"client.correction": "scaffold"},
        "fednova": {"client.correction": "fednova"},
    },
)
