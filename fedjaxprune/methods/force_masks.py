"""FORCE: masks at the start by sensitivity, in steps after which pruned weights may return.

1. ``prepare`` (at the server) or ``score`` (over clients): in each of `num_prune_steps` steps the
   gradient is taken at the weights that are left, but with respect to all of them; a weight's score
   is ``|w * g|`` with its initial value, and all weights compete again. The kept fraction shrinks
   by the same factor in each step (``steps: exponential``), down to the one that is asked for.
2. ``train``: plain training under the last mask, from the initial weights.

Iterative SNIP (``snip/iterative``) differs in one point: what is pruned stays pruned. With one step
both are SNIP.

Over clients (``force_masks/of_clients``) every step is an exchange with the cohort of the round:
live weights go down, with masks for those who lack them, and dense gradients come up. With all
clients, and without BatchNorm, this is the same as on the pooled data. A step in which no client
answers is repeated; what is missing after the last one is pruned by magnitude. The federated form,
and what happens without an answer, are ours [inferred]: the paper has one machine.

As in the public code, no layer is protected; `least_per_layer` keeps some weights of each. Its code
takes one batch in each step (``num_batches: 1``); here a step sees all batches of a pass. Batch
statistics are those of the masked network.

References:
  de Jorge et al., `Progressive Skeletonization: Trimming more fat from a network at initialization
  <https://arxiv.org/abs/2006.09081>`_, 2021.
"""

from fedjaxprune.method import Method, Needs, Paper
from fedjaxprune.methods import _scored_masks
from fedjaxprune.pruning import scores
from fedjaxprune.rounds.task import Task
from fedjaxprune.settings import Count, setting
from fedjaxprune.types import Algorithm


class ForceMasks(_scored_masks.ScoredSettings):
    """Settings of FORCE."""

    num_prune_steps: Count = setting(
        10,
        "Steps, with new gradients at each; over clients each is an exchange.",
        unit="steps",
    )
    steps: _scored_masks.Steps = _scored_masks.steps_setting("exponential")


def build(settings: ForceMasks, task: Task) -> Algorithm:
    """Score the weights of the initial network step by step, and train under the last mask."""
    after_steps = _scored_masks.sparsities(
        settings.sparsity, settings.num_prune_steps, settings.steps
    )
    tighten = _scored_masks.tighten(
        settings, task, scores.saliency, after_steps=after_steps, candidates="all"
    )
    return _scored_masks.by_gradients(
        settings, task, tighten, after_steps=after_steps, send="whole"
    )


METHOD = Method(
    build=build,
    settings=ForceMasks,
    paper=Paper(
        "de Jorge et al.",
        2021,
        "Progressive Skeletonization: Trimming more fat from a network at initialization",
        arxiv="2006.09081",
        code="https://github.com/naver/force",
    ),
    needs=lambda settings: Needs(server_examples=settings.examples == "server"),
    variants={"of_clients": {"examples": "clients"}},
    law_settings={"sparsity": 0.5, "num_prune_steps": 2},
    nothing_pruned={"sparsity": 0.0},
)
