"""SR-STE: N:M sparsity, learned by a straight-through gradient and a pull on what is not seen.

Of every `m` consecutive inputs of a kernel the loss sees the `n` largest weights, which are chosen
anew before every local step. The gradient at these weights acts on all of them, and weights that
are not seen are pulled towards zero by `decay` times themselves. The server keeps and sends dense
weights, and clients send dense deltas; what is deployed has the pattern, which sparse matrix units
compute fast (2 of 4). With a decay of 0 it is the plain straight-through estimator.

Inputs are the last axis but one of a kernel, as in flax. The method was published for one machine.
Layers whose inputs are no multiple of `m` stay dense,
such as a first convolution of three channels. Of equal weights the first one is kept (the last in
the public code, whose dense layers also ignore the decay and drop the bias).

References:
  Zhou et al., `Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch
  <https://arxiv.org/abs/2102.04010>`_, 2021.
"""

import jax
import pydantic

from fedjaxprune import masks as masks_lib
from fedjaxprune.method import Method, Paper
from fedjaxprune.methods import _dense_weights
from fedjaxprune.pruning import selection, views
from fedjaxprune.rounds import facts as facts_lib
from fedjaxprune.rounds.protocol import Masking
from fedjaxprune.rounds.task import Task
from fedjaxprune.settings import NonNegative, Settings, setting
from fedjaxprune.types import Algorithm

LARGEST_GROUP = 64


class SRSTE(Settings):
    """Settings of SR-STE; the defaults are published ones."""

    n: int = setting(
        2, "Weights kept of every group of inputs.", unit="weights", ge=1, le=LARGEST_GROUP
    )
    m: int = setting(
        4, "Consecutive inputs that make a group.", unit="weights", ge=1, le=LARGEST_GROUP
    )
    decay: NonNegative = setting(
        2e-4, "Multiple of the unseen weights that is added to their gradient.", unit="factor"
    )

    @pydantic.model_validator(mode="after")
    def _check_pattern(self):
        if self.n > self.m:
            raise ValueError(f"n must be at most m ({self.m}), got {self.n}.")
        return self


def build(settings: SRSTE, task: Task) -> Algorithm:
    """Train dense weights of which the loss sees `n` of every `m`.

    Raises:
      ValueError: no layer has whole groups.
    """

    def prunable(path: str, leaf: jax.Array) -> bool:
        return masks_lib.is_kernel(path, leaf) and leaf.shape[-2] % settings.m == 0

    kernels = facts_lib.sizes(task.facts, masks_lib.is_kernel)
    if settings.n < settings.m and kernels and not facts_lib.sizes(task.facts, prunable):
        raise ValueError(
            "method.m must divide the number of inputs of a layer, or all stay dense; got "
            f"{settings.m}, and none of the layers {', '.join(kernels)} has whole groups."
        )
    view = views.best_of_groups(n=settings.n, m=settings.m, decay=settings.decay, prunable=prunable)
    return _dense_weights.train(
        task,
        view,
        sparsity=1.0 - settings.n / settings.m,
        prunable=prunable,
        masking=Masking(
            download=lambda state: masks_lib.full(state.params),
            upload=lambda state: masks_lib.full(state.params),
        ),
        select=selection.n_of_m(n=settings.n, m=settings.m),
    )


METHOD = Method(
    build=build,
    settings=SRSTE,
    paper=Paper(
        "Zhou et al.",
        2021,
        "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
        arxiv="2102.04010",
        code="https://github.com/NM-sparsity/NM-sparsity",
    ),
    variants={"without_decay": {"decay": 0.0}},
    law_settings={"n": 1, "m": 2, "decay": 0.1},
    nothing_pruned={"n": 2},
)
