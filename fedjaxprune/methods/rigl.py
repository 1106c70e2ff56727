"""RigL-style dynamic sparse training: a random sparse start whose weights follow the gradients.

1. ``draw``: one mask is drawn at random, which follows from the run's seed and does not travel;
2. ``train``: every `prune_every` rounds each layer drops the share of its live weights that is
   smallest and grows as many pruned ones whose gradients are largest; grown weights start from
   zero. The share decays along a cosine, and exchanges end before the last quarter of the run, so
   that the model can settle. The sparsity of every layer is constant.

RigL trains on one machine; here the server exchanges weights by the mean of the gradients of the
clients' last local batches. A client sends only as many as its layer grows, the largest, as pairs
of index and value, so no dense gradient travels. Different as well: numbers of weights are rounded
up, and a weight that was just dropped, or whose gradient is 0, is not grown (the public code rounds
down and lets dropped weights return at once).

With ``grow: random`` it is SET: weights are grown at random, those just dropped included, numbers
are rounded down, and nothing but live weights and new masks travels. Its share
(``decay: constant``) does not decay.

References:
  Evci et al., `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020; Mocanu et al.,
  `Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity
  <https://arxiv.org/abs/1707.04780>`_, 2018 (SET).
"""

from typing import Literal

from fedjaxprune import masks as masks_lib
from fedjaxprune.federated import local_training, sparse_gradients
from fedjaxprune.method import Method, Paper
from fedjaxprune.methods import _due_rounds, _fixed_masks
from fedjaxprune.pruning import drop_and_grow, schedules, scores
from fedjaxprune.rounds.protocol import FieldSpec
from fedjaxprune.rounds.stages import in_order
from fedjaxprune.rounds.task import Task
from fedjaxprune.rounds.training import training
from fedjaxprune.settings import Fraction, Rounds, setting
from fedjaxprune.types import Algorithm

LAST = 0.75  # where in a run the exchanges end, as published


class RigL(_fixed_masks.FixedMaskSettings):
    """Settings; share, decay and end of the exchanges are the published ones."""

    allocation: _fixed_masks.Allocation = _fixed_masks.allocation_setting("erk")
    drop_fraction: Fraction = setting(
        0.3,
        "Share of a layer's live weights that the first exchange replaces; 0 keeps the masks.",
        unit="fraction",
    )
    decay: Literal["cosine", "constant"] = setting(
        "cosine", "Whether that share decays to 0 along a cosine, or stays until the exchanges end."
    )
    grow: Literal["gradient", "random"] = setting(
        "gradient", "What is grown: pruned weights of largest gradient, or any, as in SET."
    )
    prune_every: Rounds | None = setting(
        None,
        "Rounds from one exchange of weights to the next.",
        unit="rounds",
        unset="10, or a third of last_prune_round if that is less",
    )
    last_prune_round: Rounds | None = setting(
        None,
        "Last round of training that may exchange weights; the share decays to 0 after it.",
        unit="round",
        unset="the one at three quarters of the run",
    )


def build(settings: RigL, task: Task) -> Algorithm:
    """Draw one mask at random, and train under masks that follow the gradients.

    Raises:
      ValueError: nothing would be left of a layer, or no exchange would take place.
    """
    draw = _fixed_masks.draw(settings, task)
    if settings.drop_fraction == 0.0 or settings.sparsity == 0.0:
        return _fixed_masks.train_under(task, settings.sparsity, draw)
    return in_order(_train(settings, task), (draw,), sparsity=settings.sparsity)


def _train(settings: RigL, task: Task) -> Algorithm:
    period, until = _exchange_rounds(settings, task.protocol.num_rounds)
    is_random = settings.grow == "random"
    fraction = (
        schedules.constant(settings.drop_fraction)
        if settings.decay == "constant"
        else drop_and_grow.cosine_decay(initial=settings.drop_fraction, until=until + 1)
    )
    num_exchanged = drop_and_grow.counts(
        fraction=fraction,
        period=period,
        until=until,
        blocks=lambda paths: [0] * len(paths),  # all layers at once
        order="forward",
        prunable=masks_lib.is_kernel,
        rounding="down" if is_random else "up",
    )
    if is_random:
        grow = drop_and_grow.drop_and_grow(
            num_exchanged, grow=scores.random, offered="pruned_or_dropped"
        )
        return training(task.protocol, client=task.local_client(), pruner=grow)
    client = task.local_client(
        report_grads=drop_and_grow.every(period=period, until=until),
        report_steps=local_training.last_step,
    )
    return training(
        task.protocol,
        client=sparse_gradients.top_gradients(client, num_pairs=num_exchanged),
        pruner=drop_and_grow.drop_and_grow(num_exchanged),
        fields={"grads": FieldSpec(send="pairs")},
    )


def _exchange_rounds(settings: RigL, num_rounds: int) -> tuple[int, int]:
    """Resolve the rounds from one exchange to the next, and the last that may have one."""
    return _due_rounds.resolve(
        settings.prune_every,
        settings.last_prune_round,
        usual_last=int(LAST * num_rounds),
        num_rounds=num_rounds,
    )


METHOD = Method(
    build=build,
    settings=RigL,
    paper=Paper(
        "Evci et al.",
        2020,
        "Rigging the Lottery: Making All Tickets Winners",
        arxiv="1911.11134",
        code="https://github.com/google-research/rigl",
    ),
    variants={
        "set": {"grow": "random", "decay": "constant"},
        "static": {"drop_fraction": 0.0},
    },
    law_settings={"sparsity": 0.5, "drop_fraction": 0.5, "prune_every": 2},
)
