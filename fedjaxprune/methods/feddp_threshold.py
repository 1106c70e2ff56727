"""Set small weights of a client to zero after every local epoch: FedDP's second public code.

It has the name of `adaptive_dynamic_pruning` and nothing of it: no gates, no choice by example, no
masked gradients. A weight that became zero may grow again in the next epoch, everything travels,
and the mean over clients is zero only where all of them are. We keep it as a method of its own, as
a baseline.

There are no masks: the sparsity of the record is of the entries of the deployed weights that are
not zero. Where local work is a number of steps, they count as one epoch.

References:
  Yu et al., `Heterogeneous Federated Learning using Dynamic Model Pruning and Adaptive Gradient
  <https://arxiv.org/abs/2106.06921>`_, 2023: the code published as fedlib (FedDP), not the text.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import metrics as metrics_lib
from fedjaxprune import trees
from fedjaxprune.federated import local_training
from fedjaxprune.method import Method, Needs, Paper
from fedjaxprune.pruning.structured import filters
from fedjaxprune.rounds import stages
from fedjaxprune.rounds.protocol import Hooks
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import NonNegative, Settings, setting
from fedjaxprune.types import Algorithm, Client, Params, PrunableFn, RoundMetrics

SPARSITY, _ZEROS = "layer_sparsity", "zeros"  # of the training metrics
_ROUNDING = 1e-4  # of a weight: more than the sum of a cohort's deltas is rounded by


class FedDPThreshold(Settings):
    """Settings of FedDP's threshold."""

    threshold: NonNegative = setting(
        1e-3,
        "Largest magnitude that becomes zero after a local epoch (the code's manual: 0.01).",
        unit="magnitude",
    )
    layers: Literal["convolutions", "all"] = setting(
        "convolutions", "Whose kernels lose weights: those of convolutions (public code), or all."
    )


def build(settings: FedDPThreshold, task: Task) -> Algorithm:
    """Build FedAvg whose clients set small weights to zero.

    Its training metrics have ``layer_sparsity``, the code's measure: the zeros of the layers of the
    clients' own models, each layer alike.

    Raises:
      ValueError: in `init`, if none of the leaves is prunable.
    """
    prunable = filters.convolutions if settings.layers == "convolutions" else masks_lib.is_kernel

    def zeroed(params: Params) -> Params:
        def leaf(path, value):
            if not prunable(path, value):
                return value
            return jnp.where(jnp.abs(value) > settings.threshold, value, jnp.zeros_like(value))

        return trees.map_with_path(leaf, params)

    def post_step(step: local_training.LocalStep) -> local_training.Local:
        epoch = jnp.maximum(step.num_steps // task.num_epochs, 1)
        ends = (step.step + 1) % epoch == 0
        params = step.after.params
        return step.after._replace(params=trees.tree_where(ends, zeroed(params), params))

    trained = training(
        task.protocol,
        client=_measured(task.local_client(post_step=post_step), prunable),
        hooks=Hooks(after_round=_zeros_of_all(prunable)),
    )

    def init_fn(params, model_state):
        stages.check_prunable(params, prunable)
        return trained.init(params, model_state)

    return trained._replace(init=init_fn, diagnostics=diagnostics)


def diagnostics(metrics: RoundMetrics) -> dict[str, Any]:
    """Report the mean sparsity of the clients' own models, each layer counting alike."""
    share = metrics.train[SPARSITY]
    return {SPARSITY: float(share.total / share.weight)} if share.weight > 0 else {}


def layer_sparsity(params: Params, prunable: PrunableFn) -> jax.Array:
    """Average the share of zeros over the prunable layers, each counting alike: ``[]`` float32."""
    shares = [jnp.mean(zeros.astype(jnp.float32)) for zeros in _zeros(params, prunable)]
    return jnp.mean(jnp.stack(shares))


def _zeros(params: Params, prunable: PrunableFn) -> list[jax.Array]:
    flags = masks_lib.prunable_leaves(params, prunable)
    return [leaf == 0 for leaf, flag in zip(jax.tree.leaves(params), flags, strict=True) if flag]


def _measured(inner: Client, prunable: PrunableFn) -> Client:
    """Let a client report the sparsity of the model that it ends with, and where its zeros are."""

    def update_fn(key, broadcast, state, data):
        message, state = inner.update(key, broadcast, state, data)
        after = jax.tree.map(jnp.add, broadcast.params, message.fields["delta"])
        share = metrics_lib.Mean(total=layer_sparsity(after, prunable), weight=jnp.float32(1.0))
        zeros = [zeros.astype(jnp.int32) for zeros in _zeros(after, prunable)]
        metrics = {**message.fields["metrics"], SPARSITY: share, _ZEROS: zeros}
        return message._replace(fields={**message.fields, "metrics": metrics}), state

    return Client(init=inner.init, update=update_fn)


def _zeros_of_all(prunable: PrunableFn):
    """Make zero what comes to zero but for rounding, and report what is not, as no masks tell.

    Where every client made a weight zero the mean of models is zero; the mean of deltas, from which
    the server gets it, leaves a rest of rounding. A server that takes another step than the mean,
    or deltas that did not travel whole, lead elsewhere, and there the weight stays.
    """

    def after_round(before, after, metrics):
        train = dict(metrics.train)
        counts, heard = iter(train.pop(_ZEROS)), train[SPARSITY].weight

        def leaf(path, value, start):
            if not prunable(path, value):
                return value
            agreed = (next(counts).astype(jnp.float32) >= heard) & (heard > 0)
            rest = jnp.abs(value) <= _ROUNDING * jnp.abs(start)
            return jnp.where(agreed & rest, jnp.zeros_like(value), value)

        params = trees.map_with_path(leaf, after.params, before.params)
        live = jax.tree.map(lambda value: value != 0, params)
        reported = metrics._replace(train=train, num_live=masks_lib.num_kept(live))
        return after._replace(params=params), reported

    return after_round


METHOD = Method(
    build=build,
    settings=FedDPThreshold,
    paper=Paper(
        authors="Yu et al.",
        year=2023,
        title="FedDP, the code published with Heterogeneous Federated Learning using Dynamic "
        "Model Pruning and Adaptive Gradient",
        arxiv="2106.06921",
    ),
    needs=Needs(convolutions=True),
    default_model="resnet8",
    law_settings={"threshold": 0.3, "layers": "all"},
)
