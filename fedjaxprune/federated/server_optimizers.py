"""One delta to new parameters: a server is an optax optimizer whose gradient is minus the delta."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjaxprune import trees
from fedjaxprune.federated import _optax
from fedjaxprune.registry import Part
from fedjaxprune.settings import FLOAT_MAX, Fraction, Positive, Settings, setting
from fedjaxprune.types import Delta, Masks, Params, State


def fedavg(*, learning_rate: float = 1.0) -> optax.GradientTransformation:
    """Add the delta to the parameters.

    Args:
      learning_rate: 1 is the paper's: the new parameters are the mean of the clients'.

    References:
      McMahan et al., `Communication-efficient learning of deep networks from decentralized data
      <https://arxiv.org/abs/1602.05629>`_, 2017.
    """
    _check_positive("learning_rate", learning_rate)
    return optax.sgd(learning_rate)


def fedavgm(*, learning_rate: float, momentum: float) -> optax.GradientTransformation:
    """Add a decaying sum of the deltas to the parameters.

    Args:
      learning_rate: of the server.
      momentum: how much of the sum is left after a round, in [0, 1).

    References:
      Hsu et al., `Measuring the effects of non-identical data distribution for federated visual
      classification <https://arxiv.org/abs/1909.06335>`_, 2019.
    """
    _check_positive("learning_rate", learning_rate)
    _check_decay("momentum", momentum)
    return optax.sgd(learning_rate, momentum=momentum)


def fedadam(
    *, learning_rate: float, b1: float = 0.9, b2: float = 0.99, eps: float = 1e-3
) -> optax.GradientTransformation:
    """Follow the mean delta, every coordinate at its own pace.

    The paper has no bias correction and starts the second moment at ``eps ** 2``; optax corrects
    the bias and starts at zero, which is a difference of the first rounds.

    Args:
      learning_rate: of the server.
      b1: decay of the mean delta, in [0, 1); the default is the paper's.
      b2: decay of the mean squared delta, in [0, 1); the default is the paper's.
      eps: degree of adaptivity (the paper's tau); the default is the paper's.

    References:
      Reddi et al., `Adaptive federated optimization <https://arxiv.org/abs/2003.00295>`_, 2021.
    """
    _check_positive("learning_rate", learning_rate)
    _check_decay("b1", b1)
    _check_decay("b2", b2)
    _check_positive("eps", eps)
    return optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)


def fedyogi(
    *, learning_rate: float, b1: float = 0.9, b2: float = 0.99, eps: float = 1e-3
) -> optax.GradientTransformation:
    """Follow the mean delta as `fedadam` does, with a second moment that shrinks slowly.

    The paper has no bias correction and starts the second moment at ``eps ** 2``; optax corrects
    the bias, and here both moments start at zero: from its own start at 1e-6, `optax.yogi` would
    move weights that no delta moves. Arguments and reference are those of `fedadam`.
    """
    _check_positive("learning_rate", learning_rate)
    _check_decay("b1", b1)
    _check_decay("b2", b2)
    _check_positive("eps", eps)
    return optax.chain(
        optax.scale_by_yogi(b1=b1, b2=b2, eps=eps, initial_accumulator_value=0.0),
        optax.scale_by_learning_rate(learning_rate),
    )


def init(server: optax.GradientTransformation, params: Params) -> State:
    """Make the state of a server that has not stepped.

    Any optax optimizer is a server that needs nothing but gradients and parameters.

    Raises:
      TypeError: it is no optax optimizer.
      ValueError: it keeps parameters of its own (`optax.lookahead`).
    """
    return _optax.init(server, params, what="the server's optimizer")


def step(
    server: optax.GradientTransformation, delta: Delta, state: State, params: Params
) -> tuple[Params, State]:
    """Move the parameters by one round's delta; the only place where a delta is negated.

    Returns:
      ``(params, state)``, in the dtypes of `params`.
    """
    trees.check_shapes(delta, params, what="the aggregated delta")
    grads = jax.tree.map(lambda leaf, param: -leaf.astype(param.dtype), delta, params)
    updates, state = _optax.update(
        server, grads, state, params, what="the server's optimizer", loss=None
    )
    with jax.numpy_dtype_promotion("standard"):  # optax does not keep to strict promotion
        return optax.apply_updates(params, updates), state


def shift(model_state: State, change: State) -> State:
    """Add a mean change to what is not trained.

    An integer takes the nearest one that its type holds. A boolean changes if the mean change is
    more than a half.
    """

    def leaf(before: jax.Array, change: jax.Array) -> jax.Array:
        if jnp.issubdtype(before.dtype, jnp.inexact):
            return before + change.astype(before.dtype)
        signed = jnp.int64 if before.dtype.itemsize == 8 else jnp.int32
        most = float(jnp.iinfo(signed).max + 1) * (1 - 2.0**-24)  # float32 has no larger one below
        most = most if before.dtype.itemsize >= 4 else 2.0**17  # more than such a type can change
        step = jnp.round(jnp.clip(change, -most, most)).astype(signed)
        moved = before.astype(signed) + step
        if before.dtype == jnp.bool_:
            return moved > 0
        limits = jnp.iinfo(before.dtype)
        if before.dtype.itemsize < 4:
            return jnp.clip(moved, limits.min, limits.max).astype(before.dtype)
        after = moved.astype(before.dtype)  # where it wrapped around, it went the other way
        after = jnp.where((step > 0) & (after < before), jnp.full_like(after, limits.max), after)
        return jnp.where((step < 0) & (after > before), jnp.full_like(after, limits.min), after)

    return jax.tree.map(leaf, model_state, change)


def zero_pruned(server: optax.GradientTransformation, state: State, masks: Masks) -> State:
    """Set what the server remembers about pruned entries to exact zeros; see `_optax.zero_pruned`.

    Else old momentum would move a weight that is pruned, or that has just grown back.
    """
    return _optax.zero_pruned(server, state, masks)


def _check_positive(name: str, value: float) -> None:
    """Refuse a rate that does not move or goes backwards."""
    if not value > 0.0:
        raise ValueError(f"{name} must be positive, got {value}.")


def _check_decay(name: str, value: float) -> None:
    """Refuse a memory that does not fade."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}.")


