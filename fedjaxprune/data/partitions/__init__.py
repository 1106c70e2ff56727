"""Who holds which examples: host-side partitions of a data set into clients.

A `Partition` is a sequence of int32 index arrays, one per client. The arrays are disjoint, and
together they are the whole data set, but for what `sorted_shards` and `by_key` say they leave out.
Randomness comes from the given NumPy generator alone.
"""

from fedjaxprune.data.partitions.alike import iid, like, stratified
from fedjaxprune.data.partitions.classes import label_count, shards, sorted_shards
from fedjaxprune.data.partitions.dirichlets import (
    balanced_dirichlet,
    dirichlet,
    dirichlet_free,
)
from fedjaxprune.data.partitions.keys import by_key
from fedjaxprune.data.partitions.populations import (
    histogram,
    population,
    population_on_host,
)
from fedjaxprune.data.partitions.sizes import quantity
from fedjaxprune.data.rows import Partition

__all__ = [
    "Partition",
    "balanced_dirichlet",
    "by_key",
    "dirichlet",
    "dirichlet_free",
    "histogram",
    "iid",
    "label_count",
    "like",
    "population",
    "population_on_host",
    "quantity",
    "shards",
    "sorted_shards",
    "stratified",
]
