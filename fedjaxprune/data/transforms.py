"""From stored images to what a network reads: scaling, normalization, augmentation, inside the jit.

Data stays on the device as stored (uint8), a quarter of its size in float32; a batch is converted
when it is gathered.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fedjaxprune.data.datasets import Dataset
from fedjaxprune.types import Key

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


def normalize(*, mean: Sequence[float], std: Sequence[float]) -> Preprocess:
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

    def normalize_fn(key: Key, inputs: jax.Array) -> jax.Array:
        del key  # deterministic
        if inputs.shape[-1] != len(means):
            raise ValueError(
                f"normalize has statistics of {len(means)} channels, but the inputs of shape "
                f"{inputs.shape} have {inputs.shape[-1]}."
            )
        shape = (1,) * (inputs.ndim - 1) + (len(means),)
        center = jnp.array(means, jnp.float32).reshape(shape)
        width = jnp.array(stds, jnp.float32).reshape(shape)
        return (inputs - center) / width

    return normalize_fn


def random_crop(*, padding: int, mode: Literal["zero", "reflect"] = "zero") -> Preprocess:
    """Shift every image by up to `padding` pixels each way: pad the stored image, cut its size out.

    Goes before `scale` and `normalize`, where it moves bytes and where zero is black.

    Args:
      padding: pixels on each of the four sides, at least 1.
      mode: what lies outside an image: zeros, or the image mirrored (without its border pixels).

    Returns:
      A function of ``[B, H, W, channels]`` of any type; each example draws its own two offsets,
      uniform over the ``2 * padding + 1`` possible ones.

    Raises:
      ValueError: if an option is out of range; while tracing, if a mirrored image is not larger
        than its padding.
    """
    if padding < 1:
        raise ValueError(f"padding must be at least 1 pixel, got {padding}.")
    if mode not in ("zero", "reflect"):
        raise ValueError(f"mode must be 'zero' or 'reflect', got {mode!r}.")

    def crop_fn(key: Key, inputs: jax.Array) -> jax.Array:
        _check_images("random_crop", inputs)
        num, height, width, _ = inputs.shape
        if mode == "reflect" and padding >= min(height, width):
            raise ValueError(
                f"mode 'reflect' needs a padding below the image's {height} x {width} pixels, "
                f"got {padding}."
            )
        sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        padded = jnp.pad(inputs, sides, mode="constant" if mode == "zero" else "reflect")
        offsets = jax.random.randint(key, (num, 2), 0, 2 * padding + 1)

        def cut(image, offset):
            return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), inputs.shape[1:])

        return jax.vmap(cut)(padded, offsets)

    return crop_fn


def random_flip() -> Preprocess:
    """Mirror every image from left to right with probability 1/2, ``[B, H, W, channels]``."""

    def flip_fn(key: Key, inputs: jax.Array) -> jax.Array:
        _check_images("random_flip", inputs)
        flipped = jax.random.bernoulli(key, shape=(inputs.shape[0], 1, 1, 1))
        return jnp.where(flipped, inputs[:, :, ::-1], inputs)

    return flip_fn


def for_dataset(dataset: Dataset, *, augment: bool) -> tuple[Preprocess, Preprocess]:
    """Make the usual pipelines of a data set, for training and for testing.

    Both scale to ``[0, 1]`` where the data set has a largest value, and normalize where it has
    statistics (``dataset._replace(mean=None, std=None)`` leaves that out); else inputs are used as
    stored. Augmentation is for training only: a crop after zero-padding by an eighth of the height
    and, where images may be mirrored, a flip.

    Raises:
      ValueError: if examples that are no images are to be augmented.
    """
    fixed = []
    if dataset.max_value is not None:
        fixed.append(scale(max_value=dataset.max_value))
    if dataset.mean is not None and dataset.std is not None:
        fixed.append(normalize(mean=dataset.mean, std=dataset.std))
    random = []
    if augment:
        if len(dataset.input_shape) != 3:
            raise ValueError(
                "augment crops and flips images (height, width, channels), but the examples of "
                f"{dataset.name!r} have shape {tuple(dataset.input_shape)}."
            )
        random.append(random_crop(padding=max(dataset.input_shape[0] // 8, 1)))
        if dataset.may_flip:
            random.append(random_flip())
    return chain(*random, *fixed), chain(*fixed)


def _check_images(name: str, inputs: jax.Array) -> None:
    """Refuse inputs without the four axes of a batch of images."""
    if inputs.ndim != 4:
        raise ValueError(f"{name} needs images [B, H, W, channels], got shape {inputs.shape}.")
