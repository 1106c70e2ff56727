"""Store a part of the activations for the backward pass."""

from fedjaxprune.structure import residuals
from fedjaxprune.types import Model


def pruned(model: Model, share: float) -> Model:
    """Let the layers of a model store only the largest entries of their inputs in training.

    What a convolution or dense layer keeps for its weights' gradient are the ``floor((1 - share) *
    size)`` entries of largest magnitude of its input, the whole batch together, and a bit an entry
    that says which: ``32 * (1 - share) + 1`` bits in the place of 32. The loss and the gradients of
    inputs are exact, those of weights are as if all other entries were zero. Predictions are not
    touched. It works on any `Model`; layers of a network are found in its traced loss.

    What other operations store is the same as before, as are fast forms of pooling, which are
    replaced by plain ones. So a step takes longer on a CPU: this serves to see what a small device
    would learn.

    Args:
      model: whose loss is differentiated in reverse mode.
      share: of the entries that are not stored, in [0, 1); 0 changes nothing.

    Raises:
      ValueError: `share` is out of range.

    References:
      Huang et al., `FedMef <https://arxiv.org/abs/2403.14737>`_, 2024 (scaled activation pruning).
    """
    if share == 0.0:
        return model
    weight, example = frozenset({residuals.WEIGHT}), frozenset({residuals.EXAMPLE})
    roles = (weight, frozenset[str](), example, frozenset[str]())  # params, state, batch, key
    return model._replace(loss=residuals.sparse_residuals(model.loss, share=share, roles=roles))
