"""SNIP: a control whose fixed masks keep the weights of highest connection sensitivity.

A weight's score is ``|w * g|`` with `g` the mean gradient over the examples of one pass, in
training mode: a network at its start has no statistics to be evaluated with (FedTiny's code scores
in evaluation mode after a short training). Scores are compared within each layer by default, as in
that code; ``allocation: global`` is the paper's pool. The paper prunes in one step, FedTiny's code
in five, of equal numbers of weights, with new gradients at each.

``snip/iterative`` is iterative SNIP: in every step gradients are taken at the weights that are
left, and what is pruned stays pruned; the kept fraction shrinks by the same factor each time.
``snip/gradient_norm`` does the same with the squared gradient as score (GraSP-It of the same code).

On the clients' data (``snip/of_clients``) every step is one exchange: live weights go down, with
masks for those who lack them, gradients of live weights come up and are averaged by examples. The
first step is dense both ways. A step in which no client answers is repeated; what is missing after
the last one is pruned by magnitude.

References:
  Lee et al., `SNIP <https://arxiv.org/abs/1810.02340>`_, 2019; de Jorge et al., `FORCE
  <https://arxiv.org/abs/2006.09081>`_, 2021; Huang et al., `FedTiny
  <https://arxiv.org/abs/2212.01977>`_, 2023.
"""

from typing import Literal

from fedjaxprune.method import Method, Needs, Paper
from fedjaxprune.methods import _fixed_masks, _scored_masks
from fedjaxprune.pruning import scores
from fedjaxprune.rounds.task import Task
from fedjaxprune.settings import Count, setting
from fedjaxprune.types import Algorithm

_SCORES = {"sensitivity": scores.saliency, "gradient": scores.gradient}


class Snip(_scored_masks.ScoredSettings):
    """Settings of SNIP."""

    allocation: _fixed_masks.Allocation = _fixed_masks.allocation_setting("uniform")
    num_prune_steps: Count = setting(
        1, "Steps, with new gradients at each; over clients each is an exchange.", unit="steps"
    )
    steps: _scored_masks.Steps = _scored_masks.steps_setting("linear")
    score: Literal["sensitivity", "gradient"] = setting(
        "sensitivity", "What a weight is worth: |weight * gradient|, or the squared gradient."
    )


def build(settings: Snip, task: Task) -> Algorithm:
    """Score the weights of the initial network, and train under the mask of the best."""
    after_steps = _scored_masks.sparsities(
        settings.sparsity, settings.num_prune_steps, settings.steps
    )
    tighten = _scored_masks.tighten(
        settings, task, _SCORES[settings.score], after_steps=after_steps
    )
    return _scored_masks.by_gradients(settings, task, tighten, after_steps=after_steps)


METHOD = Method(
    build=build,
    settings=Snip,
    paper=Paper("Lee et al.", 2019, "SNIP", arxiv="1810.02340"),
    needs=lambda settings: Needs(server_examples=settings.examples == "server"),
    variants={
        "of_clients": {"examples": "clients"},
        "iterative": {"num_prune_steps": 10, "steps": "exponential", "allocation": "global"},
        "gradient_norm": {
            "num_prune_steps": 10,
            "steps": "exponential",
            "allocation": "global",
            "score": "gradient",
        },
    },
    law_settings={"sparsity": 0.5, "num_prune_steps": 2},
    nothing_pruned={"sparsity": 0.0},
)
