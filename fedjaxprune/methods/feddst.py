"""FedDST: clients revise masks of their own while they train, and the server makes one of them.

1. ``draw``: one mask is drawn at random, which follows from the run's seed and does not travel;
2. ``train``: in a readjusting round, a client trains all but its last epoch, drops the smallest of
   its live weights in each layer, grows as many of the pruned ones by the size of their gradients,
   at value zero, and trains the last epoch under the new masks. It sends its live weights and its
   masks. The server averages each weight over the clients that hold it, and keeps, of the weights
   that any client holds, the largest of each layer, as many as before. No dense weights or
   gradients travel, and the server needs no data. In other rounds it is FedAvg under the masks.

The share that is exchanged decays along a cosine, and is rounded down in each layer. What was just
dropped is not grown at once, and neither is a weight whose gradient is exactly zero.

We had access to the abstract of the paper and to the authors' code. We follow the code but for its
defects: there, growing looks at live weights too and sets those that it finds to zero, the decay is
applied twice, and the readjustment depends on the epochs that a client has made in all. The code
revises after the last epoch; then grown weights arrive as zeros and the server prunes them again,
so the default here is before the last epoch (`epochs_before`), as an independent implementation
reads the paper. The gradient is that of the loss without penalties, on the last batch again. The
first mask and the layers' shares are RigL's, as in the comparisons of FedRTS (the code's scale
sparsities and take the largest initial weights: ``first_mask: magnitude``). The exchanged share is
that of the code's script; its read-me has 0.01.

A mean as ``server.aggregator`` becomes the mean over holders, weighted by examples. A robust one is
used as it is, and takes a weight that a client does not hold for one that it did not change.

References:
  Bibikar, Vikalo, Wang and Chen, `Federated Dynamic Sparse Training: Computing Less, Communicating
  Less, Yet Learning Better <https://arxiv.org/abs/2112.09824>`_, 2022; Huang et al., `FedRTS
  <https://arxiv.org/abs/2501.19122>`_, 2025.
"""

from fedjaxprune.method import Method, Paper
from fedjaxprune.methods import _own_masks
from fedjaxprune.rounds.task import Task
from fedjaxprune.types import Algorithm


class FedDST(_own_masks.OwnMaskSettings):
    """Settings of FedDST."""


def build(settings: FedDST, task: Task) -> Algorithm:
    """Draw one mask at random, and train under masks that clients revise.

    Raises:
      ValueError: nothing would be left of a layer, or the rounds or epochs do not fit the run.
    """
    return _own_masks.build(settings, task)


METHOD = Method(
    build=build,
    settings=FedDST,
    paper=Paper(
        "Bibikar et al.",
        2022,
        "Federated Dynamic Sparse Training: Computing Less, Communicating Less, Yet Learning "
        "Better",
        arxiv="2112.09824",
        code="https://github.com/bibikar/feddst",
    ),
    law_settings={
        "sparsity": 0.5,
        "drop_fraction": 0.5,
        "prune_every": 2,
        "last_prune_round": 6,
    },
    nothing_pruned={"sparsity": 0.0},
)
