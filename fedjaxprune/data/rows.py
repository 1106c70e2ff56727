"""Who holds which examples, as two arrays that are a sequence of the clients' rows."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Partition(Sequence[np.ndarray]):
    """The rows of each client: ``partition[i]`` is the array of client `i`.

    It is stored as two arrays, so that a million clients need no million small ones.

    Attributes:
      order: ``[sum of sizes]`` int32, rows of the examples, grouped by client.
      offsets: ``[N + 1]`` int64, where each client begins, from 0 to the length of `order`.
    """

    order: np.ndarray
    offsets: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """How many rows each client has, ``[N]``."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[client] for client in range(*index.indices(len(self)))]
        client = range(len(self))[index]
        return self.order[self.offsets[client] : self.offsets[client + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        ends = self.offsets.tolist()
        for begin, end in itertools.pairwise(ends):
            yield self.order[begin:end]


def of_sizes(order: np.ndarray, sizes: np.ndarray) -> Partition:
    """Cut grouped rows by the clients' sizes ``[N]``."""
    return Partition(order.astype(np.int32), np.append(0, np.cumsum(sizes, dtype=np.int64)))
