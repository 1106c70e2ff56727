"""What changes masks, and what a client sees of its weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedjaxprune.types.aliases import Key, Masks, Params, State
from fedjaxprune.types.messages import Broadcast


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


class Sight(NamedTuple):
    """What a local step sees of the weights, and what it may change.

    Attributes:
      seen: masks of the weights that the loss is computed with; the others are zeros to it.
      may_move: masks of the entries that the step may change; None: all.
    """

    seen: Masks
    may_move: Masks | None = None


class WeightView(NamedTuple):
    """How a client sees its dense weights inside a round.

    The gradient at what is seen acts on the dense weights, seen or not (straight-through).

    Attributes:
      init: ``broadcast -> Sight`` of the steps before the first computation.
      update: ``(local parameters, broadcast) -> Sight``.
      period: local steps from one computation to the next. With steps counted from 0, step `t`
        begins with one where `t + 1` is a multiple of it: 1 is before every step. None: never.
      penalty: ``(local parameters, Sight) -> []``, added to the loss of every step, of the dense
        weights; None for none.
    """

    init: Callable[[Broadcast], Sight]
    update: Callable[[Params, Broadcast], Sight]
    period: int | None = 1
    penalty: Callable[[Params, Sight], jax.Array] | None = None
