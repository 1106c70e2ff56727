"""Many messages to one: monoids that a cohort streams through, and those that need all at once.

A client of weight 0 is absent: whatever its message holds (NaN too), it adds nothing. Sums are kept
in float32 or wider, whatever the clients send.
"""

from fedjaxprune.federated.aggregators.centers import (
    centered_clipping,
    geometric_median,
    norm_bounding,
)
from fedjaxprune.federated.aggregators.krum import krum, multi_krum
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
from fedjaxprune.federated.aggregators.trust import ServerAggregator, server_trust

__all__ = [
    "HolderSum",
    "ServerAggregator",
    "WeightedSum",
    "centered_clipping",
    "geometric_median",
    "holder_mean",
    "krum",
    "median",
    "multi_krum",
    "norm_bounding",
    "server_trust",
    "stack",
    "trimmed_mean",
    "unweighted_mean",
    "unweighted_sum",
    "vote_counts",
    "vote_weights",
    "weighted_mean",
    "weighted_sum",
]
