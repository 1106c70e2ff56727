"""Prune at the client by magnitude: the unstructured form in which FedDIP compares with PruneTrain.

Of PruneTrain it shares the lasso alone, here with one group a layer: no channel is removed. We
report it under a name of its own.

In a round, clients receive the model under the masks in force and train all of its weights, with
`penalty` times the sum of the layers' Euclidean norms added to the loss. After its last step a
client keeps the weights of largest magnitude, as many as the sparsity of the round says, and sends
them with its own mask. A weight that a client does not send counts as zero in the mean. The server
prunes the mean to the same sparsity, and chooses anew among all weights. So a weight that is pruned
in one round may be live in the next.

The sparsity climbs along a cubic curve, from `initial_sparsity` in round 0 to the sparsity at the
end of the run, and the last round is a little short of it. As in the public code, the first and the
last kernel are dense (``ends: prunable`` prunes them, too), and there is one pool of all others.
Such a pool can empty a layer whose weights are small at the start; ``allocation: uniform`` cannot.
The code's learning rate decays by 0.998 a round: see ``client.learning_rate_decay``.

References:
  Long et al., `FedDIP <https://arxiv.org/abs/2309.06805>`_, 2023, whose public code this follows.
  Lym et al., `PruneTrain <https://arxiv.org/abs/1901.09290>`_, 2019.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import pydantic

from fedjaxprune import masks as masks_lib
from fedjaxprune.federated import penalties
from fedjaxprune.method import Method, Paper
from fedjaxprune.methods import _fixed_masks
from fedjaxprune.pruning import allocation, pruners, schedules, scores
from fedjaxprune.rounds import facts as facts_lib
from fedjaxprune.rounds.protocol import Masking
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import NonNegative, Settings, Sparsity, setting
from fedjaxprune.types import Algorithm, Client, PrunableFn, Pruner, PrunerInputs

ALLOCATIONS = {
    "global": allocation.global_pool,
    "uniform": allocation.uniform,
    "erk": allocation.erk,
}


class FedDIPPruneTrain(Settings):
    """Settings of pruning at the client."""

    sparsity: Sparsity = setting(
        0.9,
        "Pruned fraction of the prunable weights that the curve leads to at the end of the run.",
        unit="fraction",
    )
    initial_sparsity: Sparsity | None = setting(
        None,
        "Sparsity of the first round; at most the sparsity.",
        unit="fraction",
        unset="0.5, or the sparsity if that is less",
    )
    penalty: NonNegative = setting(
        0.01, "Coefficient of the sum of the layers' norms.", unit="factor"
    )
    allocation: Literal["global", "uniform", "erk"] = setting(
        "global",
        "How layers share the live weights: one pool (public code), the same share of each, or a "
        "larger share of small ones.",
    )
    ends: Literal["dense", "prunable"] = setting(
        "dense", "Whether the first and the last kernel stay dense, as in the public code."
    )

    @pydantic.model_validator(mode="after")
    def _check_curve(self):
        if self.initial_sparsity is not None and self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"initial_sparsity must be at most sparsity ({self.sparsity}), as the sparsity "
                f"only climbs, got {self.initial_sparsity}."
            )
        return self


def build(settings: FedDIPPruneTrain, task: Task) -> Algorithm:
    """Build FedAvg whose clients prune what they send.

    Raises:
      ValueError: nothing would be left of the prunable leaves, or of one of them under
        ``uniform``, or there are none.
    """
    prunable = _prunable(settings, task)
    if settings.sparsity > 0.0:
        _fixed_masks.check_something_left(task, prunable, settings.sparsity)
        if settings.allocation == "uniform":
            _fixed_masks.check_layers_left(
                task,
                prunable,
                settings.sparsity,
                advice=" with method.allocation 'uniform' (erk keeps more of small layers)",
            )
    start = settings.initial_sparsity
    curve = schedules.cubic(
        initial_sparsity=min(0.5, settings.sparsity) if start is None else start,
        final_sparsity=settings.sparsity,
        begin_round=0,
        end_round=task.protocol.num_rounds,
    )
    prune = pruners.prune_to(curve, allocation=ALLOCATIONS[settings.allocation]())
    anew = pruners.chain(pruners.grow_to(0.0, score=scores.magnitude), prune)
    terms = ()
    if settings.penalty:
        norms = penalties.layer_norms(
            coefficient=lambda round_index: jnp.float32(settings.penalty), prunable=prunable
        )
        terms = (norms,)
    client = task.local_client(penalties=terms)
    if settings.sparsity == 0.0:
        return training(task.protocol, client=client, prunable=prunable)

    def everything(state):
        return masks_lib.full(state.params)

    return training(
        task.protocol,
        client=pruned_at_end(client, prune, prunable),
        pruner=anew,
        prunable=prunable,
        masking=Masking(
            train=lambda key, state: everything(state), upload=everything, absent="zero"
        ),
    )


def pruned_at_end(inner: Client, pruner: Pruner, prunable: PrunableFn) -> Client:
    """Let a client prune what it has trained, and send it under a mask of its own."""
    own = pruners.exempt(pruner, prunable)

    def update_fn(key, broadcast, state, data):
        message, state = inner.update(key, broadcast, state, data)
        after = jax.tree.map(jnp.add, broadcast.params, message.fields["delta"])
        inputs = PrunerInputs(params=after, grads=None, round=broadcast.round)
        masks, _ = own.update(key, masks_lib.full(after), own.init(after), inputs)
        delta = masks_lib.apply(masks, message.fields["delta"])
        fields = {**message.fields, "delta": delta, "masks": masks}
        return message._replace(fields=fields), state

    return Client(init=inner.init, update=update_fn)


def _prunable(settings: FedDIPPruneTrain, task: Task) -> PrunableFn:
    """Take all kernels, or all but the first and the last that inference uses."""
    if settings.ends == "prunable":
        return masks_lib.is_kernel
    shapes = facts_lib.leaves_by_path(task.facts)
    paths = [p for p in task.facts.reading_order() if masks_lib.is_kernel(p, shapes[p])]
    ends = {*paths[:1], *paths[-1:]}
    return lambda path, leaf: path not in ends and masks_lib.is_kernel(path, leaf)


METHOD = Method(
    build=build,
    settings=FedDIPPruneTrain,
    paper=Paper(
        "Long et al.",
        2023,
        "FedDIP: Federated Learning with Extreme Dynamic Pruning and Incremental Regularization",
        arxiv="2309.06805",
        code="https://github.com/EricLoong/feddip",
    ),
    law_settings={"sparsity": 0.75, "initial_sparsity": 0.25, "ends": "prunable"},
    nothing_pruned={"sparsity": 0.0, "initial_sparsity": 0.0, "penalty": 0.0},
)
