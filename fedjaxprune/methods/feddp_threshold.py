"""FedDP's second public code: clients set small weights to zero after every local epoch.

It bears the name of `adaptive_dynamic_pruning` and has none of it: no gates, no choice by example,
no masked gradients. A weight that became zero may grow again in the next epoch, everything travels,
and the mean over clients is zero only where all of them are. We keep it as a method of its own, as
the baseline that it is.

References:
  Yu et al., `Heterogeneous Federated Learning using Dynamic Model Pruning and Adaptive Gradient
  <https://arxiv.org/abs/2106.06921>`_, 2023: the code published as fedlib (FedDP), not the text.
"""

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import metrics as metrics_lib
from fedjaxprune import trees
from fedjaxprune.federated import local_training
from fedjaxprune.rounds.protocol import AfterRound, Hooks, Protocol
from fedjaxprune.rounds.stages import check_prunable
from fedjaxprune.rounds.training import training
from fedjaxprune.types import Algorithm, Client, Model, Params, PrunableFn, RoundMetrics, RoundState

SPARSITY, _ZEROS = "layer_sparsity", "zeros"  # of the training metrics
_ROUNDING = 1e-4  # of a weight: more than the sum of a cohort's deltas is rounded by


def convolutions(path: str, leaf: jax.Array) -> bool:
    """Call prunable the kernels of convolutions: the dense layers stay as they are."""
    return masks_lib.is_kernel(path, leaf) and leaf.ndim > 2


def feddp_threshold(
    model: Model,
    setup: Protocol,
    *,
    num_epochs: int,
    threshold: float = 1e-3,
    prunable: PrunableFn = convolutions,
) -> Algorithm:
    """Do FedAvg whose clients set weights of small magnitude to zero after every local epoch.

    Args:
      model: the network.
      setup: what every method shares (public code: SGD 0.01 without momentum, 20 local epochs of
        batches of 64).
      num_epochs: of a client in a round; its local steps are divided by it.
      threshold: largest magnitude that becomes zero (public code: 1e-3; its manual: 1e-2).
      prunable: which leaves (public code: convolutions).

    Returns:
      An `Algorithm` without masks: `num_live`, and so the sparsity of the record, is of the entries
      of the deployed weights that are not zero. The training metrics have ``layer_sparsity``, the
      code's measure: the zeros of the layers of the clients' own models, each layer alike.

    Raises:
      ValueError: if an option is out of range; in `init`, if none of the leaves is prunable.
    """
    if not 0.0 <= threshold < float("inf"):
        raise ValueError(f"threshold must not be negative or infinite, got {threshold}.")
    if num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, got {num_epochs}.")

    def zeroed(params: Params) -> Params:
        def leaf(path, value):
            if not prunable(path, value):
                return value
            return jnp.where(jnp.abs(value) > threshold, value, jnp.zeros_like(value))

        return trees.map_with_path(leaf, params)

    def post_step(step: local_training.LocalStep) -> local_training.Local:
        epoch = jnp.maximum(step.num_steps // num_epochs, 1)
        ends = (step.step + 1) % epoch == 0
        params = step.after.params
        return step.after._replace(params=trees.tree_where(ends, zeroed(params), params))

    trained = training(
        setup,
        client=_measured(
            local_training.local_sgd(
                model.loss,
                batcher=setup.batcher,
                optimizer=setup.optimizer,
                learning_rate_scale=setup.learning_rate_scale,
                post_step=post_step,
            ),
            prunable,
        ),
        prunable=prunable,
        hooks=Hooks(after_round=_counted(prunable)),
    )

    def init_fn(params, model_state):
        check_prunable(params, prunable)
        return trained.init(params, model_state)

    return trained._replace(init=init_fn)


def layer_sparsity(params: Params, prunable: PrunableFn) -> jax.Array:
    """Average the share of zeros over the prunable layers, each counting alike: ``[]`` float32."""
    flags = masks_lib.prunable_leaves(params, prunable)
    shares = [
        jnp.mean((leaf == 0).astype(jnp.float32))
        for leaf, flag in zip(jax.tree.leaves(params), flags, strict=True)
        if flag
    ]
    return jnp.mean(jnp.stack(shares))


def _measured(inner: Client, prunable: PrunableFn) -> Client:
    """Let a client report the sparsity of the model that it ends with, and where its zeros are."""

    def update_fn(key, broadcast, state, data):
        message, state = inner.update(key, broadcast, state, data)
        after = jax.tree.map(jnp.add, broadcast.params, message.fields["delta"])
        flags = masks_lib.prunable_leaves(after, prunable)
        share = metrics_lib.Mean(total=layer_sparsity(after, prunable), weight=jnp.float32(1.0))
        zeros = [
            (leaf == 0).astype(jnp.int32)
            for leaf, flag in zip(jax.tree.leaves(after), flags, strict=True)
            if flag
        ]
        metrics = {**message.fields["metrics"], SPARSITY: share, _ZEROS: zeros}
        return message._replace(fields={**message.fields, "metrics": metrics}), state

    return Client(init=inner.init, update=update_fn)


def _counted(prunable: PrunableFn) -> AfterRound:
    """Make zero what comes to zero but for rounding, and report what is not, as no masks tell.

    Where every client made a weight zero the mean of models is zero; the mean of deltas, from which
    the server gets it, leaves a rest of rounding. A server that takes another step than the mean,
    or deltas that did not travel whole, lead elsewhere, and there the weight stays.
    """

    def after_round(
        before: RoundState, after: RoundState, metrics: RoundMetrics
    ) -> tuple[RoundState, RoundMetrics]:
        train = dict(metrics.train)
        counts, heard = iter(train.pop(_ZEROS)), train[SPARSITY].weight

        def leaf(path, value, old):
            if not prunable(path, value):
                return value
            agreed = (next(counts).astype(jnp.float32) >= heard) & (heard > 0)
            rest = jnp.abs(value) <= _ROUNDING * jnp.abs(old)
            return jnp.where(agreed & rest, jnp.zeros_like(value), value)

        params = trees.map_with_path(leaf, after.params, before.params)
        num_live = masks_lib.num_kept(jax.tree.map(lambda value: value != 0, params))
        return after._replace(params=params), metrics._replace(train=train, num_live=num_live)

    return after_round
