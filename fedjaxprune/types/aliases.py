"""Names for trees and functions, which say what is meant where no type can."""

from collections.abc import Callable
from typing import Any

import jax

Key = jax.Array  # a typed key, as jax.random.key makes it
Params = Any  # tree of float arrays
Masks = Any  # the tree of the parameters, every leaf bool; True means kept
Delta = Any  # local minus broadcast parameters
State = Any  # a component's own tree of arrays
Metrics = Any  # tree of metrics accumulators
Examples = Any  # tree of arrays [E, ...]

Schedule = Callable[[jax.Array], jax.Array]  # round [] -> value []; optax schedules fit
PrunableFn = Callable[[str, jax.Array], bool]  # (path "a/b/kernel", leaf) -> may it be pruned?
