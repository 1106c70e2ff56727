"""DPF: dynamic pruning with feedback; pruned weights keep learning and can return.

Clients take gradients at the masked weights and apply them to the dense ones. Every
`steps_between` local steps they choose their masks anew, the weights of largest magnitude in one
pool, as many as the server's masks keep. The server adds the clients' dense deltas, and every
`prune_every` rounds it chooses its masks in the same way, ever fewer weights along a cubic curve
from the dense model. The curve arrives in `end_round`; after the next revision all masks are fixed.

Where the dense weights live is `mode`:

- ``dense``: the server keeps dense weights and broadcasts them masked; at a client pruned weights
  begin at zero;
- ``dense_both_ways``: the server also sends the pruned weights, so that a client's masks go by all
  that was learned;
- ``masked`` and ``regrow``: the server sets pruned weights to zero, so that feedback lasts for one
  round; ``regrow`` lets weights return at a revision, for which clients send dense deltas.

With ``steps_between`` 1 and ``dense_both_ways`` it is straight-through magnitude pruning. The
method was published for one machine; what clients and server share is our choice. So are counts of
weights that are exact, kernels of all layers, and a count of steps that starts anew in every round.
The record counts dense weight gradients where clients send dense deltas: those that act inside a
round alone (``masked``, and most rounds of ``regrow``) are not counted.

References:
  Lin et al., `Dynamic Model Pruning with Feedback <https://arxiv.org/abs/2006.07253>`_, 2020;
  Bengio et al., `Estimating or Propagating Gradients Through Stochastic Neurons
  <https://arxiv.org/abs/1308.3432>`_, 2013.
"""

from typing import Literal

from fedjaxprune import masks as masks_lib
from fedjaxprune.method import Method, Paper
from fedjaxprune.methods import _dense_weights, _gradual
from fedjaxprune.pruning import views
from fedjaxprune.rounds.protocol import Hooks
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import INT_MAX, Rounds, Sparsity, setting
from fedjaxprune.types import Algorithm

LAST = 0.75  # where in a run the curve arrives, as published


class DPF(_gradual.GradualSettings):
    """Settings of DPF."""

    sparsity: Sparsity = _gradual.sparsity_setting(0.9)
    initial_sparsity: Sparsity | None = setting(
        0.0,
        "Sparsity after the first revision; at most the sparsity. None takes 0.5, or the sparsity "
        "if that is less.",
        unit="fraction",
    )
    prune_every: Rounds | None = setting(
        1,
        "Rounds from one revision of the server's masks to the next; the first is at the end of "
        "the first round. None takes 5, or less in a run of five rounds or fewer.",
        unit="rounds",
    )
    end_round: Rounds | None = setting(
        None,
        "Round at whose end the curve arrives at the sparsity, counted from 0; the masks are fixed "
        "after the next revision.",
        unit="round",
        unset="the one at three quarters of the run",
    )
    steps_between: int | None = setting(
        16,
        "Local steps from one choice of a client's own masks to the next; none keeps the server's "
        "masks inside a round.",
        unit="steps",
        ge=1,
        le=INT_MAX,
    )
    mode: Literal["dense", "dense_both_ways", "masked", "regrow"] = setting(
        "dense",
        "Where dense weights are kept: at the server, which broadcasts live or (dense_both_ways) "
        "all of them, or inside a client's round alone; regrow lets weights return all the same.",
    )


def build(settings: DPF, task: Task) -> Algorithm:
    """Train dense weights that are seen through the masks of the largest.

    Raises:
      ValueError: nothing would be left of the network, or the sparsity would never change.
    """
    num_rounds = task.protocol.num_rounds
    end_round = settings.end_round or max(1, int(LAST * num_rounds))
    curve = _gradual.plan(settings, task, end_round=end_round, prunable=masks_lib.is_kernel)
    last = (
        -(-end_round // curve.period) * curve.period
    )  # the first revision that finds the curve at its end
    plan = curve._replace(due=lambda round_index: curve.due(round_index) & (round_index <= last))
    sends_all = settings.mode == "dense_both_ways"
    revise, masking = _gradual.feedback(plan, "dense" if sends_all else settings.mode)
    if sends_all:
        masking = masking._replace(download=masking.upload)
    view = views.largest(
        period=settings.steps_between, revises=lambda round_index: round_index <= last
    )
    algorithm = training(
        task.protocol,
        client=task.viewed_client(view),
        pruner=revise,
        masking=masking,
        hooks=Hooks(after_round=_dense_weights.note_seen) if sends_all else None,
    )
    return algorithm._replace(notes=curve.notes)


METHOD = Method(
    build=build,
    settings=DPF,
    paper=Paper("Lin et al.", 2020, "Dynamic Model Pruning with Feedback", arxiv="2006.07253"),
    variants={"straight_through": {"steps_between": 1, "mode": "dense_both_ways"}},
    law_settings={
        "sparsity": 0.75,
        "initial_sparsity": 0.25,
        "prune_every": 2,
        "end_round": 6,
        "steps_between": 2,
    },
    nothing_pruned={"sparsity": 0.0, "initial_sparsity": 0.0},
)
