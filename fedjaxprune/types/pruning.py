"""What changes masks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedjaxprune.types.aliases import Key, Masks, Params, State


class PrunerInputs(NamedTuple):
    """What a pruner may look at.

    Attributes:
      params: parameters to be ranked.
      grads: mean dense gradient over the cohort, or None if the clients report none.
      round: ``[]`` int32.
      statistics: trees of the parameters, by name: `FieldSpec.read` or joined, `to_pruner`; or ().
    """

    params: Params
    grads: Params | None
    round: jax.Array
    statistics: Any = ()


class Pruner(NamedTuple):
    """Masks to masks; the mask flows through as an update flows through optax.

    Attributes:
      init: ``params -> state``.
      update: ``(key, masks, state, inputs) -> (masks, state)``.
    """

    init: Callable[[Params], State]
    update: Callable[[Key, Masks, State, PrunerInputs], tuple[Masks, State]]
