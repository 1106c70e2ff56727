"""FedSGC: clients revise masks of their own, guided by where the global weights are going.

1. ``draw``: one mask is drawn at random, which follows from the run's seed and does not travel;
2. ``train``: in a readjusting round the server also sends a map of directions, the sign of each
   weight's last global step. A client trains all but its last epoch. Of the weights that each layer
   exchanges, a share (`guided_share`) goes first: live weights that local training has moved
   against the map, the smallest of them, and pruned weights that would move along with it, those
   of largest gradients. Magnitudes and gradients decide on the rest. The client trains its last
   epoch under the new masks, and sends its live weights and its masks. The server averages each
   weight over the clients that hold it, and keeps, of the weights that any client holds, the
   largest of each layer, as many as before. In other rounds it is FedAvg under the masks.

With a share of 0 no map is sent. The map travels as two masks, of the weights that rise and of
those that fall.

We had access to the abstract of the paper, to summaries, and to two implementations by others, and
this is the least certain of the methods here. What follows is inferred. A pruned weight does not
move, so its direction at the client is minus the sign of its gradient, and in the map it is that of
the last step after which it was still live (``direction: last_step`` says 0). In the public codes a
pruned weight has a direction by accident, as its last local step is not masked. Implementations
have 0.5 and later 0.01 as the share; 0.01 decides nothing in a layer that exchanges fewer than 100
weights, so 0.5 is the default. A share that finds too few weights is made up for by the others.
With one local epoch (or ``epochs_before: 0``) clients revise masks before their first step, when no
live weight has moved, so that directions decide on growing alone.

``absent: old`` lets clients that did not take part count with the global model and masks that they
were not sent, by their examples, as the paper's equation 7 is quoted: with one client in ten the
model moves by a tenth of the usual step, and live weights hardly leave.

References:
  Tian, Liu, Li, Cheung and Wang, `Gradient-Congruity Guided Federated Sparse Training
  <https://arxiv.org/abs/2405.01189>`_, 2024; Bibikar et al., `Federated Dynamic Sparse Training
  <https://arxiv.org/abs/2112.09824>`_, 2022.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.federated import aggregators
from fedjaxprune.method import Method, Paper
from fedjaxprune.methods import _own_masks
from fedjaxprune.pruning import drop_and_grow
from fedjaxprune.rounds import traffic
from fedjaxprune.rounds.protocol import Announcement, Hooks
from fedjaxprune.rounds.task import Task
from fedjaxprune.settings import setting
from fedjaxprune.types import (
    Aggregator,
    Algorithm,
    Params,
    Population,
    RoundState,
    Whole,
    count_examples,
)

RISING, FALLING = "rising", "falling"  # what clients are told: weights whose last step was up, down


class FedSGC(_own_masks.OwnMaskSettings):
    """Settings of FedSGC."""

    guided_share: float = setting(
        0.5,
        "Share of a layer's exchange that directions decide; 0 is FedDST.",
        unit="fraction",
        ge=0,
        le=1,
    )
    direction: Literal["remembered", "last_step"] = setting(
        "remembered",
        "Direction of a pruned weight in the map: that of the last step after which it was live, "
        "or none.",
    )
    absent: Literal["ignore", "old"] = setting(
        "ignore",
        "Clients that do not take part in a round count for nothing, or with the old global model "
        "and masks.",
    )


def build(settings: FedSGC, task: Task) -> Algorithm:
    """Draw one mask at random, and train under masks that clients revise by a map of directions.

    Raises:
      ValueError: nothing would be left of a layer, the rounds or epochs do not fit the run, or the
        aggregator is no mean and absent clients are to count.
    """
    rule = task.protocol.aggregator
    counts_absent = settings.absent == "old"
    if counts_absent and not isinstance(rule, Aggregator | None):
        raise ValueError(
            "server.aggregator must be a mean, such as 'weighted_mean', with method.absent 'old', "
            "as absent clients count by their examples."
        )
    is_guided = settings.guided_share > 0.0 and not _own_masks.keeps_masks(settings)
    due = _own_masks.is_due(settings, task.protocol.num_rounds)
    hooks = Hooks(
        after_round=(lambda *states: _remember(settings, *states)) if is_guided else None,
        conclude=functools.partial(count_absent, max_weight=task.protocol.max_weight)
        if counts_absent
        else None,
        announcement=Announcement(_directions, lambda state: due(state.round))
        if is_guided
        else None,
    )
    guidance = _own_masks.Guidance(
        evidence=_evidence,
        guide=lambda masks, inputs: drop_and_grow.agreement(
            masks, inputs.statistics["there"], inputs.statistics["here"]
        ),
        share=settings.guided_share,
    )
    return _own_masks.build(
        settings,
        task,
        guidance=guidance if is_guided else None,
        hooks=hooks if is_guided or counts_absent else None,
        votes=aggregators.vote_weights() if counts_absent else None,
        init=_no_direction if is_guided else None,
    )


def count_absent(
    fields: Mapping[str, Any],
    state: RoundState,
    population: Population,
    *,
    max_weight: float | None = None,
) -> dict[str, Any]:
    """Let the examples of absent clients count with the old global model and masks.

    Args:
      fields: the mean ``delta`` over holders, ``masks`` with the sums of their examples, the mean
        ``model_state``, and `traffic.NUM_EXAMPLES` of those that were heard. Without ``masks`` all
        clients hold the masks in force.
      state: before the round.
      population: all clients.
      max_weight: what a client counts for at most, in examples, heard or absent.

    Returns:
      These fields but the last, where absent clients hold the weights that are live, and change
      nothing.
    """
    heard = fields[traffic.NUM_EXAMPLES]
    rest = jnp.maximum(_num_counting(population, max_weight) - heard, 0.0)
    part = heard / jnp.maximum(heard + rest, 1.0)
    shrunk = jax.tree.map(lambda leaf: leaf * part, fields["model_state"])
    if "masks" not in fields:
        delta = jax.tree.map(lambda leaf: leaf * part.astype(leaf.dtype), fields["delta"])
        return {"delta": delta, "model_state": shrunk}
    held = jax.tree.map(
        lambda votes, mask: votes + jnp.where(mask, rest, 0.0), fields["masks"], state.masks
    )

    def shrink(delta, votes, total):
        share = votes / jnp.where(total > 0, total, jnp.ones_like(total))
        return delta * share.astype(delta.dtype)

    return {
        "delta": jax.tree.map(shrink, fields["delta"], fields["masks"], held),
        "masks": held,
        "model_state": shrunk,
    }


def _num_counting(population: Population, max_weight: float | None) -> jax.Array:
    """Count what all clients count for, in examples: ``[]`` float32."""
    if max_weight is None:
        return count_examples(population)
    if isinstance(population.whole, Whole):
        raise ValueError(
            "absent clients count for at most max_weight only where the examples of all are on the "
            "device: set execution.examples device, or leave server.max_weight out."
        )
    sizes = (population.offsets[1:] - population.offsets[:-1]).astype(jnp.float32)
    return jnp.sum(jnp.minimum(sizes, jnp.float32(max_weight)))


def _no_direction(state: RoundState) -> RoundState:
    """Start from weights that have not moved."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.int8), _prunable(state.params))
    return state._replace(method=zeros)


