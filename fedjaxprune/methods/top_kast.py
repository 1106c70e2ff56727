"""Top-KAST: the loss sees the largest weights of each layer, and the gradient moves some more.

In a round a client receives, of each layer, the largest weights (all but `backward_sparsity`), and
where they are. The loss sees the largest of these (all but `sparsity` of the layer), chosen anew
every `steps_between` local steps; the step moves all that were received, so that weights outside
can come in. A penalty on the squares presses weights that move unseen harder than those that are
seen. The client sends what it changed. The server keeps dense weights and chooses both sets anew
after every round; the smaller one is deployed.

Weights outside the larger set keep their value at the server, and enter it as others shrink.
After `explore_until` rounds the two sets are one. A mask then changes only where a weight that is
seen shrinks below one outside, which keeps its value.

The method was published for one machine, and we had access to its abstract. Inferred: the penalty
is half the sum of squares, divided by the density for weights that move unseen; its weight; and
what travels. The places of the larger set are sent in every round; those of the smaller one follow
from the values.

References:
  Jayakumar et al., `Top-KAST: Top-K Always Sparse Training <https://arxiv.org/abs/2106.03517>`_,
  2021.
"""

import jax.numpy as jnp
import pydantic

from fedjaxprune import masks as masks_lib
from fedjaxprune import trees
from fedjaxprune.method import Method, Paper
from fedjaxprune.methods import _dense_weights, _fixed_masks
from fedjaxprune.pruning import views
from fedjaxprune.rounds.protocol import Announcement, Hooks, Masking, broadcast_of
from fedjaxprune.rounds.task import Task
from fedjaxprune.settings import Count, NonNegative, Rounds, Settings, Sparsity, setting
from fedjaxprune.types import Algorithm, Masks, RoundState

MOVES = "moves"  # what clients are told: the weights that they may change


class TopKAST(Settings):
    """Settings of Top-KAST."""

    sparsity: Sparsity = setting(
        0.8, "Fraction of each layer that the loss does not see.", unit="fraction"
    )
    backward_sparsity: Sparsity | None = setting(
        None,
        "Fraction of each layer that does not move; at most the sparsity.",
        unit="fraction",
        unset="half of the sparsity",
    )
    penalty: NonNegative = setting(
        1e-4,
        "Weight of the penalty on squares; weights that move unseen count divided by the density.",
        unit="loss per square",
    )
    explore_until: Rounds | None = setting(
        None,
        "Rounds in which unseen weights move.",
        unit="rounds",
        unset="all",
    )
    steps_between: Count = setting(
        1, "Local steps from one choice of the weights that are seen to the next.", unit="steps"
    )

    @pydantic.model_validator(mode="after")
    def _check_sets(self):
        if self.backward_sparsity is not None and self.backward_sparsity > self.sparsity:
            raise ValueError(
                f"backward_sparsity must be at most sparsity ({self.sparsity}), as what is seen "
                f"moves, got {self.backward_sparsity}."
            )
        return self


def build(settings: TopKAST, task: Task) -> Algorithm:
    """Train the largest weights, of which the loss sees the largest.

    Raises:
      ValueError: nothing would be left of a layer.
    """
    _fixed_masks.check_layers_left(task, masks_lib.is_kernel, settings.sparsity)
    backward = settings.backward_sparsity
    until = settings.explore_until
    view = views.two_sets(
        sparsity=settings.sparsity,
        backward_sparsity=0.5 * settings.sparsity if backward is None else backward,
        coefficient=settings.penalty,
        explores=None if until is None else lambda round_index: round_index < until,
        period=settings.steps_between,
    )

    def moves(state: RoundState) -> Masks:
        broadcast = broadcast_of(state)._replace(masks=masks_lib.full(state.params))
        return view.update(state.params, broadcast).may_move

    def told(state: RoundState) -> dict[str, Masks]:
        own = trees.map_with_path(
            lambda path, leaf: leaf if masks_lib.is_kernel(path, leaf) else None, moves(state)
        )
        return {MOVES: own}

    always = Announcement(told, is_due=lambda state: jnp.bool_(True))
    return _dense_weights.train(
        task,
        view,
        sparsity=settings.sparsity,
        prunable=masks_lib.is_kernel,
        masking=Masking(train=lambda key, state: moves(state), upload=moves, download=moves),
        hooks=Hooks(announcement=always),
    )


METHOD = Method(
    build=build,
    settings=TopKAST,
    paper=Paper(
        "Jayakumar et al.", 2021, "Top-KAST: Top-K Always Sparse Training", arxiv="2106.03517"
    ),
    law_settings={"sparsity": 0.5, "backward_sparsity": 0.25, "penalty": 0.05},
    nothing_pruned={"sparsity": 0.0, "backward_sparsity": 0.0, "penalty": 0.0},
)
