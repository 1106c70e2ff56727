"""Calls optax: its promotion of dtypes, what its optimizers ask for, and those that do not fit."""

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjaxprune import trees
from fedjaxprune.types import Masks, Params, State

# Optimizers that train other parameters than those that they are given, by their state.
_OTHER_PARAMS = {
    optax.LookaheadState: "optax.lookahead trains two copies of the parameters",
    optax.contrib.ScheduleFreeState: "a schedule-free optimizer trains other parameters than "
    "those that are to be tested",
}
# What Python, or optax, says of an argument that an optimizer needs and is not given.
_ASKS = re.compile(
    r"missing .* required keyword-only arguments?: (.*)|^(\w+) must be provided to .* update"
)


class Loss(NamedTuple):
    """What an optimizer may ask of a step's loss.

    Attributes:
      value: ``[]``, at the parameters.
      value_fn: ``params -> value``, of the same batch.
    """

    value: jax.Array
    value_fn: Callable[[Params], jax.Array]


def init(optimizer: Any, params: Params, *, what: str) -> State:
    """Make the state of an optimizer.

    Raises:
      TypeError: it is no optax optimizer.
      ValueError: it trains other parameters than those that it is given.
    """
    if not (callable(getattr(optimizer, "init", None)) and hasattr(optimizer, "update")):
        given = getattr(optimizer, "__name__", type(optimizer).__name__)
        raise TypeError(f"{what} must be an optax optimizer, such as optax.sgd(0.1), got {given}.")
    with jax.numpy_dtype_promotion("standard"):  # optax does not keep to strict promotion
        state = optimizer.init(params)
    kinds = tuple(_OTHER_PARAMS)
    for leaf in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds)):
        if isinstance(leaf, kinds):
            raise ValueError(f"{what} cannot be used: {_OTHER_PARAMS[type(leaf)]}.")
    return state


def update(
    optimizer: Any, grads: Params, state: State, params: Params, *, what: str, loss: Loss | None
) -> tuple[Params, State]:
    """Make an optimizer's updates; one that asks for the loss gets value, grad and value_fn.

    Raises:
      ValueError: it asks for something else, its updates are not of the parameters' shapes, or its
        state does not keep its shapes and types.
    """
    takes = inspect.signature(optimizer.update).parameters.values()
    takes_more = any(one.kind is one.VAR_KEYWORD for one in takes)
    takes_more = takes_more or isinstance(optimizer, optax.GradientTransformationExtraArgs)
    extra = {**loss._asdict(), "grad": grads} if takes_more and loss is not None else {}
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes dtypes
        try:
            updates, after = optimizer.update(grads, state, params, **extra)
        except (TypeError, ValueError) as error:
            refused = re.search(r"got an unexpected keyword argument '(\w+)'", str(error))
            if refused is not None and refused[1] in extra:
                raise ValueError(
                    f"{what} does not take {refused[1]!r}, though optax's type "
                    "GradientTransformationExtraArgs says that it takes any argument."
                ) from error
            if (found := _ASKS.search(str(error))) is None:
                raise
            known = "nothing else" if loss is None else "value, grad and value_fn"
            raise ValueError(
                f"{what} asks for {found[1] or repr(found[2])}, and is given gradients, parameters "
                f"and {known}."
            ) from error
    trees.check_shapes(updates, params, what=f"{what} gives an update, which")
    _check_state(state, after, what)
    return updates, after


def _check_state(before: State, after: State, what: str) -> None:
    """Refuse a state that a step makes another one of: steps are a loop, and carry it."""
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise ValueError(
            f"{what} must keep its state as its `init` makes it, got another structure after a "
            "step."
        )
    for path, old, new in zip(
        trees.paths(before), jax.tree.leaves(before), jax.tree.leaves(after), strict=True
    ):
        kinds = [f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for leaf in (old, new)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{what} must keep its state as its `init` makes it, but {path!r} was {kinds[0]} "
                f"and is {kinds[1]} after a step."
            )


def zero_pruned(optimizer: Any, state: State, masks: Masks) -> State:
    """Set what an optimizer remembers about pruned entries to exact zeros, whatever it was.

    Else old momentum would move a weight that is pruned, or that has just grown back. Memory that
    is not of the parameters' shape (a factored second moment) has no pruned entries and stays.
    """

    def leaf(value: Any, mask: jax.Array) -> Any:
        if isinstance(value, optax.MaskedNode) or value.shape != mask.shape:
            return value
        return jnp.where(mask, value, jnp.zeros_like(value))

    def is_leaf(value: Any) -> bool:
        return isinstance(value, optax.MaskedNode)

    with jax.numpy_dtype_promotion("standard"):  # init is called to tell the state's leaves apart
        return optax.tree.map_params(optimizer, leaf, state, masks, is_leaf=is_leaf)
