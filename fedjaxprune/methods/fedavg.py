"""FedAvg and FedProx: dense federated averaging, the baselines of everything else.

References:
  McMahan et al., `Communication-Efficient Learning of Deep Networks from Decentralized Data
  <https://arxiv.org/abs/1602.05629>`_, 2017; Li et al., `Federated Optimization in Heterogeneous
  Networks <https://arxiv.org/abs/1812.06127>`_, 2020.
"""

from collections.abc import Sequence

from fedjaxprune.federated import local_training
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.rounds.training import training
from fedjaxprune.types import Algorithm, Model


def fedavg(
    model: Model, setup: Protocol, *, penalties: Sequence[local_training.PenaltyFn] = ()
) -> Algorithm:
    """Average the clients' parameters, weighted by their numbers of examples.

    With another server than the default this is FedAvgM, FedAdam or FedYogi.

    Args:
      model: the network.
      setup: what every method shares.
      penalties: terms added to the local loss.
    """
    client = local_training.local_sgd(
        model.loss,
        batcher=setup.batcher,
        optimizer=setup.optimizer,
        learning_rate_scale=setup.learning_rate_scale,
        penalties=penalties,
    )
    return training(setup, client=client)


def fedprox(model: Model, setup: Protocol, *, mu: float) -> Algorithm:
    """Do FedAvg with a local loss that pulls towards the broadcast parameters.

    Args:
      model: the network.
      setup: what every method shares.
      mu: strength of the pull, ``mu / 2 ||w - w_t||^2``; 0 is FedAvg.
    """
    return fedavg(model, setup, penalties=(local_training.proximal(mu=mu),) if mu else ())
