"""Refusals of sparsities that would leave nothing of a network."""

from fedjaxprune.rounds import facts as facts_lib
from fedjaxprune.types import PrunableFn


def check_something_left(facts: facts_lib.Facts, prunable: PrunableFn, sparsity: float) -> None:
    """Refuse a sparsity under which no prunable weight is left.

    Raises:
      ValueError: with the number of prunable weights.
    """
    total = sum(facts_lib.sizes(facts, prunable).values())
    if total and is_emptied(total, sparsity):
        raise ValueError(
            f"method.sparsity must leave at least one of the {total} prunable weights of the "
            f"network, got {sparsity}."
        )


def is_emptied(size: int, sparsity: float) -> bool:
    """Tell whether nothing is left of `size` weights."""
    return size - round(sparsity * size) < 1
