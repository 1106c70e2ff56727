"""The field's formulas for a round's arithmetic, by the papers that state or imply them.

In all of them a training step costs three forward passes: the forward pass, the gradient of the
activations and the gradient of the weights. `F_d` and `F_s` are the forward passes of the dense and
the sparse network, in any unit. They leave out what `costs.flops` does not: that the first layer
needs no gradient of its input, so that they are a little larger than what a step takes.
"""

from collections.abc import Callable, Sequence

from fedjaxprune.costs.flops import Cost, Layer


def dense_round(dense_forward: float, num_steps: int) -> float:
    """State what a round of dense training costs: ``3 F_d E``."""
    return 3 * dense_forward * num_steps


def sparse_round(sparse_forward: float, num_steps: int) -> float:
    """State what a round of training under a fixed mask costs: ``3 F_s E``."""
    return 3 * sparse_forward * num_steps


def autoflip_run(
    dense_forward: float, sparse_forward: float, num_explored: float, num_trained: float
) -> float:
    """State what AutoFLIP costs with its exploration: ``3 F_d`` and ``3 F_s`` a step of each."""
    return dense_round(dense_forward, 1) * num_explored + sparse_round(sparse_forward, 1) * (
        num_trained
    )


def prunefl_round(sparse_forward: float, dense_forward: float, num_steps: int) -> float:
    """State PruneFL's round, whose weight gradient alone is dense: ``(2 F_s + F_d) E``.

    It gives the 0.34 that FedTiny's paper reports for PruneFL.

    References:
      Jiang et al., `PruneFL <https://arxiv.org/abs/1909.12326>`_, 2019; Huang et al., `FedTiny
      <https://arxiv.org/abs/2212.01977>`_, 2022.
    """
    return (2 * sparse_forward + dense_forward) * num_steps


def prunefl_round_of_fedrts(sparse_forward: float, dense_forward: float, num_steps: int) -> float:
    """State PruneFL's round as FedRTS charges it, both gradients dense: ``(2 F_d + F_s) E``.

    References:
      `FedRTS <https://arxiv.org/abs/2501.19122>`_, 2025, appendix F.
    """
    return (2 * dense_forward + sparse_forward) * num_steps


def adjusting_round(sparse_forward: float, dense_forward: float, num_steps: int) -> float:
    """State the costliest round of a method that grows by gradient in its last step only.

    ``3 F_s (E - 1) + F_s + 2 F_d``: RigL, FedDST, FedSGC, FedRTS, and FedTiny if all layers are
    adjusted at once.

    References:
      Evci et al., `RigL <https://arxiv.org/abs/1911.11134>`_, 2020; `FedRTS
      <https://arxiv.org/abs/2501.19122>`_, 2025, appendix F.
    """
    return 3 * sparse_forward * (num_steps - 1) + sparse_forward + 2 * dense_forward


def fedmef_round(
    sparse_forward: float, dense_forward: float, other_forward: float, num_steps: int
) -> float:
    """State FedMef's round: an adjusting one whose sparse passes cost `other_forward` more.

    References:
      `FedRTS <https://arxiv.org/abs/2501.19122>`_, 2025, appendix F.
    """
    return adjusting_round(sparse_forward + other_forward, dense_forward, num_steps)


def step(layers: Sequence[Layer], *, dense_gradient: Callable[[str], bool] | None = None) -> Cost:
    """Count one training step, with the weight gradient dense where a method looks at all of it.

    With no dense gradient it is training under a mask; with all of them PruneFL's step or dense
    error feedback; with the layers of one block FedTiny's adjusting step.

    Args:
      layers: as `costs.flops` counted them.
      dense_gradient: tells by a layer's path whether its weight gradient is dense.
    """

    def weight_gradient(layer: Layer) -> int:
        is_dense = dense_gradient is not None and dense_gradient(layer.path)
        return (layer.dense if is_dense else layer.sparse).weight_gradient

    return Cost(
        forward=sum(layer.sparse.forward for layer in layers),
        input_gradient=sum(layer.sparse.input_gradient for layer in layers),
        weight_gradient=sum(map(weight_gradient, layers)),
    )
