"""SSFL: one mask at the start, from what all clients say of the initial network.

1. ``score``: every client is sent the dense initial model and scores each weight by ``|w * g|``,
   `g` being its gradient on one batch of its own, without augmentation. The scores of kernels come
   up and are averaged by numbers of examples; the best of the whole network are kept.
2. ``train``: plain training under this mask, from the initial weights. Each client is sent the mask
   once; then values alone travel.

Scores are averaged, not gradients: a weight that clients pull in opposite directions keeps its
worth, where the mean gradient (``snip/of_clients``) is small. Clients that drop out or hold no
examples do not count. If no client answers, the largest weights are kept [inferred].

Where we differ from the public code: it keeps all ties at the threshold, here counts are exact and
the lower index comes first; it averages clients alike (`score_weights`: clients), the paper by
examples; it scores in inference mode, here the network is in training mode (both are the same
without BatchNorm); it scores augmented images. Nothing protects a layer from being pruned away
unless `least_per_layer` is set. Not implemented: a new mask when the data change.

References:
  Ohib et al., `SSFL: Discovering Sparse Unified Subnetworks at Initialization for Efficient
  Federated Learning <https://arxiv.org/abs/2405.09037>`_, 2024.
"""

from typing import Literal

import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.federated import derivatives
from fedjaxprune.federated.derivatives import Given
from fedjaxprune.method import Method, Paper
from fedjaxprune.methods import _fixed_masks, _scored_masks
from fedjaxprune.pruning import scores
from fedjaxprune.rounds import reporting
from fedjaxprune.rounds.protocol import FieldSpec, broadcast_of, joining
from fedjaxprune.rounds.task import Task
from fedjaxprune.settings import Count, Sparsity, setting
from fedjaxprune.traffic import BACKPROPAGATED
from fedjaxprune.types import Algorithm


class Ssfl(_fixed_masks.FixedMaskSettings):
    """Settings of SSFL."""

    sparsity: Sparsity = setting(
        0.5, "Pruned fraction of the prunable weights, the same in all rounds.", unit="fraction"
    )
    allocation: _fixed_masks.Allocation = _fixed_masks.allocation_setting("global")
    num_batches: Count = setting(
        1, "Batches on which a client scores; the scores are averaged.", unit="batches"
    )
    score_weights: Literal["examples", "clients"] = setting(
        "examples", "Whether clients count by their examples in the mean of scores, or alike."
    )


def build(settings: Ssfl, task: Task) -> Algorithm:
    """Ask all clients for scores, and train under the mask of the best."""
    tighten = _scored_masks.tighten(settings, task, scores.value, reads="scores")

    def server_update(key, state, fields):
        masks = tighten(key, state.masks, state.params, fields["scores"], jnp.int32(0))
        return state._replace(masks=masks)

    score = reporting.reporting_round(
        task.protocol,
        name="score",
        client=derivatives.report(
            task.model.loss,
            batcher=derivatives.first_batches(task.batches(augment=False), settings.num_batches),
            name="scores",
            derivative=derivatives.sensitivity(),
        ),
        fields={
            "scores": FieldSpec(
                joining(task.protocol, by=settings.score_weights), travels=masks_lib.is_kernel
            )
        },
        server_update=server_update,
        broadcast=lambda state: Given(broadcast_of(state)),
        exchange=reporting.Exchange(
            cohort="everyone",
            compute=lambda state: {
                BACKPROPAGATED: jnp.asarray(trees.sizes(state.params), jnp.int32)[None]
            },
        ),
    )
    return _scored_masks.train_under(settings, task, score, _scored_masks.settle(settings, task))


METHOD = Method(
    build=build,
    settings=Ssfl,
    paper=Paper(
        "Ohib et al.",
        2024,
        "SSFL: Discovering Sparse Unified Subnetworks at Initialization for Efficient Federated "
        "Learning",
        arxiv="2405.09037",
    ),
    law_settings={"sparsity": 0.5},
    nothing_pruned={"sparsity": 0.0},
)
