"""From stored images to what a network reads: scaling, normalisation, augmentation, inside the jit.

Data stays on the device as stored (uint8), a quarter of its size in float32; a batch is converted
when it is gathered.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjaxprune.base import Key

# (key, inputs [B, ...]) -> [B, ...]. A whole pipeline goes from inputs as stored to float32.
Preprocess = Callable[[Key, Any], Any]


def scale(*, max_value: float = 255.0) -> Preprocess:
    """Map stored values in ``[0, max_value]`` to float32 in ``[0, 1]``.

    Args:
      max_value: the largest value that the storage can hold: 255 for images of eight bits.

    Raises:
      ValueError: if `max_value` is not a positive number.
    """
    if not (math.isfinite(max_value) and max_value > 0):
        raise ValueError(f"max_value must be a positive number, got {max_value}.")

    def scale_fn(key: Key, inputs: jax.Array) -> jax.Array:
        del key  # deterministic
        return inputs.astype(jnp.float32) / max_value

    return scale_fn


def chain(*steps: Preprocess) -> Preprocess:
    """Apply `steps` from left to right, each with a key of its own; none at all changes nothing."""

    def chain_fn(key: Key, inputs: Any) -> Any:
        for number, step in enumerate(steps):
            inputs = step(jax.random.fold_in(key, number), inputs)
        return inputs

    return chain_fn


def normalise(*, mean: Sequence[float], std: Sequence[float]) -> Preprocess:
    """Shift and divide every channel, after `scale`.

    Args:
      mean: one number per channel (the last axis).
      std: one positive number per channel.

    Returns:
      A function of float32 inputs ``[B, ..., channels]``; the channels are checked while tracing.

    Raises:
      ValueError: if the two differ in length, are empty, or a deviation is not positive.
    """
    means, stds = tuple(map(float, mean)), tuple(map(float, std))
    if not means or len(means) != len(stds):
        raise ValueError(
            f"mean and std must have one number per channel each, got {means} and {stds}."
        )
    if not all(math.isfinite(value) and value > 0 for value in stds):
        raise ValueError(f"std must be positive in every channel, got {stds}.")

    def normalise_fn(key: Key, inputs: jax.Array) -> jax.Array:
        del key  # deterministic
        if inputs.shape[-1] != len(means):
            raise ValueError(
                f"normalise has statistics of {len(means)} channels, but the inputs of shape "
                f"{inputs.shape} have {inputs.shape[-1]}."
            )
        shape = (1,) * (inputs.ndim - 1) + (len(means),)
        center = jnp.array(means, jnp.float32).reshape(shape)
        width = jnp.array(stds, jnp.float32).reshape(shape)
        return (inputs - center) / width

    return normalise_fn
