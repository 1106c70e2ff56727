"""What papers charge, by name: models of cost, to stand beside what is measured.

All are pure functions of counts, in Python integers. None of them is what a message takes: see
`ledger`.
"""

import math
from collections.abc import Callable, Mapping, Sequence

Shapes = Sequence[Sequence[int]]
StorageFn = Callable[[Sequence[int], Shapes], int]  # (kept, shapes) -> bits of one transfer


def dense(kept: Sequence[int], shapes: Shapes) -> int:
    """Charge every parameter 32 bits, live or not."""
    del kept
    return 32 * sum(math.prod(shape) for shape in shapes)


def values(kept: Sequence[int], shapes: Shapes) -> int:
    """Charge every live parameter 32 bits, and nothing for where it is."""
    del shapes
    return 32 * sum(kept)


def fedrts_bitmap(kept: Sequence[int], shapes: Shapes) -> int:
    """Charge live parameters 32 bits, and a bitmap for every leaf that is not full.

    This is what FedRTS's published figures follow, whatever its appendix says.
    """
    return sum(
        32 * m + (0 if m == math.prod(shape) else math.prod(shape))
        for m, shape in zip(kept, shapes, strict=True)
    )


def fedrts_f4(kept: Sequence[int], shapes: Shapes) -> int:
    """Charge what FedRTS's appendix F.4 prescribes, by the density of each leaf.

    Of 0.9 and more: dense. Of [0.3, 0.9): values and a bitmap. Of [0.1, 0.3): values and
    ``ceil(log2 n)`` bits each (COO). Below: values, columns and row pointers (CSR); a row is what
    leads to one output (the last axis of our kernels), as where the rule comes from.

    References:
      Huang et al., `FedRTS <https://arxiv.org/abs/2501.19122>`_, 2025, appendix F.4.
    """
    total = 0
    for m, shape in zip(kept, shapes, strict=True):
        n = math.prod(shape)
        if 10 * m >= 9 * n:
            total += 32 * n
        elif 10 * m >= 3 * n:
            total += n + 32 * m
        elif 10 * m >= n:
            total += m * _log2(n) + 32 * m
        else:
            num_rows = shape[-1] if len(shape) > 1 else 1
            total += m * _log2(n // num_rows) + num_rows * _log2(m) + 32 * m
    return total


def pairs(num_pairs: int, size: int) -> int:
    """Charge pairs of a value and its place in a leaf: 32 bits and ``ceil(log2 size)``."""
    return num_pairs * (32 + _log2(size))


def places(num_places: int, size: int) -> int:
    """Charge places in a leaf, without values: ``ceil(log2 size)`` bits each."""
    return num_places * _log2(size)


def prunefl_published(kept: Sequence[int], shapes: Shapes) -> int:
    """Charge what FedRTS charges a PruneFL client for a round that revises masks, both ways.

    A dense and a sparse model (``O_d + O_s``), as `fedrts_f4` stores them; other rounds take two
    sparse models. `prunefl_corrected` has the transfer that is missing.

    Args:
      kept: live weights of each leaf.
      shapes: of the leaves.

    References:
      Huang et al., `FedRTS <https://arxiv.org/abs/2501.19122>`_, 2025, appendix F.4.
    """
    return dense(kept, shapes) + fedrts_f4(kept, shapes)


def prunefl_corrected(kept: Sequence[int], shapes: Shapes) -> int:
    """Charge a PruneFL client for every transfer of a round that revises masks, both ways.

    The client receives the live weights (``O_s``), and sends the live weights back (``O_s``) and
    the squared gradients of all weights (``O_d``). The published ``O_d + O_s`` has one sparse model
    only: beside the weights down and the squares up, it lacks the live weights that go up.

    Args:
      kept: live weights of each leaf.
      shapes: of the leaves.

    References:
      Jiang et al., `PruneFL <https://arxiv.org/abs/1909.12326>`_, 2022, and its public code, in
      which clients send both.
    """
    return prunefl_published(kept, shapes) + fedrts_f4(kept, shapes)


def fedrts_flops(dense_flops: float, sparse_flops: float, num_steps: int) -> float:
    """Charge the arithmetic of a client's round that revises masks, as FedRTS does.

    Three sparse passes a step; in the last step both gradients are dense. FedDST, FedSGC and
    FedTiny are charged the same. FedRTS takes a sparse pass for its density times a dense one.

    Args:
      dense_flops: of the forward pass of the dense network, over one batch.
      sparse_flops: of the pruned one.
      num_steps: local steps of the round.

    References:
      Huang et al., `FedRTS <https://arxiv.org/abs/2501.19122>`_, 2025, appendix F.4.
    """
    return 3 * sparse_flops * (num_steps - 1) + sparse_flops + 2 * dense_flops


def prunefl_flops(dense_flops: float, sparse_flops: float, num_steps: int) -> float:
    """Charge the arithmetic of a PruneFL client's round as FedRTS does: dense gradients throughout.

    Arguments and source are those of `fedrts_flops`.
    """
    return (2 * dense_flops + sparse_flops) * num_steps


STORAGE: Mapping[str, StorageFn] = {
    "dense": dense,
    "values": values,
    "fedrts_f4": fedrts_f4,
    "fedrts_bitmap": fedrts_bitmap,
}


def feddip_code(sparsity: float, num_params: int) -> int:
    """Charge what FedDIP's public code charges for one transfer, in bits.

    32 bits for each parameter that survives, counted on all parameters, and no masks. The code
    prints it in units of 2**20 bits and calls them megabytes.
    """
    return int(32 * (1 - sparsity) * num_params)


def _log2(number: int) -> int:
    """Round the binary logarithm up; 0 for numbers below 2."""
    return max(number - 1, 0).bit_length()
