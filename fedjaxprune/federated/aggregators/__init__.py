"""Many messages to one: monoids that a cohort streams through, and those that need all at once.

A client of weight 0 is absent: whatever its message holds (NaN too), it adds nothing. Sums are kept
in float32 or wider, whatever the clients send.
"""

from fedjaxprune.federated.aggregators.means import (
    HolderSum,
    WeightedSum,
    holder_mean,
    stack,
    unweighted_mean,
    unweighted_sum,
    vote_counts,
    vote_weights,
    weighted_mean,
    weighted_sum,
)
from fedjaxprune.federated.aggregators.robust import median, trimmed_mean

__all__ = [
    "HolderSum",
    "WeightedSum",
    "holder_mean",
    "median",
    "stack",
    "trimmed_mean",
    "unweighted_mean",
    "unweighted_sum",
    "vote_counts",
    "vote_weights",
    "weighted_mean",
    "weighted_sum",
]