class FedAvgSettings(Settings):
    """Settings of `fedavg`."""

    server_learning_rate: Positive = setting(1.0, "The server's step size.", unit="factor")


class FedAvgMSettings(FedAvgSettings):
    """Settings of `fedavgm`."""

    server_momentum: Fraction = setting(0.9, "The server's momentum.", unit="factor")


class AdaptiveSettings(Settings):
    """Settings of `fedadam` and `fedyogi`; the defaults are the paper's, but for the step size."""

    server_learning_rate: Positive = setting(..., "The server's step size.", unit="factor")
    b1: Fraction = setting(0.9, "Decay of the mean delta.", unit="factor")
    b2: Fraction = setting(0.99, "Decay of the second moment.", unit="factor")
    eps: float = setting(
        1e-3, "Degree of adaptivity, the paper's tau.", unit="step", gt=0, le=FLOAT_MAX
    )


def _adaptive(factory: Callable[..., Any]) -> Callable[..., Any]:
    def build(settings: AdaptiveSettings) -> optax.GradientTransformation:
        rate = settings.server_learning_rate
        return factory(learning_rate=rate, b1=settings.b1, b2=settings.b2, eps=settings.eps)

    return build


PARTS = {
    "fedavg": Part(
        lambda settings: fedavg(learning_rate=settings.server_learning_rate),
        FedAvgSettings,
        summary="adds the mean delta, times a step size",
    ),
    "fedavgm": Part(
        lambda settings: fedavgm(
            learning_rate=settings.server_learning_rate, momentum=settings.server_momentum
        ),
        FedAvgMSettings,
        summary="adds the mean delta with momentum",
    ),
    "fedadam": Part(_adaptive(fedadam), AdaptiveSettings, summary="Adam on the mean delta"),
    "fedyogi": Part(_adaptive(fedyogi), AdaptiveSettings, summary="Yogi on the mean delta"),
}
