"""Gradual magnitude pruning, federated: the control of everything that prunes while training.

One global mask tightens along a cubic curve by magnitude, clients train the live weights, nothing
returns. FedDIP without its penalty is close to it, but starts from random masks, and its clients
keep applying gradients to pruned weights within a round.

References:
  Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_, 2017.
"""

from fedjaxprune import masks as masks_lib
from fedjaxprune.federated import local_training
from fedjaxprune.pruning import allocation as allocations
from fedjaxprune.pruning import pruners, schedules
from fedjaxprune.rounds.protocol import Protocol
from fedjaxprune.rounds.training import training
from fedjaxprune.types import Algorithm, Model, PrunableFn


def gradual_magnitude(
    model: Model,
    setup: Protocol,
    *,
    final_sparsity: float,
    period: int,
    end_round: int,
    initial_sparsity: float = 0.0,
    allocation: allocations.AllocationFn = allocations.global_pool(),  # noqa: B008
    prunable: PrunableFn = masks_lib.is_kernel,
) -> Algorithm:
    """Prune the smallest weights of the global model, ever more of them, every `period` rounds.

    Args:
      model: the network.
      setup: what every method shares.
      final_sparsity: pruned fraction of the prunable weights from `end_round` on, in [0, 1).
      period: rounds between revisions; they fall at the end of rounds 0, `period`, ...
      end_round: index of the round at which the curve arrives.
      initial_sparsity: where the curve starts.
      allocation: how many each layer keeps.
      prunable: which leaves may be pruned.

    Raises:
      ValueError: if a sparsity lies outside [0, 1) or falls, or the rounds make no curve.
    """
    if final_sparsity < initial_sparsity:
        raise ValueError(
            f"final_sparsity must be at least initial_sparsity, as nothing grows back; got "
            f"{final_sparsity} and {initial_sparsity}."
        )
    curve = schedules.cubic(
        initial_sparsity=initial_sparsity,
        final_sparsity=final_sparsity,
        begin_round=0,
        end_round=end_round,
    )
    client = local_training.local_sgd(
        model.loss,
        batcher=setup.batcher,
        optimizer=setup.optimizer,
        learning_rate_scale=setup.learning_rate_scale,
    )
    revise = pruners.prune_to(curve, allocation=allocation)
    return training(
        setup,
        client=client,
        pruner=pruners.when(schedules.every(period), revise),
        prunable=prunable,
    )