def _remember(settings, before, after, metrics):
    """Note the sign of the step of each weight that is live; others keep theirs, or have none."""
    keeps = settings.direction == "remembered"

    def leaf(old, mask, start, end):
        step = jnp.sign(end - start).astype(jnp.int8)
        return jnp.where(mask, step, old if keeps else jnp.zeros_like(old))

    seen = (_prunable(tree) for tree in (after.masks, before.params, after.params))
    return after._replace(method=jax.tree.map(leaf, before.method, *seen)), metrics


def _directions(state: RoundState) -> dict[str, Any]:
    return {
        RISING: jax.tree.map(lambda sign: sign > 0, state.method),
        FALLING: jax.tree.map(lambda sign: sign < 0, state.method),
    }


def _evidence(masks, params, grads, broadcast) -> dict[str, Params]:
    """Give the map, and how a client's weights move: pruned ones would go down their gradient."""

    def sign(mask, rising, falling):
        if rising is None:  # not prunable
            return jnp.zeros(mask.shape, jnp.int8)
        return rising.astype(jnp.int8) - falling.astype(jnp.int8)

    told = broadcast.announced
    start = masks_lib.apply(masks, broadcast.params)
    return {
        "there": jax.tree.map(sign, masks, told[RISING], told[FALLING]),
        "here": jax.tree.map(
            lambda mask, end, begin, grad: jnp.where(mask, end - begin, -grad),
            masks,
            params,
            start,
            grads,
        ),
    }


def _prunable(tree: Any) -> Any:
    """Put None in the place of leaves that are not prunable."""
    return trees.map_with_path(
        lambda path, leaf: leaf if masks_lib.is_kernel(path, leaf) else None, tree
    )


METHOD = Method(
    build=build,
    settings=FedSGC,
    paper=Paper(
        "Tian et al.",
        2024,
        "Gradient-Congruity Guided Federated Sparse Training",
        arxiv="2405.01189",
    ),
    law_settings={
        "sparsity": 0.5,
        "drop_fraction": 0.5,
        "prune_every": 2,
        "last_prune_round": 6,
    },
    nothing_pruned={"sparsity": 0.0, "absent": "ignore"},
)
